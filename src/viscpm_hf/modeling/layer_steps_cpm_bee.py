"""A decoding step of all CPM-Bee layers on a CPU, by a kernel of our own.

A step of few rows reads every weight once and computes next to nothing; what keeps it from the memory's speed is all
the rest: some thirty small operations a layer, each of which wakes the threads. Here all layers are one call with one
team of threads, for plain weights in fp32 and bf16 and for the packed ones of `packed_linear`. Numbers in between are
fp32. Where something is out of the ordinary (hooks, adapters, other devices, gradients, outputs of single layers), the
modules compute as ever, and so they do without a compiler.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import itertools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.activations import GELUActivation

from .cpp_kernels import load_library
from .fused_projections_cpm_bee import FusibleModule
from .packed_linear import GROUP, Int4Linear, Int8Linear, PackedLinear
from .row_products import (
    KINDS,
    MAX_PACKED_ROWS,
    MAX_ROWS,
    NUMBERS,
    SOURCE,
    STEP,
    RowLinear,
    can_be_read,
    is_for_kernel,
)


MAX_HEAD_DIM = 256

STEP_SOURCE = (
    SOURCE
    + f"static const long MAX_HEAD_DIM = {MAX_HEAD_DIM};"
    + r"""
struct Matrix { const void *weight, *scale; };
struct Layer {
  const void *attention_norm, *mlp_norm;  // null, and so are the matrices, where pruning left nothing
  Matrix q, k, v, o, gate, up, down;
};
struct Cached { void *keys, *values; long strides[6]; };  // of keys, then values: batch, head, place
struct Step {
  const Layer* layers;
  const Cached* cache;  // of the layers with attention
  const void *last_norm, *bias;
  long count, width, inner, heads, head_dim, batch, queries, past, places;
};
struct Factors { float eps, residual, scaling; };
static const long SOON = 10;  // so many places ahead keys and values are asked for
static const float HIDDEN = -1e30f;  // no score or bias of a place that is seen is as low

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

// of 16 numbers, to a unit in the last place
static inline Floats error_function(Floats x) {
  Floats size = x < 0.f ? -x : x, square = x * x, near = Floats{} - 6.090496186e-4f, far = Floats{} + 1.993654760e-4f;
  for (float c : {5.011993371e-3f, -2.677893388e-2f, 1.128214171e-1f, -3.761252341e-1f, 1.283791539e-1f})
    near = near * square + c;
  size = size > 3.95f ? Floats{} + 3.95f : size;  // from where on it is 1
  for (float c : {-3.076820083e-3f, 2.236074426e-2f, -1.042088878e-1f, -6.368667901e-1f, -1.127862574f, -1.505505e-4f})
    far = far * size + c;
  far = 1.f - exponential(far);
  return size < 0.9f ? x + x * near : x < 0.f ? -far : far;
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
static void attend(const Step& step, const Cached& cached, const float* q, const float* k, const float* v, float* out,
                   long b, long h, float scaling) {
  const long size = step.head_dim, inner = step.heads * size, places = step.past + step.queries;
  Number* keys = (Number*)cached.keys + b * cached.strides[0] + h * cached.strides[1];
  Number* values = (Number*)cached.values + b * cached.strides[3] + h * cached.strides[4];
  const long key_stride = cached.strides[2], value_stride = cached.strides[5], padded = (places + 15) / 16 * 16;
  static thread_local std::vector<float> all_weights;
  all_weights.resize(padded);
  float* weights = all_weights.data();
  for (long m = 0; m < step.queries; m++)
    for (long i = 0, from = (b * step.queries + m) * inner + h * size; i < size; i++) {
      store(k[from + i], keys + (step.past + m) * key_stride + i);
      store(v[from + i], values + (step.past + m) * value_stride + i);
    }
  for (long m = 0; m < step.queries; m++) {
    const long at = (b * step.queries + m) * inner + h * size;
    const Number* bias = (const Number*)step.bias + ((b * step.heads + h) * step.queries + m) * step.places;
    Pair query[MAX_HEAD_DIM / 32], sums[MAX_HEAD_DIM / 32] = {};
    for (long i = 0; i < size / 32; i++) query[i] = arranged<Number>(q + at + 32 * i);
    float largest = HIDDEN;
    for (long place = 0; place < places; place++) {
      weights[place] = HIDDEN;
      const float mine = number(bias[place]);
      if (mine < HIDDEN) continue;
      Floats score = {};
      for (long i = 0; i < size / 32; i++) {
        __builtin_prefetch(keys + (place + SOON) * key_stride + 32 * i);
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
        __builtin_prefetch(values + (place + SOON) * value_stride + 32 * i);
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

// `gate`, in whole 16 of numbers, becomes gelu(gate) * up.
static void activate(float* gate, const float* up, Range range) {
  for (long i = range.from; i < range.to; i += 16) {
    Floats x, factor;
    memcpy(&x, gate + i, sizeof x), memcpy(&factor, up + i, sizeof factor);
    x = x * 0.5f * (1 + error_function(x * 0.70710678f)) * factor;
    memcpy(gate + i, &x, sizeof x);
  }
}

template <class Product, class Number>
static void steps(const Step& step, const Factors& factors, const Number* x, Number* y, int threads) {
  const long rows = step.batch * step.queries, width = step.width, inner = step.heads * step.head_dim;
  static thread_local std::vector<float> scratch;
  scratch.resize(rows * (4 * inner + 2 * width + 2 * step.inner));
  float *q = scratch.data(), *k = q + rows * inner, *v = k + rows * inner, *attended = v + rows * inner;
  float *states = attended + rows * inner, *made = states + rows * width;
  float *gate = made + rows * width, *up = gate + rows * step.inner;
  for (long i = 0; i < rows * width; i++) states[i] = number(x[i]);
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  {
    // Preparing rows is little work: every thread does it for itself, which is quicker than to wait for another.
    static thread_local Product product;
    static thread_local std::vector<float> normal;
    normal.resize(rows * width);
    const Range mine = share(width, Product::UNIT), wide = share(step.inner, Product::UNIT);
    const Cached* cached = step.cache;
    auto prepare_normal = [&](const void* norm) {
      normalize(states, (const Number*)norm, normal.data(), rows, width, factors.eps);
      product.prepare(normal.data(), rows, width);
    };
    auto add_made = [&] {
      for (long m = 0; m < rows; m++)
        for (long i = m * width + mine.from; i < m * width + mine.to; i++)
          states[i] = (states[i] + made[i]) * factors.residual;
    };
    for (const Layer* layer = step.layers; layer < step.layers + step.count; layer++) {
      if (layer->attention_norm) {
        prepare_normal(layer->attention_norm);
        const Range range = share(inner, Product::UNIT);
        product.multiply(layer->q.weight, layer->q.scale, q, inner, range);
        product.multiply(layer->k.weight, layer->k.scale, k, inner, range);
        product.multiply(layer->v.weight, layer->v.scale, v, inner, range);
        barrier.wait();
        const Range heads = share(step.batch * step.heads, 1);
        for (long i = heads.from; i < heads.to; i++)
          attend<Number>(step, *cached, q, k, v, attended, i / step.heads, i % step.heads, factors.scaling);
        cached++;
        barrier.wait();
        product.prepare(attended, rows, inner);
        product.multiply(layer->o.weight, layer->o.scale, made, width, mine);
        add_made();
        barrier.wait();
      }
      if (layer->mlp_norm) {
        prepare_normal(layer->mlp_norm);
        product.multiply(layer->gate.weight, layer->gate.scale, gate, step.inner, wide);
        product.multiply(layer->up.weight, layer->up.scale, up, step.inner, wide);
        for (long m = 0; m < rows; m++) activate(gate + m * step.inner, up + m * step.inner, wide);
        barrier.wait();
        product.prepare(gate, rows, step.inner);
        product.multiply(layer->down.weight, layer->down.scale, made, width, mine);
        add_made();
        barrier.wait();
      }
    }
  }
  normalize(states, (const Number*)step.last_norm, made, rows, width, factors.eps);
  for (long i = 0; i < rows * width; i++) store(made[i], y + i);
}

template <class Number>
static void plain_steps(const Step& step, const Factors& factors, const Number* x, Number* y, int threads) {
  switch (step.batch * step.queries) {
    case 1: return steps<Plain<1, Number>>(step, factors, x, y, threads);
    case 2: return steps<Plain<2, Number>>(step, factors, x, y, threads);
    case 3: return steps<Plain<3, Number>>(step, factors, x, y, threads);
    case 4: return steps<Plain<4, Number>>(step, factors, x, y, threads);
  }
}

#define STEPS(NAME, CALL, NUMBER)                                                                                  \
  extern "C" void NAME(const Step* step, const Factors* factors, const NUMBER* x, NUMBER* y, int threads) {       \
    CALL(*step, *factors, x, y, threads);                                                                          \
  }
STEPS(float32_steps, plain_steps, float)
STEPS(bfloat16_steps, plain_steps, uint16_t)
#ifdef HAS_PACKED
STEPS(float32_int8_steps, steps<Int8>, float)
STEPS(bfloat16_int8_steps, steps<Int8>, uint16_t)
STEPS(float32_int4_steps, steps<Int4>, float)
STEPS(bfloat16_int4_steps, steps<Int4>, uint16_t)
#endif
"""
)


_LINEARS = (RowLinear, Int8Linear, Int4Linear)
# Of the hooks that transformers leaves on a model once outputs were asked for.
_CAPTURING = "output_capturing_hook"
# Those of every module in the process.
_HOOKS_OF_ALL = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)
# Ways to attend that give the same; others are somebody's own.
_ATTENTIONS = (None, "eager", "sdpa", "flex_attention")
_NO_MATRIX = (0, 0)
# What was looked at in [`looking_once`], and what is kept of it.
_known: contextvars.ContextVar[dict[LayerSteps, list] | None] = contextvars.ContextVar("known_steps", default=None)


@functools.lru_cache(1)
def step_kernel() -> ctypes.CDLL | None:
    """The compiled kernel; None where there is no compiler for it."""
    types = [*[ctypes.c_void_p] * 4, ctypes.c_int]
    functions = {f"{dtype}{kind}_steps": types for dtype in NUMBERS.values() for kind in KINDS}
    return load_library("layer_steps_cpm_bee", STEP_SOURCE, functions)


class LayerSteps:
    """Steps of all layers and the last norm of a [`CpmBeeModel`], as long as nothing about it changes.

    `kernel` is None if the kernel isn't made for the model as it is.
    """

    def __init__(self, model: nn.Module):
        modules = [*model.layers.modules(), *model.norm.modules()]
        self.kernel, self.max_rows = _kernel_for(model, modules)
        self.dtype = model.norm.weight.dtype
        # What would tell of a change; it is looked at in each step, so without loops in Python.
        self._list, self._count = model.layers._modules, len(model.layers)
        self._modules, self._classes = modules, list(map(type, modules))
        entries = [(model._modules, name, model._modules[name]) for name in ("layers", "norm")]
        entries += [
            (entries, name, entry)
            for module in modules
            for entries in (module._modules, module._parameters)
            for name, entry in entries.items()
        ]
        self._entries = list(zip(*entries, strict=True))
        self._weights = [entry for _, _, entry in entries if isinstance(entry, nn.Parameter)]
        self._places = list(map(torch.Tensor.data_ptr, self._weights))
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._attributes = [module.__dict__ for module in modules]
        if self.kernel is None:
            return
        config = model.config
        numbers = [number for layer in model.layers for number in _numbers_of(layer)]
        self._layers = (ctypes.c_int64 * len(numbers))(*numbers)
        self._sizes = (len(model.layers), config.intermediate_size, config.num_attention_heads)
        self._head_dim = config.head_dim
        self._attentions = sum(layer.self_attn is not None for layer in model.layers)
        self._last_norm = model.norm.weight
        factors = (config.rms_norm_eps, 1 / config.residual_divisor, config.head_dim**-0.5)
        self._factors = (ctypes.c_float * len(factors))(*factors)

    def storages(self) -> list[torch.UntypedStorage]:
        """What the kernel reads; whoever keeps them keeps weights that another thread moves from being freed."""
        return [] if self.kernel is None else list(map(torch.Tensor.untyped_storage, self._weights))

    def is_still_right(self) -> bool:
        """Whether modules and weights are those that there were, at the same place."""
        dicts, names, entries = self._entries
        same = all(map(operator.is_, map(dict.get, dicts, names), entries)) and len(self._list) == self._count
        same = same and list(map(type, self._modules)) == self._classes
        return same and list(map(torch.Tensor.data_ptr, self._weights)) == self._places

    def is_ordinary(self) -> bool:
        """Whether nobody wants to see or change what happens between the modules."""
        if any(_HOOKS_OF_ALL) or any(self._hooks) and not all(map(_are_capturing, self._hooks)):
            return False
        return not any(map(operator.contains, self._attributes, itertools.repeat("forward")))

    def __call__(self, hidden_states: torch.Tensor, position_bias: torch.Tensor, cache: Any) -> torch.Tensor | None:
        """See [`step_layers`]."""
        batch, queries, width = hidden_states.shape
        count, inner, heads = self._sizes
        bias = position_bias.to(hidden_states).expand(batch, heads, queries, -1).contiguous()
        shape = batch, heads, queries, self._head_dim
        opened = cache.open_places(self._attentions, shape, hidden_states.dtype, bias.shape[-1])
        if opened is None:
            return None
        past, places = opened
        hidden_states = hidden_states.contiguous()
        output = torch.empty_like(hidden_states)
        cached = (ctypes.c_int64 * len(places))(*places)
        step = (ctypes.c_int64 * 13)(
            ctypes.addressof(self._layers),
            ctypes.addressof(cached),
            self._last_norm.data_ptr(),
            bias.data_ptr(),
            *(count, width, inner, heads, self._head_dim, batch, queries, past, bias.shape[-1]),
        )
        self.kernel(step, self._factors, hidden_states.data_ptr(), output.data_ptr(), torch.get_num_threads())
        return output

    def __reduce__(self):
        return _None, ()  # a copied model has other weights


def _None() -> None:
    return None


def _are_capturing(hooks: dict[int, Any]) -> bool:
    return all(getattr(hook, "__name__", "") == _CAPTURING for hook in hooks.values())


def _kernel_for(model: nn.Module, modules: list[nn.Module]) -> tuple[Any, int]:
    """The kernel's function for the model's weights, and how many rows it takes; None and 0 if there is none."""
    known = (nn.ModuleList, GELUActivation, *model._layer_classes, *_LINEARS)
    if any(type(module) not in known for module in modules):
        return None, 0
    config, dtype = model.config, model.norm.weight.dtype
    sizes = [size for layer in model.layers for size in _sizes_of(layer, config)]
    linears = [linear for linear, *_ in sizes]
    norms = [module.weight for module in modules if hasattr(module, "variance_epsilon")]
    bits = getattr(linears[0], "bits", None) if linears else None
    if (
        not linears
        or dtype not in NUMBERS
        or config.head_dim % STEP
        or config.head_dim > MAX_HEAD_DIM
        or any(
            weight.device.type != "cpu"
            for module in modules
            for weight in module._parameters.values()
            if weight is not None
        )
        or any(type(linear) is not type(linears[0]) or linear.bias is not None for linear in linears)
        or any((len(it.weight), it.in_features if bits else it.weight.shape[1]) != (n, k) for it, n, k in sizes)
        or (bits and any(linear.in_features % GROUP for linear in linears))
        or (not bits and not all(is_for_kernel(linear) and linear.weight.dtype == dtype for linear in linears))
        or any(weight.dtype != dtype or len(weight) != config.hidden_size for weight in norms)
    ):
        return None, 0
    kind = f"_int{bits}" if bits else ""
    function = getattr(step_kernel(), f"{NUMBERS[dtype]}{kind}_steps", None)  # no compiler, or no VNNI
    return (None, 0) if function is None else (function, MAX_PACKED_ROWS.get(bits, MAX_ROWS))


def _sizes_of(layer: nn.Module, config: Any) -> list[tuple[nn.Module, int, int]]:
    """All matrices of a layer, those of projections fused or not, and how many outputs and inputs they should have."""
    found, width = [], config.hidden_size
    heads = config.num_attention_heads * config.head_dim
    for module, last, inner in (
        (layer.self_attn, "o_proj", heads),
        (layer.mlp, "down_proj", config.intermediate_size),
    ):
        if module is not None:
            fused, parts = module._fusible_projections
            names, outputs = ((fused,), inner * len(parts)) if fused in module._modules else (parts, inner)
            found += [(module._modules[name], outputs, width) for name in names]
            found.append((module._modules[last], width, inner))
    return found


def _numbers_of(layer: nn.Module) -> list[int]:
    """What the kernel calls a `Layer`."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = [
        0 if part is None else norm.weight.data_ptr()
        for part, norm in (
            (attention, getattr(layer, "input_layernorm", None)),
            (mlp, getattr(layer, "post_attention_layernorm", None)),
        )
    ]
    matrices = [_NO_MATRIX] * 4 if attention is None else [*_matrices(attention), _matrix(attention.o_proj)]
    matrices += [_NO_MATRIX] * 3 if mlp is None else [*_matrices(mlp), _matrix(mlp.down_proj)]
    return [*norms, *(number for matrix in matrices for number in matrix)]


def _matrices(module: FusibleModule) -> list[tuple[int, int]]:
    """Of the projections, fused or not."""
    fused, parts = module._fusible_projections
    if fused not in module._modules:
        return [_matrix(module._modules[part]) for part in parts]
    weight = module._modules[fused].weight
    return [(weight.data_ptr() + part * weight.nbytes // len(parts), 0) for part in range(len(parts))]


def _matrix(linear: nn.Module) -> tuple[int, int]:
    return linear.weight.data_ptr(), linear.scale.data_ptr() if isinstance(linear, PackedLinear) else 0


def step_layers(
    model: nn.Module, hidden_states: torch.Tensor, position_bias: torch.Tensor, cache: Any
) -> torch.Tensor | None:
    """What all layers and the last norm make of new tokens.

    Args:
        model: a [`CpmBeeModel`].
        hidden_states: `(batch, queries, hidden)`.
        position_bias: `(batch or 1, heads, queries, places)`.
        cache: whatever has `open_places`; the new keys and values are added to it.

    Returns:
        `(batch, queries, hidden)`, or None, with the cache unchanged, if the modules have to compute.
    """
    if (
        not can_be_read(hidden_states)
        or torch.is_grad_enabled()
        or not hasattr(cache, "open_places")
        or torch.is_autocast_enabled("cpu")
        or model.config._attn_implementation not in _ATTENTIONS
        or (model.training and model.config.attention_dropout)
    ):
        return None
    steps = layer_steps(model)
    batch, queries, width = hidden_states.shape
    if (
        not 0 < batch * queries <= steps.max_rows
        or hidden_states.dtype != steps.dtype
        or model.norm.weight.dtype != steps.dtype
        or width != model.config.hidden_size
        or not steps.is_ordinary()
    ):
        return None
    return steps(hidden_states, position_bias, cache)


def layer_steps(model: nn.Module) -> LayerSteps:
    """The model's, made anew when it has changed."""
    steps, known = model.__dict__.get("_layer_steps"), _known.get()
    if known and steps in known:
        return steps
    if steps is None or not steps.is_still_right():
        steps = model.__dict__["_layer_steps"] = LayerSteps(model)
    if known is not None:
        known[steps] = steps.storages()
    return steps


@contextlib.contextmanager
def looking_once() -> Iterator[None]:
    """While it lasts, this thread looks at a model's modules and weights in its first step alone: the caches are full
    of weights then, so that it takes a fifth of a millisecond. Hooks are seen as ever."""
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


__all__ = ["layer_steps", "looking_once", "step_layers"]
