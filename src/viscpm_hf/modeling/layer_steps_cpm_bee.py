"""A decoding step of a whole CPM-Bee layer on a CPU, by a kernel of our own.

A step of few rows reads every weight once and computes next to nothing; what keeps it from the memory's speed is all
the rest: some thirty small operations a layer, each of which wakes the threads. Here a layer is one call with one team
of threads, for plain weights in fp32 and bf16 and for the packed ones of `packed_linear`. Numbers in between are fp32.
Where something is out of the ordinary (hooks, adapters, other devices, gradients, compilation), the layer's modules
compute as ever, and so they do without a compiler.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import nn

from .packed_linear import Int4Linear, Int8Linear
from .row_products import MAX_ROWS, NUMBERS, SOURCE, STEP, RowLinear, has_packed_products, load_library


# Of packed weights.
MAX_STEP_ROWS = 4
MAX_HEAD_DIM = 256

STEP_SOURCE = (
    SOURCE
    + r"""
struct Matrix { const void *weight, *scale; };
struct Layer {
  const void *first_norm, *second_norm;
  Matrix q, k, v, o, gate, up, down;
  long width, heads, head_dim, inner, batch, queries, past, places;
  const void* bias;
  void *keys, *values;
  long strides[6];  // of keys, then values: batch, head, place
};
static const float HIDDEN = -1e30f;  // no score or bias of a place that is seen is as low
static const long MAX_HEAD_DIM = 256;
struct Factors { float first_eps, second_eps, residual, scaling; };

// exp of 16 numbers that are at most 0, to 2 units in the last place
static inline Floats exponential(Floats x) {
  Floats lowest = Floats{} - 87.f;
  x = x < lowest ? lowest : x;
  Floats steps = x * 1.44269504f - 0.5f;
  Codes whole = __builtin_convertvector(steps, Codes);  // towards 0: to the nearest, of numbers below 0
  Floats n = __builtin_convertvector(whole, Floats);
  Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats y = Floats{} + 1.9875691500e-4f;
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = y * r + c;
  y = y * r * r + r + 1.f;
  return y * (Floats)((whole + 127) << 23);
}

template <class Given, class Number>
static void normalize(const Given* x, const Number* weight, float* to, long rows, long width, float eps) {
  for (long m = 0; m < rows; m++) {
    Floats sums = {};
    for (long i = 0; i < width; i += 32) {
      Pair pair = load(x + m * width + i);
      sums += pair.even * pair.even + pair.odd * pair.odd;
    }
    const float factor = 1 / std::sqrt(total(sums) / width + eps);
    for (long i = 0; i < width; i++) to[m * width + i] = number(weight[i]) * (number(x[m * width + i]) * factor);
  }
}

// One head of one sequence: puts its new keys and values into the cache and attends to all places.
template <class Number>
static void attend(const Layer& layer, const float* q, const float* k, const float* v, float* out, long b, long h,
                   float scaling) {
  const long size = layer.head_dim, inner = layer.heads * size, places = layer.past + layer.queries;
  Number* keys = (Number*)layer.keys + b * layer.strides[0] + h * layer.strides[1];
  Number* values = (Number*)layer.values + b * layer.strides[3] + h * layer.strides[4];
  const long key_stride = layer.strides[2], value_stride = layer.strides[5], padded = (places + 15) / 16 * 16;
  static thread_local std::vector<float> all_weights;
  all_weights.resize(padded);
  float* weights = all_weights.data();
  for (long m = 0; m < layer.queries; m++)
    for (long i = 0, from = (b * layer.queries + m) * inner + h * size; i < size; i++) {
      store(k[from + i], keys + (layer.past + m) * key_stride + i);
      store(v[from + i], values + (layer.past + m) * value_stride + i);
    }
  for (long m = 0; m < layer.queries; m++) {
    const long at = (b * layer.queries + m) * inner + h * size;
    const Number* bias = (const Number*)layer.bias + ((b * layer.heads + h) * layer.queries + m) * layer.places;
    Pair query[MAX_HEAD_DIM / 32], sums[MAX_HEAD_DIM / 32] = {};
    for (long i = 0; i < size / 32; i++) query[i] = arranged<Number>(q + at + 32 * i);
    float largest = HIDDEN;
    for (long place = 0; place < places; place++) {
      weights[place] = HIDDEN;
      const float mine = number(bias[place]);
      if (mine < HIDDEN) continue;
      Floats score = {};
      for (long i = 0; i < size / 32; i++) {
        Pair key = load(keys + place * key_stride + 32 * i);
        score += key.even * query[i].even + key.odd * query[i].odd;
      }
      weights[place] = total(score) * scaling + mine;
      largest = std::max(largest, weights[place]);
    }
    for (long place = places; place < padded; place++) weights[place] = HIDDEN;
    Floats sum = {};
    for (long place = 0; place < padded; place += 16) {
      Floats scores;
      memcpy(&scores, weights + place, sizeof scores);
      Floats hidden = Floats{} + HIDDEN, made = exponential(scores - largest);
      made = scores <= hidden ? Floats{} : made;
      sum += made;
      memcpy(weights + place, &made, sizeof made);
    }
    const float whole = total(sum);
    for (long place = 0; place < places; place++) {
      const float weight = weights[place];
      if (weight == 0) continue;
      for (long i = 0; i < size / 32; i++) {
        Pair value = load(values + place * value_stride + 32 * i);
        sums[i].even += value.even * weight, sums[i].odd += value.odd * weight;
      }
    }
    for (long i = 0; i < size; i++) {
      const long lane = sizeof(Number) == 4 ? i % 32 : i % 32 / 2 + i % 2 * 16;
      const float found = (lane < 16 ? sums[i / 32].even : sums[i / 32].odd)[lane % 16];
      out[at + i] = whole > 0 ? found / whole : 0;  // who sees nothing gets nothing
    }
  }
}

template <class Product, class Number>
static void step(const Layer& layer, const Factors& factors, const Number* x, Number* y, int threads) {
  const long rows = layer.batch * layer.queries, width = layer.width, inner = layer.heads * layer.head_dim;
  static thread_local std::vector<float> scratch;
  scratch.resize(rows * (4 * inner + 2 * width + 2 * layer.inner));
  float *q = scratch.data(), *k = q + rows * inner, *v = k + rows * inner, *attended = v + rows * inner;
  float *middle = attended + rows * inner, *down = middle + rows * width;
  float *gate = down + rows * width, *up = gate + rows * layer.inner;
#pragma omp parallel num_threads(threads)
  {
    // Preparing rows is little work: every thread does it for itself, which is quicker than to wait for another.
    static thread_local Product product;
    static thread_local std::vector<float> normal;
    normal.resize(rows * width);
    normalize(x, (const Number*)layer.first_norm, normal.data(), rows, width, factors.first_eps);
    product.prepare(normal.data(), rows, width);
    Range range = share(inner, Product::UNIT);
    product.multiply(layer.q.weight, layer.q.scale, q, inner, range);
    product.multiply(layer.k.weight, layer.k.scale, k, inner, range);
    product.multiply(layer.v.weight, layer.v.scale, v, inner, range);
#pragma omp barrier
#pragma omp for schedule(static)
    for (long i = 0; i < layer.batch * layer.heads; i++)
      attend<Number>(layer, q, k, v, attended, i / layer.heads, i % layer.heads, factors.scaling);
    product.prepare(attended, rows, inner);
    range = share(width, Product::UNIT);
    product.multiply(layer.o.weight, layer.o.scale, middle, width, range);
    for (long m = 0; m < rows; m++)
      for (long i = m * width + range.from; i < m * width + range.to; i++)
        middle[i] = (number(x[i]) + middle[i]) * factors.residual;
#pragma omp barrier
    normalize(middle, (const Number*)layer.second_norm, normal.data(), rows, width, factors.second_eps);
    product.prepare(normal.data(), rows, width);
    Range wide = share(layer.inner, Product::UNIT);
    product.multiply(layer.gate.weight, layer.gate.scale, gate, layer.inner, wide);
    product.multiply(layer.up.weight, layer.up.scale, up, layer.inner, wide);
    for (long m = 0; m < rows; m++)
      for (long i = m * layer.inner + wide.from; i < m * layer.inner + wide.to; i++)
        gate[i] = gate[i] * 0.5f * (1 + std::erf(gate[i] * 0.70710678f)) * up[i];
#pragma omp barrier
    product.prepare(gate, rows, layer.inner);
    product.multiply(layer.down.weight, layer.down.scale, down, width, range);
    for (long m = 0; m < rows; m++)
      for (long i = m * width + range.from; i < m * width + range.to; i++)
        store((middle[i] + down[i]) * factors.residual, y + i);
  }
}

template <class Number>
static void plain_step(const Layer& layer, const Factors& factors, const Number* x, Number* y, int threads) {
  switch (layer.batch * layer.queries) {
    case 1: return step<Plain<1, Number>>(layer, factors, x, y, threads);
    case 2: return step<Plain<2, Number>>(layer, factors, x, y, threads);
    case 3: return step<Plain<3, Number>>(layer, factors, x, y, threads);
    case 4: return step<Plain<4, Number>>(layer, factors, x, y, threads);
  }
}

#define STEP(NAME, CALL, NUMBER)                                                                                   \
  extern "C" void NAME(const Layer* layer, const Factors* factors, const NUMBER* x, NUMBER* y, int threads) {     \
    CALL(*layer, *factors, x, y, threads);                                                                         \
  }
STEP(float32_step, plain_step, float)
STEP(bfloat16_step, plain_step, uint16_t)
#ifdef __AVX512VNNI__
STEP(float32_int8_step, step<Int8>, float)
STEP(bfloat16_int8_step, step<Int8>, uint16_t)
STEP(float32_int4_step, step<Int4>, float)
STEP(bfloat16_int4_step, step<Int4>, uint16_t)
#endif
"""
)


_KINDS = {RowLinear: "", Int8Linear: "_int8", Int4Linear: "_int4"}


def step_library() -> ctypes.CDLL | None:
    library = load_library("layer_steps", STEP_SOURCE)
    if library is not None and library.float32_step.argtypes is None:
        kinds = ("", "_int8", "_int4") if has_packed_products(library) else ("",)
        for function in (getattr(library, f"{dtype}{kind}_step") for dtype in NUMBERS.values() for kind in kinds):
            function.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_int]
            function.restype = None
    return library


def matrices(layer: nn.Module) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj, attention.k_proj]


def step_kind(layer: nn.Module) -> str | None:
    """Which of the kernel's functions steps the layer; None if none does, now or at all."""
    raise NotImplementedError


__all__ = ["layer_step"]
