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
    + f"static const long MAX_INT8_ROWS = {MAX_PACKED_ROWS[8]}, MAX_INT4_ROWS = {MAX_PACKED_ROWS[4]};"
    + r"""
#include <atomic>
#include <linux/futex.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

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

// Where a team's threads wait for each other. OpenMP's own barrier turns for some 10 ms, and beside any other process,
// which has one of the cores, nearly always keeps the thread that is waited for from running.
class Barrier {
  static const int TURNS = 4000;  // some 200 us
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> round{0};
  std::atomic<int> asleep{0};

 public:
  void wait() {
    const int now = round, threads = omp_get_num_threads();
    if (++arrived == threads) {
      arrived = 0;
      round++;
      if (asleep) syscall(SYS_futex, &round, FUTEX_WAKE_PRIVATE, threads, nullptr, nullptr, 0);
      return;
    }
    for (int i = 0; i < TURNS; i++) {
      if (round != now) return;
#ifdef __x86_64__
      __builtin_ia32_pause();
#endif
    }
    asleep++;
    while (round == now) syscall(SYS_futex, &round, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0);
    asleep--;
  }
};

// How many bytes ahead the weights are asked for. Not a whole page, whose lines would share places of the cache.
static const long AHEAD = 3072;

// Each kind of weight has a `prepare` for rows x (rows, k) and a `multiply`, which makes the outputs of a range of
// y (rows, n) = x . w (n, k)^T.
template <int ROWS, class Number>
struct Plain {
  static constexpr long UNIT = 16;
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
#ifdef __AMX_INT8__
// Linux lets a process use the registers of AMX that asks for them (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
static const bool HAS_TILES = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
static const bool HAS_TILES = false;
#endif

// Rows are step * (coarse + fine / 254) with two digits of 8 bits: lines of every row's coarse digits and of its fine
// ones, of each group of columns all lines together, sixteen or a multiple if there are many, or one after another.
struct Digits {
  struct alignas(64) Line { int8_t digits[GROUP]; };
  std::vector<Line> lines;
  long rows, groups, group_stride, line_stride;

  void resize(long count, long width, bool in_groups) {
    rows = count, groups = width / GROUP;
    group_stride = !in_groups ? 1 : rows > 4 ? (2 * rows + 15) / 16 * 16 : 2 * rows;
    line_stride = in_groups ? 1 : groups;
    lines.resize(in_groups ? group_stride * groups : 2 * rows * groups);
  }
  const Line* at(long group, long line) const { return lines.data() + group * group_stride + line * line_stride; }
  void fill(long group, long row, const float* x, float step) {
    Line *coarse = (Line*)at(group, 2 * row), *fine = coarse + line_stride;
    const __m512 inverse = _mm512_set1_ps(1 / step);
    for (long i = 0; i < GROUP; i += 16) {
      __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + i), inverse), whole = _mm512_roundscale_ps(scaled, 0);
      __m512 rest = _mm512_mul_ps(_mm512_sub_ps(scaled, whole), _mm512_set1_ps(254));
      _mm_store_si128((__m128i*)(coarse->digits + i), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(whole)));
      _mm_store_si128((__m128i*)(fine->digits + i), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(rest)));
    }
  }
};
static inline float step_of(const float* x, long count) {
  // As whole numbers, of which NaN is the largest: who has one becomes NaN.
  __m512i largest = _mm512_castps_si512(_mm512_set1_ps(1e-30f));
  for (long i = 0; i < count; i += 16)
    largest = _mm512_max_epi32(largest, _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(x + i))));
  const int bits = _mm512_reduce_max_epi32(largest);
  float step;
  memcpy(&step, &bits, 4);
  return step / 127;
}

// Sums of this type stay where they are; of the intrinsic's own one compilers make copies.
static inline void add_dots(Codes& sums, __m512i codes, __m512i digits) {
  sums = (Codes)_mm512_dpbusd_epi32((__m512i)sums, codes, digits);
}

// Codes of 64 outputs, without signs: (groups, 4, 16) vectors, each of four columns of 16 outputs. Here their products
// with some rows' digits are added to sums, four vectors a line, which begin at 0 if they are fresh.
template <int LINES>
static inline void add_some(const __m512i* codes, const Digits& digits, long group, long groups, long row,
                            __m512i (*sums)[4], bool fresh) {
  Codes found[LINES][4];
#pragma GCC unroll 6
  for (int l = 0; l < LINES; l++)
    for (int q = 0; q < 4; q++) found[l][q] = fresh ? Codes{} : (Codes)sums[l][q];
  for (const __m512i* last = codes + groups * 64; codes < last; codes += 64) {
    const Digits::Line* lines = digits.at(group++, 2 * row);
#pragma GCC unroll 1
    for (int j = 0; j < 16; j++)
#pragma GCC unroll 6
      for (int l = 0; l < LINES; l++) {
        int four;
        memcpy(&four, lines[l].digits + 4 * j, 4);
        for (int q = 0; q < 4; q++) add_dots(found[l][q], codes[q * 16 + j], _mm512_set1_epi32(four));
      }
  }
#pragma GCC unroll 6
  for (int l = 0; l < LINES; l++)
    for (int q = 0; q < 4; q++) sums[l][q] = (__m512i)found[l][q];
}

// The same by AMX, of eight rows.
struct Tiles {
  const bool used;
#ifdef __AMX_INT8__
  // GCC's intrinsics don't tell that they read memory: what is written to it must be there before them.
  static inline void finish_writing(const void* read) { __asm__ volatile("" ::"r"(read) : "memory"); }
  explicit Tiles(bool wanted) : used(wanted && HAS_TILES) {
    alignas(64) uint8_t all[64] = {1};  // eight of 16 lines of 64 bytes
    for (int i = 0; i < 8; i++) all[16 + 2 * i] = 64, all[48 + i] = 16;
    finish_writing(all);
    if (used) _tile_loadconfig(all);
  }
  ~Tiles() { if (used) _tile_release(); }
  static inline void add(const __m512i* codes, const Digits& digits, long group, long groups, long row,
                         __m512i (*sums)[4], bool fresh) {
    finish_writing(codes);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (!fresh) {
      _tile_loadd(0, sums[0], 256);
      _tile_loadd(1, sums[0] + 1, 256);
      _tile_loadd(2, sums[0] + 2, 256);
      _tile_loadd(3, sums[0] + 3, 256);
    }
    for (const __m512i* last = codes + groups * 64; codes < last; codes += 64) {
      _tile_loadd(4, digits.at(group++, 2 * row), 64);
      _tile_loadd(5, codes, 64);
      _tile_dpbsud(0, 4, 5);
      _tile_loadd(6, codes + 16, 64);
      _tile_dpbsud(1, 4, 6);
      _tile_loadd(7, codes + 32, 64);
      _tile_dpbsud(2, 4, 7);
      _tile_loadd(5, codes + 48, 64);
      _tile_dpbsud(3, 4, 5);
    }
    _tile_stored(0, sums[0], 256);
    _tile_stored(1, sums[0] + 1, 256);
    _tile_stored(2, sums[0] + 2, 256);
    _tile_stored(3, sums[0] + 3, 256);
  }
#else
  explicit Tiles(bool) : used(false) {}
  static void add(const __m512i*, const Digits&, long, long, long, __m512i (*)[4], bool) {}
#endif
};

// Of all rows; sums have a multiple of 16 lines.
static inline void add_products(const Tiles& tiles, const __m512i* codes, const Digits& digits, long group,
                                long groups, __m512i (*sums)[4], bool fresh) {
  for (long m = 0; m < digits.rows;) {
    const long left = digits.rows - m;
    __m512i(*mine)[4] = sums + 2 * m;
    if (tiles.used) Tiles::add(codes, digits, group, groups, m, mine, fresh), m += 8;
    else if (left == 1) add_some<2>(codes, digits, group, groups, m, mine, fresh), m += 1;
    else if (left == 2 || left == 4) add_some<4>(codes, digits, group, groups, m, mine, fresh), m += 2;
    else add_some<6>(codes, digits, group, groups, m, mine, fresh), m += 3;
  }
}
// 8-bit weights: (n, k) codes, `scales` (n,) in bf16.
struct Int8 {
  static constexpr long UNIT = 64, CHUNK = 4, FEW = 6;
  Digits digits;
  std::vector<float> steps;
  std::vector<int32_t> sums;

  void prepare(const float* x, long rows, long k) {
    digits.resize(rows, k, rows > FEW), steps.resize(rows), sums.assign(2 * rows, 0);
    for (long m = 0; m < rows; m++) {
      steps[m] = step_of(x + m * k, k);
      for (long g = 0; g < k / GROUP; g++) {
        digits.fill(g, m, x + m * k + g * GROUP, steps[m]);
        for (long line = 2 * m; line < 2 * m + 2; line++)
          for (int8_t digit : digits.at(g, line)->digits) sums[line] += digit;
      }
    }
  }
  template <class Out>
  void put(int32_t coarse, int32_t fine, float scale, Out* y, long n, long m, long i) const {
    float whole = coarse - 128 * sums[2 * m], rest = fine - 128 * sums[2 * m + 1];
    store((whole + rest / 254) * steps[m] * scale, y + m * n + i);
  }
  template <int ROWS, class Out>
  void multiply_rows(const uint8_t* w, const uint16_t* scales, Out* y, long n, Range range, long first) const {
    const __m512i middle = _mm512_set1_epi8((char)128);
    const long k = digits.groups * GROUP, next = digits.line_stride;
    for (long i = range.from; i < range.to; i++) {
      Codes coarse[ROWS] = {}, fine[ROWS] = {};
      const uint8_t* row = w + i * k;
      const Digits::Line* lines = digits.at(0, 2 * first);
      for (long j = 0; j < k; j += GROUP, lines += digits.group_stride) {
        __builtin_prefetch(row + j + AHEAD);
        // The instruction wants one side without signs.
        const __m512i codes = _mm512_xor_si512(_mm512_loadu_si512(row + j), middle);
        for (int m = 0; m < ROWS; m++) {
          add_dots(coarse[m], codes, _mm512_load_si512(lines + 2 * m * next));
          add_dots(fine[m], codes, _mm512_load_si512(lines + (2 * m + 1) * next));
        }
      }
      for (int m = 0; m < ROWS; m++) {
        const int whole = _mm512_reduce_add_epi32((__m512i)coarse[m]);
        const int rest = _mm512_reduce_add_epi32((__m512i)fine[m]);
        put(whole, rest, number(scales[i]), y, n, first + m, i);
      }
    }
  }
  template <class Out>
  void multiply(const void* weight, const void* scale, Out* y, long n, Range range) const {
    const uint8_t* w = (const uint8_t*)weight;
    const uint16_t* scales = (const uint16_t*)scale;
    if (digits.rows > FEW) range.from = multiply_blocks(w, scales, y, n, range);
    for (long m = 0; m < digits.rows; m += FEW)
      switch (digits.rows - m) {
        case 1: multiply_rows<1>(w, scales, y, n, range, m); break;
        case 2: multiply_rows<2>(w, scales, y, n, range, m); break;
        case 3: multiply_rows<3>(w, scales, y, n, range, m); break;
        case 4: multiply_rows<4>(w, scales, y, n, range, m); break;
        case 5: multiply_rows<5>(w, scales, y, n, range, m); break;
        default: multiply_rows<FEW>(w, scales, y, n, range, m);
      }
  }
  // Of many rows 64 outputs at a time; returns where there are fewer left.
  template <class Out>
  long multiply_blocks(const uint8_t* w, const uint16_t* scales, Out* y, long n, Range range) const {
    const long k = digits.groups * GROUP, rows = digits.rows;
    const Tiles tiles(true);
    __m512i found[2 * MAX_INT8_ROWS][4];
    const __m512i middle = _mm512_set1_epi8((char)128);
    // Of two vectors, what comes of turn about
    __m512i low, high;
    for (int lane = 0; lane < 16; lane++) {
      ((int32_t*)&low)[lane] = lane / 2 + lane % 2 * 16;
      ((int32_t*)&high)[lane] = lane / 2 + lane % 2 * 16 + 8;
    }
    long i = range.from;
    if (i + 64 <= range.to)
      for (long line = 0; line < 64 * k; line += 64) __builtin_prefetch(w + i * k + line, 0, 2);
    for (; i + 64 <= range.to; i += 64) {
      const uint8_t* later = w + (i + 64) * k;
      const bool goes_on = i + 128 <= range.to;
      for (long g = 0; g < digits.groups; g += CHUNK) {
        const long groups = std::min(CHUNK, digits.groups - g);
        __m512i codes[CHUNK * 64];
        for (long c = 0; c < groups; c++)
          for (int q = 0; q < 4; q++) {
            __m512i some[16], others[16];
            for (int r = 0; r < 16; r++) {
              some[r] = _mm512_loadu_si512(w + (i + 16 * q + r) * k + (g + c) * GROUP);
              if (goes_on) __builtin_prefetch(later, 0, 2);
              later += 64;
            }
            for (int turn = 0; turn < 2; turn++) {
              for (int r = 0; r < 8; r++) {
                others[2 * r] = _mm512_permutex2var_epi32(some[r], low, some[r + 8]);
                others[2 * r + 1] = _mm512_permutex2var_epi32(some[r], high, some[r + 8]);
              }
              for (int r = 0; r < 8; r++) {
                some[2 * r] = _mm512_permutex2var_epi32(others[r], low, others[r + 8]);
                some[2 * r + 1] = _mm512_permutex2var_epi32(others[r], high, others[r + 8]);
              }
            }
            for (int r = 0; r < 16; r++) codes[c * 64 + q * 16 + r] = _mm512_xor_si512(some[r], middle);
          }
        add_products(tiles, codes, digits, g, groups, found, g == 0);
      }
      for (long m = 0; m < rows; m++)
        for (int o = 0; o < 64; o++)
          put(((const int32_t*)found[2 * m])[o], ((const int32_t*)found[2 * m + 1])[o], number(scales[i + o]), y, n, m,
              i + o);
    }
    return i;
  }
};

struct Int4 {
  static constexpr long UNIT = 64, FEW = 4;
  Digits digits;
  std::vector<float> steps, sums;  // (rows, groups)

  void prepare(const float* x, long rows, long k) {
    digits.resize(rows, k, true), steps.resize(rows * digits.groups), sums.resize(rows * digits.groups);
    for (long i = 0; i < rows * digits.groups; i++) {
      const float* from = x + i * GROUP;
      steps[i] = step_of(from, GROUP);
      digits.fill(i % digits.groups, i / digits.groups, from, steps[i]);
      __m512 sum = _mm512_setzero_ps();
      for (long j = 0; j < GROUP; j += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(from + j));
      sums[i] = _mm512_reduce_add_ps(sum);
    }
  }
  template <class Out>
  void multiply(const void* weight, const void* scale, Out* y, long n, Range range) const {
    const uint8_t* w = (const uint8_t*)weight;
    const uint32_t* scales = (const uint32_t*)scale;
    const long groups = digits.groups, k = groups * GROUP, rows = digits.rows;
    const Tiles tiles(rows > FEW);
    // Two inputs of 32 outputs each -> pairs of inputs, so that four of them come together for an output below.
    alignas(64) uint8_t places[64];
    for (int i = 0; i < 64; i++) places[i] = i / 16 * 4 + i / 2 % 4 + i / 8 % 2 * 16 + i % 2 * 32;
    const __m512i order = _mm512_load_si512(places), low = _mm512_set1_epi8(15);
    for (long b = range.from / 64; b < range.to / 64; b++) {
      __m512 made[MAX_INT4_ROWS][4];
      for (long m = 0; m < rows; m++)
        for (int q = 0; q < 4; q++) made[m][q] = _mm512_setzero_ps();
      for (long g = 0; g < groups; g++) {
        const uint8_t* from = w + (b * k + g * GROUP) * 32;
        __m512i codes[64];
        for (long j = 0; j < 16; j++) {
          __m512i one = _mm512_loadu_si512(from + 128 * j), other = _mm512_loadu_si512(from + 128 * j + 64);
          __builtin_prefetch(from + 128 * j + AHEAD);
          __builtin_prefetch(from + 128 * j + AHEAD + 64);
          one = _mm512_permutexvar_epi8(order, one), other = _mm512_permutexvar_epi8(order, other);
          __m512i first = _mm512_unpacklo_epi16(one, other), second = _mm512_unpackhi_epi16(one, other);
          codes[j] = _mm512_and_si512(first, low), codes[j + 16] = _mm512_and_si512(second, low);
          codes[j + 32] = _mm512_and_si512(_mm512_srli_epi16(first, 4), low);
          codes[j + 48] = _mm512_and_si512(_mm512_srli_epi16(second, 4), low);
        }
        __m512i found[2 * MAX_INT4_ROWS][4];
        add_products(tiles, codes, digits, g, 1, found, true);
        __m512 factor[4], least[4];
        const long later = g + 2 < groups ? (g + 2) * n : (g + 2 - groups) * n + 64;  // perhaps in the next block
        const uint32_t* soon = scales + later + b * 64;
        for (int q = 0; q < 4; q++) {
          const uint32_t* pairs = scales + g * n + b * 64 + 16 * q;
          __builtin_prefetch(soon + 16 * q);
          __m512i both = _mm512_loadu_si512(pairs);
          factor[q] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
          __m512 zero = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
          least[q] = _mm512_fnmadd_ps(_mm512_set1_ps(8), factor[q], zero);
        }
        for (long m = 0; m < rows; m++) {
          const __m512 step = _mm512_set1_ps(steps[m * groups + g]), sum = _mm512_set1_ps(sums[m * groups + g]);
          for (int q = 0; q < 4; q++) {
            __m512 both = _mm512_fmadd_ps(_mm512_cvtepi32_ps(found[2 * m + 1][q]), _mm512_set1_ps(1 / 254.f),
                                          _mm512_cvtepi32_ps(found[2 * m][q]));
            made[m][q] = _mm512_fmadd_ps(_mm512_mul_ps(factor[q], step), both, made[m][q]);
            made[m][q] = _mm512_fmadd_ps(least[q], sum, made[m][q]);
          }
        }
      }
      for (long m = 0; m < rows; m++) {
        float all[64];
        memcpy(all, made[m], sizeof all);
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
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  {
    mine.multiply(w, scales, y, n, share(n, Product::UNIT));
    barrier.wait();
  }
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
