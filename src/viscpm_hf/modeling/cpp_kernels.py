"""Kernels of our own for CPUs: C++ that the machine's compiler makes in a second, kept on the disk.

Their sources are texts in Python modules, since an exported folder's remote code is Python modules alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)

# No -ffast-math: loading such a library would flush the denormal numbers of the whole process.
# Vectors of aligned numbers are C++17.
FLAGS = ("-O3", "-std=gnu++17", "-march=native", "-fopenmp", "-shared", "-fPIC")

# What several kernels begin with: 16 numbers at a time, and bf16.
COMMON = r"""
#include <algorithm>
#include <cmath>
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
  memcpy(&pair.even, from, sizeof pair.even);  // each by one instruction
  memcpy(&pair.odd, from + 16, sizeof pair.odd);
  return pair;
}
static inline void store(float value, float* to) { *to = value; }
static inline void store(float value, uint16_t* to) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  *to = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
"""


def cpp_compiler() -> str | None:
    """The machine's C++ compiler, `CXX` first."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "cl"]
    return next((name for name in names if shutil.which(name)), None)


def load_library(
    name: str, source: str, functions: Mapping[str, Sequence[Any]] | None = None, flags: tuple[str, ...] = ()
) -> ctypes.CDLL | None:
    """Compiles `source`, or finds what was compiled of it before on this kind of machine in `TORCH_EXTENSIONS_DIR`.

    Args:
        functions: the types of their arguments by name; the library may lack some of them, those of instructions that
            the CPU doesn't have.

    Returns None, with a warning if compiling failed, where there is no compiler for it. Callers keep the result.
    """
    library = _load(name, source, (*FLAGS, *flags))
    for function, types in (functions or {}).items():
        if hasattr(library, function):
            getattr(library, function).argtypes, getattr(library, function).restype = types, None
    return library


def _load(name: str, source: str, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    compiler = cpp_compiler()
    if compiler is None or platform.system() != "Linux":
        return None
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        # "CPU ...", "Features": on ARM
        machine = sorted({line for line in lines if any(it in line for it in ("name", "flags", "CPU ", "Features"))})
        made_of = hashlib.sha256("\n".join([source, compiler, *flags, *machine]).encode()).hexdigest()[:16]
        cache = Path(os.path.expanduser(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"))
        file = cache / "viscpm_hf" / f"{name}_{made_of}.so"
        if file.is_file():
            return ctypes.CDLL(os.fspath(file))
        with contextlib.ExitStack() as until_loaded:
            try:
                if not cache.is_absolute():
                    raise OSError("there is no home folder")
                file.parent.mkdir(parents=True, exist_ok=True)
                folder = until_loaded.enter_context(tempfile.TemporaryDirectory(dir=file.parent))
            except OSError as error:
                logger.info(f"The CPU kernel `{name}` can't be kept on the disk: {error}")
                folder = until_loaded.enter_context(tempfile.TemporaryDirectory())
                file = Path(folder, file.name)
            _compile([compiler, *flags], source, Path(folder), file)
            return ctypes.CDLL(os.fspath(file))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        logger.warning(f"The CPU goes without our own kernel `{name}`: {' '.join(reason.split())[:300]}")
        return None


def _compile(command: list[str], source: str, folder: Path, target: Path) -> None:
    file, made = folder / "kernel.cpp", folder / "made.so"
    file.write_text(source, "utf-8")
    command = [*command, os.fspath(file), "-o", os.fspath(made)]
    subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
    made.replace(target)  # another process may be at the same
