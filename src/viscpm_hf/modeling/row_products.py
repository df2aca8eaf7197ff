"""Products of few rows with plain weights on a CPU, at the speed at which the memory delivers the weights.

Decoding multiplies one row, or the few of a beam search, with every weight. Libraries are made for many rows: in
bf16 they reach half of the memory's bandwidth with one. Here are three cures: `mv`, which needs nothing; a kernel of
our own, compiled in a second by the machine's C++ compiler and kept on the disk; and weights in huge pages, since with
pages of 4 KB a third of the time goes into finding them.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import hashlib
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Above, libraries are as fast.
MAX_ROWS = 4
HUGE_PAGE_BYTES = 2**21
# What the kernel takes in one go along the width.
STEP = 32
# No -ffast-math: loading such a library would flush the denormal numbers of the whole process.
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")

SOURCE = r"""
#include <cstdint>
#include <cstring>
#include <vector>

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
struct Pair { Floats even, odd; };

// A bf16 is the upper half of a float: 32 of them are 16 of even and 16 of odd place, a shift and a mask away.
static inline Pair load(const uint16_t* from) {
  Bits both;
  memcpy(&both, from, sizeof both);
  return {(Floats)(both << 16), (Floats)(both & 0xffff0000u)};
}
static inline Pair load(const float* from) {
  Pair pair;
  memcpy(&pair, from, sizeof pair);
  return pair;
}
static inline void store(float value, float* to) { *to = value; }
static inline void store(float value, uint16_t* to) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  *to = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// y (rows, n) = x (rows, k) . w (n, k)^T
template <int ROWS, class Number>
static void product(const Number* w, const Number* x, Number* y, long n, long k, int threads) {
  static thread_local std::vector<Pair> loaded;
  loaded.resize(ROWS * k / 32);
  for (long i = 0; i < ROWS * k / 32; i++) loaded[i] = load(x + 32 * i);
  const Pair* xs = loaded.data();
  const long ahead = 4096 / sizeof(Number), line = 64 / sizeof(Number);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long i = 0; i < n; i++) {
    Floats sums[ROWS] = {}, others[ROWS] = {};
    const Number* row = w + i * k;
    for (long j = 0; j < k; j += 32) {
      for (long l = 0; l < 32; l += line) __builtin_prefetch(row + j + ahead + l);
      Pair weights = load(row + j);
      for (int m = 0; m < ROWS; m++) {
        const Pair& mine = xs[(m * k + j) / 32];
        sums[m] += weights.even * mine.even;
        others[m] += weights.odd * mine.odd;
      }
    }
    for (int m = 0; m < ROWS; m++) {
      Floats all = sums[m] + others[m];
      float sum = 0;
      for (int lane = 0; lane < 16; lane++) sum += all[lane];
      store(sum, y + m * n + i);
    }
  }
}

template <class Number>
static void dispatch(const Number* w, const Number* x, Number* y, long n, long k, long rows, int threads) {
  switch (rows) {
    case 1: return product<1>(w, x, y, n, k, threads);
    case 2: return product<2>(w, x, y, n, k, threads);
    case 3: return product<3>(w, x, y, n, k, threads);
    case 4: return product<4>(w, x, y, n, k, threads);
  }
}

extern "C" void float32(const float* w, const float* x, float* y, long n, long k, long rows, int threads) {
  dispatch(w, x, y, n, k, rows, threads);
}
extern "C" void bfloat16(const uint16_t* w, const uint16_t* x, uint16_t* y, long n, long k, long rows, int threads) {
  dispatch(w, x, y, n, k, rows, threads);
}
"""

_uses_kernel: contextvars.ContextVar[bool] = contextvars.ContextVar("uses_kernel", default=False)


def cpp_compiler() -> str | None:
    """The machine's C++ compiler, `CXX` first."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "cl"]
    return next((name for name in names if shutil.which(name)), None)


@functools.lru_cache(1)
def kernel() -> ctypes.CDLL | None:
    """The compiled kernel, from the disk if it was compiled before; None where there is no compiler for it."""
    compiler = cpp_compiler()
    if compiler is None or platform.system() != "Linux":
        return None
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        machine = sorted({line for line in lines if "name" in line or "flags" in line})
        made_of = hashlib.sha256("\n".join([SOURCE, compiler, *FLAGS, *machine]).encode()).hexdigest()[:16]
        cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser()
        file = cache / "viscpm_hf" / f"row_products_{made_of}.so"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            _compile(compiler, file)
        library = ctypes.CDLL(os.fspath(file))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        logger.warning(f"Fast decoding goes without its own kernel: {' '.join(reason.split())[:300]}")
        return None
    for dtype in _DTYPES.values():
        function = getattr(library, dtype)
        function.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_long] * 3, ctypes.c_int]
        function.restype = None
    return library


def _compile(compiler: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        source, made = Path(folder, "row_products.cpp"), Path(folder, target.name)
        source.write_text(SOURCE, "utf-8")
        command = [compiler, *FLAGS, os.fspath(source), "-o", os.fspath(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.replace(target)  # another process may be at the same


_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@contextlib.contextmanager
def with_kernel() -> Iterator[None]:
    """Within it [`RowLinear`]s use the kernel, where there is one."""
    token = _uses_kernel.set(kernel() is not None)
    try:
        yield
    finally:
        _uses_kernel.reset(token)


class RowLinear(nn.Linear):
    """An `nn.Linear` that knows what is fast for few rows on a CPU. Elsewhere, and trained or compiled, just that."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        rows = hidden_states.numel() // weight.shape[1] if weight.shape[1] else 0
        if (
            rows > MAX_ROWS
            or rows < 1
            or torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or type(weight) is not nn.Parameter
            or weight.device.type != "cpu"
            or weight.dtype != hidden_states.dtype
            or self.bias is not None
        ):
            return super().forward(hidden_states)
        if _uses_kernel.get() and runs_in_kernel(self):
            return row_product(hidden_states, weight, rows)
        if rows == 1 and weight.dtype == torch.bfloat16:
            return torch.mv(weight, hidden_states.reshape(-1)).view(*hidden_states.shape[:-1], -1)
        return super().forward(hidden_states)


def runs_in_kernel(linear: nn.Linear) -> bool:
    """Whether the kernel is made for the layer's weights."""
    weight = linear.weight
    return (
        isinstance(linear, RowLinear)
        and type(weight) is nn.Parameter
        and weight.dtype in _DTYPES
        and weight.shape[1] % STEP == 0
        and weight.is_contiguous()
    )


def use_row_products(*modules: nn.Module) -> None:
    """Makes the plain linear layers in modules [`RowLinear`]s."""
    for module in modules:
        for layer in module.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = RowLinear


def row_product(hidden_states: torch.Tensor, weight: torch.Tensor, rows: int) -> torch.Tensor:
    """`(..., in)`, of few rows, with `(out, in)` -> `(..., out)`, by the kernel."""
    num_out, width = weight.shape
    hidden_states = hidden_states.contiguous()
    output = hidden_states.new_empty(*hidden_states.shape[:-1], num_out)
    getattr(kernel(), _DTYPES[weight.dtype])(
        weight.data_ptr(), hidden_states.data_ptr(), output.data_ptr(), num_out, width, rows, torch.get_num_threads()
    )
    return output


def put_into_huge_pages(parameters: Iterable[nn.Parameter]) -> None:
    """Moves plain weights on the CPU into memory that the system backs by huge pages, one after another; elsewhere
    than on Linux nothing happens."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    weights = [
        weight
        for weight in parameters
        if type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.is_contiguous()
    ]
    sizes = [-weight.nbytes % 64 + weight.nbytes for weight in weights]
    if sum(sizes) < HUGE_PAGE_BYTES:
        return
    memory = mmap.mmap(-1, sum(sizes) + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a system without them
        return
    room = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -room.data_ptr() % HUGE_PAGE_BYTES
    for weight, size in zip(weights, sizes, strict=True):
        place = room[begin : begin + weight.nbytes].view(weight.dtype).view(weight.shape)
        weight.data = place.copy_(weight.detach())
        begin += size


__all__ = ["RowLinear", "put_into_huge_pages", "use_row_products", "with_kernel"]
