"""Products of few rows on a CPU, at the speed at which the memory delivers the weights.

Decoding multiplies one row, or the few of a beam search, with every weight. Libraries are made for many rows: in
bf16 they reach half of the memory's bandwidth with one. Here are two cures: `mv`, which needs nothing, and a kernel of
our own, compiled in a second or two by the machine's C++ compiler and kept on the disk. The same kernel multiplies and
unpacks the weights of `packed_linear`. A third cure is `huge_pages`.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import nn

from .cpp_kernels import COMMON, load_library


# Above, libraries are as fast; the same of packed weights.
MAX_ROWS, MAX_PACKED_ROWS = 4, {8: 16, 4: 48}
# What the kernel takes in one go along the width.
STEP = 32
NUMBERS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# Of weights, in the names of the kernels' functions.
KINDS = ("", "_int8", "_int4")

SOURCE = (
    COMMON
    + f"static const long MAX_INT4_ROWS = {MAX_PACKED_ROWS[4]};"
    + r"""
#include <omp.h>

// 32 floats in the order in which `load` has those of a Number.
template <class Number>
static inline Pair arranged(const float* from) {
  Pair pair = load(from);
  if (sizeof(Number) == 2)
    for (int lane = 0; lane < 16; lane++) pair.even[lane] = from[2 * lane], pair.odd[lane] = from[2 * lane + 1];
  return pair;
}
static inline float number(float value) { return value; }
static inline float number(uint16_t value) {
  uint32_t bits = (uint32_t)value << 16;
  float number;
  memcpy(&number, &bits, 4);
  return number;
}
static inline float total(const Floats& values) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  Eight halves[2];
  memcpy(halves, &values, sizeof halves);
  halves[0] += halves[1];
  Four quarters[2];
  memcpy(quarters, halves, sizeof quarters);
  quarters[0] += quarters[1];
  return (quarters[0][0] + quarters[0][1]) + (quarters[0][2] + quarters[0][3]);
}

// The share of `n` outputs, in whole units, that is a thread's.
struct Range { long from, to; };
static inline Range share(long n, long unit) {
  const long units = (n + unit - 1) / unit, threads = omp_get_num_threads(), me = omp_get_thread_num();
  return {units * me / threads * unit, std::min(n, units * (me + 1) / threads * unit)};
}

// How many bytes ahead the weights are asked for. Not a whole page, whose lines would share places of the cache.
static const long AHEAD = 3072;

// Each kind of weight has a `prepare` for rows x (rows, k) and a `multiply`, which makes the outputs of a range of
// y (rows, n) = x . w (n, k)^T.
template <int ROWS, class Number>
struct Plain {
  static const long UNIT = 16;
  std::vector<Pair> rows;
  long k;

  void prepare(const float* x, long, long width) {
    k = width;
    rows.resize(ROWS * k / 32);
    for (long i = 0; i < ROWS * k / 32; i++) rows[i] = arranged<Number>(x + 32 * i);
  }
  template <class Out>
  void multiply(const void* weight, const void*, Out* y, long n, Range range) const {
    const Number* w = (const Number*)weight;
    const Pair* xs = rows.data();
    const long ahead = AHEAD / sizeof(Number), line = 64 / sizeof(Number);
    for (long i = range.from; i < range.to; i++) {
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
      for (int m = 0; m < ROWS; m++) store(total(sums[m] + others[m]), y + m * n + i);
    }
  }
};

// 4-bit weights: blocks of 64 outputs, (n / 64, k, 32) bytes, the first 32 outputs in the low halves; `scales`
// (k / 64, n) pairs of bf16, so that a value is (code - 8) * first + second.
static const long GROUP = 64;

typedef int32_t Codes __attribute__((vector_size(64)));

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define HAS_PACKED
#include <immintrin.h>

// Rows are step * (coarse + fine / 254) with two digits of 8 bits; counts are multiples of 16.
static inline void digits_of(const float* x, long count, float step, int8_t* coarse, int8_t* fine) {
  const __m512 inverse = _mm512_set1_ps(1 / step);
  for (long i = 0; i < count; i += 16) {
    __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + i), inverse), whole = _mm512_roundscale_ps(scaled, 0);
    __m512 rest = _mm512_mul_ps(_mm512_sub_ps(scaled, whole), _mm512_set1_ps(254));
    _mm_storeu_si128((__m128i*)(coarse + i), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(whole)));
    _mm_storeu_si128((__m128i*)(fine + i), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(rest)));
  }
}
static inline float step_of(const float* x, long count) {
  __m512 largest = _mm512_set1_ps(1e-30f);
  for (long i = 0; i < count; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
  return _mm512_reduce_max_ps(largest) / 127;
}

// 8-bit weights: (n, k) codes, `scales` (n,) in bf16.
struct Int8 {
  static const long UNIT = 16;
  std::vector<int8_t> digits;  // of each row the coarse ones, then the fine ones
  std::vector<float> steps;
  std::vector<int32_t> sums;
  long rows, k;

  void prepare(const float* x, long count, long width) {
    rows = count, k = width;
    digits.resize(2 * rows * k), steps.resize(rows), sums.resize(2 * rows);
    for (long m = 0; m < rows; m++) {
      int8_t* mine = digits.data() + 2 * m * k;
      steps[m] = step_of(x + m * k, k);
      digits_of(x + m * k, k, steps[m], mine, mine + k);
      for (int fine = 0; fine < 2; fine++) {
        int32_t sum = 0;
        for (long j = 0; j < k; j++) sum += mine[fine * k + j];
        sums[2 * m + fine] = sum;
      }
    }
  }
  template <int ROWS, class Out>
  void multiply_rows(const uint8_t* w, const uint16_t* scales, Out* y, long n, Range range, long first) const {
    const __m512i middle = _mm512_set1_epi8((char)128);
    const int8_t* xs = digits.data() + 2 * first * k;
    for (long i = range.from; i < range.to; i++) {
      __m512i coarse[ROWS] = {}, fine[ROWS] = {};
      const uint8_t* row = w + i * k;
      for (long j = 0; j < k; j += 64) {
        __builtin_prefetch(row + j + AHEAD);
        // The instruction wants one side without signs.
        const __m512i codes = _mm512_xor_si512(_mm512_loadu_si512(row + j), middle);
        for (int m = 0; m < ROWS; m++) {
          coarse[m] = _mm512_dpbusd_epi32(coarse[m], codes, _mm512_loadu_si512(xs + 2 * m * k + j));
          fine[m] = _mm512_dpbusd_epi32(fine[m], codes, _mm512_loadu_si512(xs + (2 * m + 1) * k + j));
        }
      }
      for (int m = 0; m < ROWS; m++) {
        const int32_t* sum = sums.data() + 2 * (first + m);
        float whole = _mm512_reduce_add_epi32(coarse[m]) - 128 * sum[0];
        float rest = _mm512_reduce_add_epi32(fine[m]) - 128 * sum[1];
        store((whole + rest / 254) * steps[first + m] * number(scales[i]), y + (first + m) * n + i);
      }
    }
  }
  template <class Out>
  void multiply(const void* weight, const void* scale, Out* y, long n, Range all) const {
    const uint8_t* w = (const uint8_t*)weight;
    const uint16_t* scales = (const uint16_t*)scale;
    // Of many rows some at a time, while the weights of some outputs are in the cache.
    const long piece = rows > 4 ? UNIT : n;
    for (Range range{all.from, 0}; range.from < all.to; range.from = range.to) {
      range.to = std::min(all.to, range.from + piece);
      for (long m = 0; m < rows; m += 4)
        switch (rows - m) {
          case 1: multiply_rows<1>(w, scales, y, n, range, m); break;
          case 2: multiply_rows<2>(w, scales, y, n, range, m); break;
          case 3: multiply_rows<3>(w, scales, y, n, range, m); break;
          default: multiply_rows<4>(w, scales, y, n, range, m);
        }
    }
  }
};

struct Int4 {
  static const long UNIT = 64;
  struct Group {
    int8_t coarse[GROUP], fine[GROUP];
    float step, sum;
  };
  std::vector<Group> digits;
  long rows, k;

  void prepare(const float* x, long count, long width) {
    rows = count, k = width;
    digits.resize(rows * k / GROUP);
    for (long i = 0; i < rows * k / GROUP; i++) {
      Group& group = digits[i];
      const float* from = x + i * GROUP;
      group.step = step_of(from, GROUP);
      digits_of(from, GROUP, group.step, group.coarse, group.fine);
      __m512 sum = _mm512_setzero_ps();
      for (long j = 0; j < GROUP; j += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(from + j));
      group.sum = _mm512_reduce_add_ps(sum);
    }
  }
  template <class Out>
  void multiply(const void* weight, const void* scale, Out* y, long n, Range range) const {
    const uint8_t* w = (const uint8_t*)weight;
    const uint32_t* scales = (const uint32_t*)scale;
    const long groups = k / GROUP;
    const Group* xs = digits.data();
    // Two inputs of 32 outputs each -> pairs of inputs, so that four of them come together for an output below.
    alignas(64) uint8_t places[64];
    for (int i = 0; i < 64; i++) places[i] = i / 16 * 4 + i / 2 % 4 + i / 8 % 2 * 16 + i % 2 * 32;
    const __m512i order = _mm512_load_si512(places), low = _mm512_set1_epi8(15);
    for (long b = range.from / 64; b < range.to / 64; b++) {
      __m512 sums[MAX_INT4_ROWS][4];
      for (long m = 0; m < rows; m++)
        for (int q = 0; q < 4; q++) sums[m][q] = _mm512_setzero_ps();
      for (long g = 0; g < groups; g++) {
        const uint8_t* codes = w + (b * k + g * GROUP) * 32;
        __m512i values[GROUP];
        for (long j = 0; j < GROUP; j += 4) {
          __m512i one = _mm512_loadu_si512(codes + 32 * j), other = _mm512_loadu_si512(codes + 32 * j + 64);
          __builtin_prefetch(codes + 32 * j + AHEAD);
          __builtin_prefetch(codes + 32 * j + AHEAD + 64);
          one = _mm512_permutexvar_epi8(order, one), other = _mm512_permutexvar_epi8(order, other);
          __m512i first = _mm512_unpacklo_epi16(one, other), second = _mm512_unpackhi_epi16(one, other);
          values[j] = _mm512_and_si512(first, low), values[j + 1] = _mm512_and_si512(second, low);
          values[j + 2] = _mm512_and_si512(_mm512_srli_epi16(first, 4), low);
          values[j + 3] = _mm512_and_si512(_mm512_srli_epi16(second, 4), low);
        }
        __m512 factor[4], least[4];
        const long later = g + 2 < groups ? (g + 2) * n : (g + 2 - groups) * n + 64;  // perhaps in the next block
        const uint32_t* soon = scales + later + b * 64;
        for (int q = 0; q < 4; q++) {
          const uint32_t* from = scales + g * n + b * 64 + 16 * q;
          __builtin_prefetch(soon + 16 * q);
          __m512i both = _mm512_loadu_si512(from);
          factor[q] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
          __m512 zero = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
          least[q] = _mm512_fnmadd_ps(_mm512_set1_ps(8), factor[q], zero);
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
            sums[m][q] = _mm512_fmadd_ps(_mm512_mul_ps(factor[q], step), both, sums[m][q]);
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
};
#endif
"""
)

EXPORTS = r"""
template <class Product, class Number>
static void product(const void* w, const void* scales, const Number* x, Number* y, long n, long k, long rows,
                    int threads) {
  static thread_local std::vector<float> wide;
  static thread_local Product prepared;
  wide.resize(rows * k);
  for (long i = 0; i < rows * k; i++) wide[i] = number(x[i]);
  prepared.prepare(wide.data(), rows, k);
  const Product& mine = prepared;  // of the calling thread
#pragma omp parallel num_threads(threads)
  mine.multiply(w, scales, y, n, share(n, Product::UNIT));
}

template <class Number>
static void plain(const void* w, const Number* x, Number* y, long n, long k, long rows, int threads) {
  switch (rows) {
    case 1: return product<Plain<1, Number>>(w, nullptr, x, y, n, k, rows, threads);
    case 2: return product<Plain<2, Number>>(w, nullptr, x, y, n, k, rows, threads);
    case 3: return product<Plain<3, Number>>(w, nullptr, x, y, n, k, rows, threads);
    case 4: return product<Plain<4, Number>>(w, nullptr, x, y, n, k, rows, threads);
  }
}
#define EXPORTED(NAME, NUMBER, ...)                                                                                \
  extern "C" void NAME(const void* w, const void* scales, const NUMBER* x, NUMBER* y, long n, long k, long rows,   \
                       int threads) {                                                                              \
    __VA_ARGS__;                                                                                                   \
  }
EXPORTED(float32, float, plain(w, x, y, n, k, rows, threads))
EXPORTED(bfloat16, uint16_t, plain(w, x, y, n, k, rows, threads))
#ifdef HAS_PACKED
EXPORTED(float32_int8, float, product<Int8>(w, scales, x, y, n, k, rows, threads))
EXPORTED(bfloat16_int8, uint16_t, product<Int8>(w, scales, x, y, n, k, rows, threads))
EXPORTED(float32_int4, float, product<Int4>(w, scales, x, y, n, k, rows, threads))
EXPORTED(bfloat16_int4, uint16_t, product<Int4>(w, scales, x, y, n, k, rows, threads))
#endif

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
        __builtin_prefetch(codes + 32 * j + AHEAD);
        Bits both = (Bits)__builtin_convertvector(bytes, Halves);
        Bits made[2] = {values_of(both, scale[0], least[0]), values_of(both >> 4, scale[1], least[1])};
        memcpy(to + ((g * GROUP + j) * blocks + b) * 64, made, sizeof made);
      }
    }
}
"""


@functools.lru_cache(1)
def kernel() -> ctypes.CDLL | None:
    """The compiled kernel; None where there is no compiler for it."""
    products = [*[ctypes.c_void_p] * 4, *[ctypes.c_long] * 3, ctypes.c_int]
    functions = {f"{dtype}{kind}": products for dtype in NUMBERS.values() for kind in KINDS}
    unpacking = [*[ctypes.c_void_p] * 3, *[ctypes.c_long] * 4, ctypes.c_int]
    return load_library("row_products", SOURCE + EXPORTS, functions | {"unpack_int4": unpacking})


def has_packed_products(library: ctypes.CDLL | None) -> bool:
    """Whether the CPU has the instructions (AVX-512 VNNI and VBMI); weights are unpacked without them too."""
    return library is not None and hasattr(library, "float32_int4")


class RowLinear(nn.Linear):
    """An `nn.Linear` that knows what is fast for few rows on a CPU. Elsewhere, and trained or compiled, just that."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        rows = hidden_states.numel() // weight.shape[1] if weight.shape[1] else 0
        if (
            rows > MAX_ROWS
            or rows < 1
            or torch.is_grad_enabled()
            or not can_be_read(hidden_states)
            or hidden_states.shape[-1] != weight.shape[1]
            or type(weight) is not nn.Parameter
            or weight.device.type != "cpu"
            or weight.dtype != hidden_states.dtype
            or torch.is_autocast_enabled("cpu")
            or self.bias is not None
        ):
            return super().forward(hidden_states)
        if is_for_kernel(self) and kernel() is not None:
            return row_product(hidden_states, weight)
        if rows == 1 and weight.dtype == torch.bfloat16:
            return torch.mv(weight, hidden_states.reshape(-1)).view(*hidden_states.shape[:-1], -1)
        return super().forward(hidden_states)


def can_be_read(tensor: torch.Tensor) -> bool:
    """Whether a kernel can take the tensor's numbers, on the CPU, and no graph is made of what happens to it."""
    is_recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not is_recorded and type(tensor) is torch.Tensor and tensor.device.type == "cpu"


def is_for_kernel(linear: nn.Linear) -> bool:
    """Whether the kernel is made for the layer's weights."""
    weight = linear.weight
    return (
        isinstance(linear, RowLinear)
        and type(weight) is nn.Parameter
        and weight.dtype in NUMBERS
        and weight.shape[1] % STEP == 0
        and weight.is_contiguous()
    )


def use_row_products(*modules: nn.Module) -> None:
    """Makes the plain linear layers in modules [`RowLinear`]s."""
    for module in modules:
        for layer in module.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = RowLinear


def row_product(
    rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None, kind: str = ""
) -> torch.Tensor:
    """By the kernel, `(..., in)`, up to `MAX_ROWS` or `MAX_PACKED_ROWS`, with a weight of so many outputs ->
    `(..., out)`.

    Args:
        scale: of a packed weight.
        kind: `_int8` or `_int4` for a packed weight. Rows are then rounded to 15 bits of the largest value in the row
            or in 64 of it, much less than a bf16's rounding.
    """
    rows = rows.contiguous() if rows.dtype in NUMBERS else rows.float().contiguous()
    output = rows.new_empty(*rows.shape[:-1], len(weight))
    getattr(kernel(), NUMBERS[rows.dtype] + kind)(
        weight.data_ptr(),
        None if scale is None else scale.data_ptr(),
        rows.data_ptr(),
        output.data_ptr(),
        len(weight),
        rows.shape[-1],
        rows.numel() // rows.shape[-1],
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


__all__ = ["RowLinear", "kernel", "row_product", "use_row_products"]
