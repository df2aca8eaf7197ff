"""Numbers of a weight -> the 8-bit and 4-bit codes and scales of `packed_linear`.

In one pass over the weight as it lies in its file, by a kernel that takes several GB a second and core, so that a
checkpoint is packed about as fast as it is read. Without a compiler, on other devices and for other dtypes torch makes
the same of it, to the bit.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from .cpp_kernels import COMMON, load_library
from .huge_pages import empty_in_huge_pages


# Of a 4-bit weight: columns that share scale and zero point; rows that lie side by side, as AVX-512 reads them.
GROUP, BLOCK = 64, 64
TINY = 1e-30

SOURCE = r"""
#include <sys/mman.h>
#include <unistd.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

static const long GROUP = 64, BLOCK = 64;
static const float TINY = 1e-30f;

typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
struct Half { uint16_t bits; };
struct Brain { uint16_t bits; };

// 16 numbers as floats
static inline Floats floats(const float* from) {
  Floats values;
  memcpy(&values, from, sizeof values);
  return values;
}
static inline Bits wide(const void* from) {
  Halves halves;
  memcpy(&halves, from, sizeof halves);
  return __builtin_convertvector(halves, Bits);
}
static inline Floats floats(const Brain* from) { return (Floats)(wide(from) << 16); }
static inline Floats floats(const Half* from) {
#ifdef __AVX512F__
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#else
  Bits bits = wide(from), size = (bits & 0x7fff) << 13;
  Bits special = (Bits)(size >= 0x0f800000u) & 0x7f800000u;  // infinities and NaN
  return (Floats)((Bits)((Floats)size * 0x1p112f) | special | (bits & 0x8000) << 16);
#endif
}

// The same of fewer
template <class Number>
static Floats floats_of_few(const Number* from, long count) {
  Number some[16] = {};
  memcpy(some, from, count * sizeof(Number));
  return floats(some);
}

static inline Ints most_of(Ints a, Ints b) { return a > b ? a : b; }
static inline int32_t most_of(Ints values) {
#ifdef __AVX512F__
  return _mm512_reduce_max_epi32((__m512i)values);
#else
  int32_t most = values[0];
  for (int lane = 1; lane < 16; lane++) most = std::max(most, (int32_t)values[lane]);
  return most;
#endif
}

// Floats as integers of the same order, NaN outermost, and back
static inline Ints ordered(Ints bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

// To the nearest bf16
static inline Bits rounded(Floats values) {
  const Bits bits = (Bits)values;
  return values == values ? (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u : 0x7fc00000u | Bits{};
}

static inline Floats inverse(Floats steps) { return 1 / (steps < TINY ? Floats{} + TINY : steps); }

// The last byte of each
static inline void narrow(Ints values, int8_t* to) {
#ifdef __AVX512F__
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)values));
#else
  for (int lane = 0; lane < 16; lane++) to[lane] = (int8_t)values[lane];
#endif
}

// What a mapped file has there comes into the page table in one go: a fault for every few pages takes longer than the
// work.
static void populate(const void* from, long bytes) {
#ifdef MADV_POPULATE_READ
  const uintptr_t begin = (uintptr_t)from & -(uintptr_t)getpagesize();
  madvise((void*)begin, (uintptr_t)from + bytes - begin, MADV_POPULATE_READ);
#endif
}

template <class Number>
static void in_8_bits(const Number* w, int8_t* codes, uint16_t* scales, long n, long k, long stride, float factor,
                      int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long start = 0; start < n; start += BLOCK) {
    const long stop = std::min(start + BLOCK, n);
    populate(w + start * stride, ((stop - start - 1) * stride + k) * sizeof(Number));
    for (long i = start; i < stop; i++) {
      const Number* row = w + i * stride;
      const long whole = k - k % 16;
      Floats last = {};  // what is left of a row, and zeros
      if (whole < k) last = floats_of_few(row + whole, k - whole);
      Ints largest = (Ints)(last * factor) & 0x7fffffff;
      for (long j = 0; j < whole; j += 16)
        largest = most_of(largest, (Ints)(floats(row + j) * factor) & 0x7fffffff);
      const Bits scale = rounded((Floats)(Ints{} + most_of(largest)) / 126.5f);
      scales[i] = scale[0] >> 16;
      const Floats scaling = inverse((Floats)scale);
      // Rounded to whole numbers, half to even, of which the last byte is the code
      const auto code = [&](Floats values) { return (Ints)(values * factor * scaling + 0x1.8p23f); };
      int8_t* to = codes + i * k;
      for (long j = 0; j < whole; j += 16) narrow(code(floats(row + j)), to + j);
      int8_t few[16];
      narrow(code(last), few);
      memcpy(to + whole, few, k - whole);
    }
  }
}

// See `unpack_int4` of `row_products`
template <class Number>
static void in_4_bits(const Number* w, uint8_t* codes, uint16_t* scales, long n, long k, long stride, float factor,
                      int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long b = 0; b < n / BLOCK; b++) {
    const Number* block = w + b * BLOCK * stride;
    populate(block, ((BLOCK - 1) * stride + k) * sizeof(Number));
    for (long g = 0; g < k / GROUP; g++) {
      Floats values[BLOCK][GROUP / 16];
      Ints ranges[2][BLOCK / 16];
      for (long i = 0; i < BLOCK; i++) {
        const Number* from = block + i * stride + g * GROUP;
        __builtin_prefetch(from + GROUP);
        __builtin_prefetch(from + GROUP + GROUP / 2);
        for (long q = 0; q < GROUP / 16; q++) values[i][q] = floats(from + 16 * q) * factor;
        Ints most = ordered((Ints)values[i][0]), least = ~most;
        for (long q = 1; q < GROUP / 16; q++) {
          Ints mine = ordered((Ints)values[i][q]);
          most = most_of(most, mine), least = most_of(least, ~mine);
        }
        ranges[0][i / 16][i % 16] = ~most_of(least), ranges[1][i / 16][i % 16] = most_of(most);
      }
      float scaling[BLOCK], middle[BLOCK];
      for (long i = 0; i < BLOCK / 16; i++) {
        const Floats least = (Floats)ordered(ranges[0][i]), most = (Floats)ordered(ranges[1][i]);
        const Bits step = rounded((most - least) / 15), zero = rounded(least + 8 * (Floats)step);
        const Bits pairs = step >> 16 | zero;
        memcpy(scales + (g * n + b * BLOCK + 16 * i) * 2, &pairs, sizeof pairs);
        const Floats mine = inverse((Floats)step);
        const Floats half = 8.5f - (Floats)zero * mine;  // a step, since whole numbers are made by truncation
        memcpy(scaling + 16 * i, &mine, sizeof mine), memcpy(middle + 16 * i, &half, sizeof half);
      }
      const Floats last = Floats{} + 15;
      const auto code = [&](long i, long q) {
        Floats value = values[i][q] * scaling[i] + middle[i];
        value = value > Floats{} ? value : Floats{};
        return __builtin_convertvector(value < last ? value : last, Ints);
      };
      // A word holds a column of eight rows: four in the low halves of its bytes, and the four 32 rows below.
      Ints words[BLOCK / 8][GROUP / 16];
      for (long i = 0; i < BLOCK / 8; i++)
        for (long q = 0; q < GROUP / 16; q++) {
          Ints word = {};
          for (long m = 0; m < 4; m++) {
            Ints both = code(4 * i + m, q) | code(4 * i + m + BLOCK / 2, q) << 4;
            word |= both << (8 * m);
          }
          words[i][q] = word;
        }
      int32_t* to = (int32_t*)(codes + (b * k + g * GROUP) * (BLOCK / 2));
      for (long j = 0; j < GROUP; j++)
        for (long i = 0; i < BLOCK / 8; i++) to[j * (BLOCK / 8) + i] = words[i][j / 16][j % 16];
    }
  }
}

#define FOR(NAME, NUMBER)                                                                                          \
  extern "C" void NAME##_8(const NUMBER* w, int8_t* codes, uint16_t* scales, long n, long k, long stride,          \
                           float factor, int threads) {                                                            \
    in_8_bits(w, codes, scales, n, k, stride, factor, threads);                                                    \
  }                                                                                                                \
  extern "C" void NAME##_4(const NUMBER* w, uint8_t* codes, uint16_t* scales, long n, long k, long stride,         \
                           float factor, int threads) {                                                            \
    in_4_bits(w, codes, scales, n, k, stride, factor, threads);                                                    \
  }
FOR(float32, float)
FOR(float16, Half)
FOR(bfloat16, Brain)
"""


@functools.lru_cache(1)
def kernel() -> ctypes.CDLL | None:
    """The compiled kernel; None where there is no compiler for it."""
    types = [*[ctypes.c_void_p] * 3, *[ctypes.c_long] * 3, ctypes.c_float, ctypes.c_int]
    functions = {f"{dtype}_{bits}": types for dtype in _DTYPES.values() for bits in (8, 4)}
    # Torch rounds after every operation: none may be fused.
    return load_library("weight_packing", COMMON + SOURCE, functions, ("-ffp-contract=off",))


_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def quantize_weight(weight: torch.Tensor, bits: int, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """`(outputs, inputs)` -> `weight`, `scale` of an `Int8Linear` or `Int4Linear`, times `factor`.

    No other copy of the weight is made.

    Raises:
        ValueError: if it is to have 4 bits, and its sizes aren't multiples of 64.
    """
    outputs, inputs = weight.shape
    if bits == 8:
        kinds = ((outputs, inputs), torch.int8), ((outputs,), torch.bfloat16)
    else:
        kinds = ((outputs, inputs // 2), torch.uint8), ((inputs // GROUP, outputs, 2), torch.bfloat16)
    is_on_cpu = weight.device.type == "cpu"
    empty = empty_in_huge_pages if is_on_cpu else functools.partial(torch.empty, device=weight.device)
    packed, scale = (empty(shape, dtype=dtype) for shape, dtype in kinds)
    quantize_into(weight, packed, scale, factor)
    return packed, scale


def quantize_into(weight: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, factor: float = 1.0) -> None:
    """See [`quantize_weight`]; its results are given.

    Raises:
        ValueError: if they have other sizes than the weight's.
    """
    (outputs, inputs), bits = weight.shape, 8 if packed.dtype == torch.int8 else 4
    if bits == 4 and (outputs % BLOCK or inputs % GROUP):
        raise ValueError(
            f"4-bit weights need multiples of {GROUP} inputs and {BLOCK} outputs, not {inputs} and {outputs}: keep "
            "this layer out, or take 8 bits."
        )
    width, scale_shape = (inputs, (outputs,)) if bits == 8 else (inputs // 2, (inputs // GROUP, outputs, 2))
    if packed.shape != (outputs, width) or scale.shape != scale_shape:
        sizes = [" x ".join(map(str, tensor.shape)) for tensor in (weight, packed, scale)]
        raise ValueError(
            f"A weight of {sizes[0]} doesn't fit into {bits}-bit codes of {sizes[1]} with scales of {sizes[2]}: the "
            "checkpoint's sizes aren't the configuration's."
        )
    is_plain = weight.device.type == "cpu" and weight.dtype in _DTYPES and weight.stride(1) == 1
    is_plain = is_plain and packed.is_contiguous() and scale.is_contiguous()
    library = kernel() if is_plain else None
    if library is None:
        _quantize_by_torch(weight, packed, scale, factor)
        return
    pointers = [tensor.data_ptr() for tensor in (weight, packed, scale)]
    sizes = outputs, inputs, weight.stride(0)
    getattr(library, f"{_DTYPES[weight.dtype]}_{bits}")(*pointers, *sizes, factor, torch.get_num_threads())


def _quantize_by_torch(weight: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, factor: float) -> None:
    """In pieces of `BLOCK` rows, which stay in the caches."""
    quantize_rows = _rows_in_8_bits if packed.dtype == torch.int8 else _rows_in_4_bits
    wide, scratch = torch.empty(2, BLOCK, weight.shape[1], device=weight.device)
    for start in range(0, len(weight), BLOCK):
        rows = slice(start, start + BLOCK)
        count = len(weight[rows])
        values = wide[:count].copy_(weight[rows])
        if factor != 1:
            values.mul_(factor)
        quantize_rows(values, scratch[:count], packed[rows], scale[rows] if scale.ndim == 1 else scale[:, rows])


def _rows_in_8_bits(values: torch.Tensor, scratch: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> None:
    # Codes belong to the rounded scale, so that its rounding costs nothing; it is too large by more than that.
    scale.copy_(torch.abs(values, out=scratch).amax(1).div_(126.5))
    packed.copy_(values.mul_(scale.float().clamp(min=TINY).reciprocal()[:, None]).round_())


def _rows_in_4_bits(values: torch.Tensor, scratch: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> None:
    groups = values.view(BLOCK, -1, GROUP)
    least = groups.amin(-1).T
    scale[..., 0] = (groups.amax(-1).T - least) / 15
    steps = scale[..., 0].float()
    scale[..., 1] = least + 8 * steps
    inverse = steps.clamp(min=TINY).reciprocal()
    middle = 8.5 - scale[..., 1].float() * inverse  # half a step, since whole numbers are made by truncation
    groups.mul_(inverse.T[..., None]).add_(middle.T[..., None])
    codes = scratch.view(torch.int8).view(-1)[: values.numel()].view_as(values).copy_(values.clamp_(0, 15))
    low, high = codes.view(torch.uint8).split(BLOCK // 2)
    packed.view(-1, BLOCK // 2).copy_(high.mul_(16).add_(low).T)


__all__ = ["quantize_into", "quantize_weight"]
