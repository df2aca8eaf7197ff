"""Products of few rows on a CPU, at the speed at which the memory delivers the weights.

Decoding multiplies one row, or the few of a beam search, with every weight. Libraries are made for many rows: in
bf16 they reach half of the memory's bandwidth with one. Here are three cures: `mv`, which needs nothing; a kernel of
our own, compiled in a second by the machine's C++ compiler and kept on the disk; and weights in huge pages, since with
pages of 4 KB a third of the time goes into finding them. The same kernel multiplies and unpacks the 4-bit weights of
`packed_linear`.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import mmap
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from .cpp_kernels import COMMON, load_library


# Above, libraries are as fast.
MAX_ROWS = 4
HUGE_PAGE_BYTES = 2**21
# The same of 4-bit weights, beside unpacking them.
MAX_INT4_ROWS = 48
# What the kernel takes in one go along the width.
STEP = 32

SOURCE = r"""
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

// 4-bit weights: blocks of 64 outputs, (n / 64, k, 32) bytes, the first 32 outputs in the low halves; `scales`
// (k / 64, n) pairs of bf16, so that a value is (code - 8) * first + second.
static const long GROUP = 64;

typedef int32_t Codes __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(64)));

// `both` holds 16 codes of even and, in the upper halves, 16 of odd place; so does the result 32 bf16.
static inline Bits values_of(Bits both, const Pair& scale, const Pair& least) {
  Floats even = __builtin_convertvector((Codes)(both & 15), Floats) * scale.even + least.even;
  Floats odd = __builtin_convertvector((Codes)(both >> 16 & 15), Floats) * scale.odd + least.odd;
  return ((Bits)even + 0x8000) >> 16 | (((Bits)odd + 0x8000) & 0xffff0000u);
}

// (k, 64 * blocks) values from the block `first` on
extern "C" void unpack_int4(const uint8_t* w, const uint32_t* scales, uint16_t* to, long n, long k, long first,
                        long blocks, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long g = 0; g < k / GROUP; g++)
    for (long b = 0; b < blocks; b++) {
      const uint8_t* codes = w + ((first + b) * k + g * GROUP) * 32;
      const uint32_t* from = scales + g * n + (first + b) * 64;
      Pair scale[2], least[2];
      for (int half = 0; half < 2; half++)
        for (int i = 0; i < 16; i++) {
          const uint32_t* pair = from + 32 * half + 2 * i;
          float numbers[4];
          uint32_t bits[4] = {pair[0] << 16, pair[0] & 0xffff0000u, pair[1] << 16, pair[1] & 0xffff0000u};
          memcpy(numbers, bits, sizeof bits);
          scale[half].even[i] = numbers[0], least[half].even[i] = numbers[1] - 8 * numbers[0];
          scale[half].odd[i] = numbers[2], least[half].odd[i] = numbers[3] - 8 * numbers[2];
        }
      for (long j = 0; j < GROUP; j++) {
        Bytes bytes;
        memcpy(&bytes, codes + 32 * j, sizeof bytes);
        __builtin_prefetch(codes + 32 * j + 4096);
        Bits both = (Bits)__builtin_convertvector(bytes, Halves);
        Bits made[2] = {values_of(both, scale[0], least[0]), values_of(both >> 4, scale[1], least[1])};
        memcpy(to + ((g * GROUP + j) * blocks + b) * 64, made, sizeof made);
      }
    }
}

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#include <immintrin.h>

// A row, a group at a time, is step * (coarse + fine / 254) with two digits of 8 bits.
struct Group {
  int8_t coarse[GROUP], fine[GROUP];
  float step, sum;
};

template <class Number>
static Group digits_of(const Number* x) {
  Group group;
  float values[GROUP], largest = 1e-30f;
  for (long i = 0; i < GROUP; i += 32) {
    Pair pair = load(x + i);
    memcpy(values + i, &pair, sizeof pair);
  }
  group.sum = 0;
  for (float value : values) largest = std::max(largest, std::fabs(value)), group.sum += value;
  group.step = largest / 127;
  for (long i = 0; i < GROUP; i++) {
    // Pairs of bf16 come by even and odd places.
    long at = sizeof(Number) == 4 ? i : i / 32 * 32 + (i % 16) * 2 + i % 32 / 16;
    float scaled = values[i] / group.step, coarse = std::rint(scaled);
    group.coarse[at] = coarse;
    group.fine[at] = std::rint((scaled - coarse) * 254);
  }
  return group;
}

template <class Number>
static void int4_product(const uint8_t* w, const uint32_t* scales, const Number* x, Number* y, long n, long k,
                         long rows, int threads) {
  const long groups = k / GROUP;
  static thread_local std::vector<Group> loaded;
  loaded.resize(rows * groups);
  for (long i = 0; i < rows * groups; i++) loaded[i] = digits_of(x + i * GROUP);
  const Group* xs = loaded.data();
  // Two inputs of 32 outputs each -> pairs of inputs, so that four of them come together for an output below.
  alignas(64) uint8_t places[64];
  for (int i = 0; i < 64; i++) places[i] = i / 16 * 4 + i / 2 % 4 + i / 8 % 2 * 16 + i % 2 * 32;
  const __m512i order = _mm512_load_si512(places), low = _mm512_set1_epi8(15);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long b = 0; b < n / 64; b++) {
    __m512 sums[MAX_INT4_ROWS][4] = {};
    for (long g = 0; g < groups; g++) {
      const uint8_t* codes = w + (b * k + g * GROUP) * 32;
      __m512i values[GROUP];
      for (long j = 0; j < GROUP; j += 4) {
        __m512i one = _mm512_loadu_si512(codes + 32 * j), other = _mm512_loadu_si512(codes + 32 * j + 64);
        __builtin_prefetch(codes + 32 * j + 4096);
        __builtin_prefetch(codes + 32 * j + 4096 + 64);
        one = _mm512_permutexvar_epi8(order, one), other = _mm512_permutexvar_epi8(order, other);
        __m512i first = _mm512_unpacklo_epi16(one, other), second = _mm512_unpackhi_epi16(one, other);
        values[j] = _mm512_and_si512(first, low), values[j + 1] = _mm512_and_si512(second, low);
        values[j + 2] = _mm512_and_si512(_mm512_srli_epi16(first, 4), low);
        values[j + 3] = _mm512_and_si512(_mm512_srli_epi16(second, 4), low);
      }
      __m512 scale[4], least[4];
      for (int q = 0; q < 4; q++) {
        const uint32_t* from = scales + g * n + b * 64 + 16 * q;
        if (g + 2 < groups) __builtin_prefetch(from + 2 * n);
        __m512i both = _mm512_loadu_si512(from);
        scale[q] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        __m512 zero = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
        least[q] = _mm512_fnmadd_ps(_mm512_set1_ps(8), scale[q], zero);
      }
      for (long m = 0; m < rows; m++) {
        const Group& mine = xs[m * groups + g];
        __m512i coarse[4] = {}, fine[4] = {};
        for (long j = 0; j < GROUP; j += 4) {
          int four[2];
          memcpy(four, mine.coarse + j, 4), memcpy(four + 1, mine.fine + j, 4);
          for (int q = 0; q < 4; q++) {
            coarse[q] = _mm512_dpbusd_epi32(coarse[q], values[j + q], _mm512_set1_epi32(four[0]));
            fine[q] = _mm512_dpbusd_epi32(fine[q], values[j + q], _mm512_set1_epi32(four[1]));
          }
        }
        const __m512 step = _mm512_set1_ps(mine.step), sum = _mm512_set1_ps(mine.sum);
        for (int q = 0; q < 4; q++) {
          __m512 both = _mm512_fmadd_ps(_mm512_cvtepi32_ps(fine[q]), _mm512_set1_ps(1 / 254.f),
                                        _mm512_cvtepi32_ps(coarse[q]));
          sums[m][q] = _mm512_fmadd_ps(_mm512_mul_ps(scale[q], step), both, sums[m][q]);
          sums[m][q] = _mm512_fmadd_ps(least[q], sum, sums[m][q]);
        }
      }
    }
    for (long m = 0; m < rows; m++) {
      float all[64];
      memcpy(all, sums[m], sizeof all);
      for (int i = 0; i < 64; i++) store(all[i], y + m * n + b * 64 + i);
    }
  }
}

extern "C" void float32_int4(const uint8_t* w, const uint32_t* scales, const float* x, float* y, long n, long k,
                          long rows, int threads) {
  int4_product(w, scales, x, y, n, k, rows, threads);
}
extern "C" void bfloat16_int4(const uint8_t* w, const uint32_t* scales, const uint16_t* x, uint16_t* y, long n, long k,
                           long rows, int threads) {
  int4_product(w, scales, x, y, n, k, rows, threads);
}
#endif
"""

_uses_kernel: contextvars.ContextVar[bool] = contextvars.ContextVar("uses_kernel", default=False)


@functools.lru_cache(1)
def kernel() -> ctypes.CDLL | None:
    """The compiled kernel; None where there is no compiler for it."""
    library = load_library("row_products", COMMON + SOURCE, (f"-DMAX_INT4_ROWS={MAX_INT4_ROWS}",))
    if library is None:
        return None
    for dtype in _DTYPES.values():
        function = getattr(library, dtype)
        function.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_long] * 3, ctypes.c_int]
        function.restype = None
    library.unpack_int4.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_long] * 4, ctypes.c_int]
    library.unpack_int4.restype = None
    if has_int4_products(library):
        for dtype in _DTYPES.values():
            function = getattr(library, f"{dtype}_int4")
            function.argtypes = [*[ctypes.c_void_p] * 4, *[ctypes.c_long] * 3, ctypes.c_int]
            function.restype = None
    return library


def has_int4_products(library: ctypes.CDLL | None) -> bool:
    """Whether the CPU has the instructions (AVX-512 VNNI and VBMI); weights are unpacked without them too."""
    return library is not None and hasattr(library, "float32_int4")


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


def int4_row_product(rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
    """`(rows, in)`, up to `MAX_INT4_ROWS`, with an `Int4Linear`'s weight -> `(rows, out)`; None if the kernel can't.

    Rows are rounded to 15 bits of the largest value in 64, much less than a bf16's rounding.
    """
    library = kernel()
    if not has_int4_products(library):
        return None
    rows = rows.contiguous() if rows.dtype in _DTYPES else rows.float().contiguous()
    output = rows.new_empty(len(rows), len(weight))
    getattr(library, f"{_DTYPES[rows.dtype]}_int4")(
        weight.data_ptr(),
        scale.data_ptr(),
        rows.data_ptr(),
        output.data_ptr(),
        *output.shape[1:],
        *rows.shape[::-1],
        torch.get_num_threads(),
    )
    return output


def unpack_int4(weight: torch.Tensor, scale: torch.Tensor, first: int, target: torch.Tensor) -> None:
    """An `Int4Linear`'s outputs from `first` on, both multiples of 64, into `target (in, outputs)` in bf16."""
    width, count = target.shape
    kernel().unpack_int4(
        weight.data_ptr(),
        scale.data_ptr(),
        target.data_ptr(),
        len(weight),
        width,
        first // 64,
        count // 64,
        torch.get_num_threads(),
    )


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
