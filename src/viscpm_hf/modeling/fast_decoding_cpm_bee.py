"""Decoding in fixed shapes: every step of a shape class runs one and the same compiled graph.

Ordinary decoding spends much of its time on small kernels whose shapes grow with the answer. Here everything that
tells one request from another lies in buffers of constant shape, so one graph serves all prompts, lengths and
questions of a class. What is read and written where is the same as in the reference search: the queries of a row (its
beams, or one query for greedy decoding and sampling) share the row's keys and values, and a mask says which places a
query sees.

The prompt is not part of a class: it is read by the ordinary path, exactly as without fast decoding, and its keys and
values are copied. An answer that outgrows the places of its class moves on to the next class.
"""

from __future__ import annotations

import subprocess
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from .cache_cpm_bee import CpmBeeCache
from .compatibility import CACHE
from .fast_decoding import capture_problem, compilation_problem
from .token_space_cpm_bee import write_slots


logger = logging.get_logger(__name__)

LEAST_PLACES = 256
LEAST_SEGMENTS = 16
# torch.compile's backend.
BACKEND = "inductor"
# Classes kept at a time; each has keys and values of its own.
MAX_GRAPHS = 16


@dataclass(frozen=True)
class DecodingShape:
    """What a graph depends on besides the model."""

    rows: int
    """A power of two."""
    queries: int
    """Of every row: beams of the reference search, else 1."""
    places: int
    """Keys that a query attends to, free ones included: 256, 512, 768, 1024, 1536, 2048, 3072, ..."""
    segments: int
    """Of a document: a power of two, at least 16."""

    @classmethod
    def of(cls, rows: int, queries: int, places: int, segments: int) -> DecodingShape:
        """The smallest class that has room for so much."""
        return cls(
            rows=power_of_two(rows),
            queries=queries,
            places=room_for(places),
            segments=power_of_two(segments, LEAST_SEGMENTS),
        )

    def __str__(self) -> str:
        return f"{self.rows} x {self.queries} tokens, {self.places} places"


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is no less than `number` and `least`."""
    return 1 << (max(number, least) - 1).bit_length()


def room_for(places: int) -> int:
    """The next of 256 and, from 512 on, powers of two and one and a half times them."""
    whole = power_of_two(places, LEAST_PLACES)
    return whole * 3 // 4 if whole > 2 * LEAST_PLACES and places <= whole * 3 // 4 else whole


def in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """For what writes to the graphs' buffers, which outlive the mode that a caller may be in: without gradients, and
    outside inference mode, whose tensors can't be written to by anyone else."""
    return torch.inference_mode(False)(torch.no_grad()(function))


@dataclass
class PlacedKeys:
    """The part of a `Cache` that attention needs: keys and values of one layer, new ones written to given places."""

    keys: torch.Tensor
    values: torch.Tensor
    places: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys[:, :, self.places] = key_states
        self.values[:, :, self.places] = value_states
        return self.keys, self.values


def run_layer(
    layer: nn.Module, hidden_states: torch.Tensor, bias: torch.Tensor, cache: PlacedKeys | None
) -> torch.Tensor:
    return layer(hidden_states, bias, cache=cache)


class DecodingGraph:
    """One shape class: its buffers, and the step over them.

    Args:
        model: with `lm_head` and `language_model()`.
        dtype, device: of keys and values.
    """

    def __init__(self, model, shape: DecodingShape, dtype: torch.dtype, device: torch.device):
        self.shape, self.device = shape, device
        self.language_model, self.lm_head = model.language_model(), model.lm_head
        config = self.language_model.config
        self.config = config
        rows, queries, places = shape.rows, shape.queries, shape.places

        def integers(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.long, device=device)

        def numbers(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        layers, heads = range(config.num_attention_layers), config.num_attention_heads
        self.keys = [numbers(rows, heads, places, config.head_dim) for _ in layers]
        self.values = [numbers(rows, heads, places, config.head_dim) for _ in layers]
        self.end = integers(1)
        self.positions, self.segments = integers(rows, places), integers(rows, places)
        self.visible = torch.zeros(rows, queries, places, dtype=torch.bool, device=device)
        self.relations = integers(rows, shape.segments, shape.segments)
        self.extensions = numbers(rows, config.num_extension_slots, config.hidden_size)
        self.owned = torch.zeros(rows, config.num_extension_slots, dtype=torch.bool, device=device)
        # A table in place of the distances' logarithms: compiled, they may round to another bucket than elsewhere.
        self.bias_table = numbers(heads, 2 * places + config.position_bias_num_segment_buckets)
        self.inputs = [integers(rows, queries) for _ in range(4)]
        self._offsets = torch.arange(queries, device=device)
        self._itself = torch.eye(queries, dtype=torch.bool, device=device)
        self._run = self._step
        self._parts = self._enter, run_layer, self._leave
        self._replay: torch.cuda.CUDAGraph | None = None
        self._logits: torch.Tensor | None = None

    def _step(
        self, tokens: torch.Tensor, parents: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor
    ) -> torch.Tensor:
        """Logits `(rows, queries, vocab_size)`; see [`FastDecoding.step`]."""
        enter, run_layer, leave = self._parts
        hidden_states, bias, places = enter(tokens, parents, positions, segments)
        keys, values = iter(self.keys), iter(self.values)
        for layer in self.language_model.layers:
            cache = None if layer.self_attn is None else PlacedKeys(next(keys), next(values), places)
            hidden_states = run_layer(layer, hidden_states, bias, cache)
        return leave(hidden_states)

    def _enter(
        self, tokens: torch.Tensor, parents: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Takes the next places: what the layers are given, and the places."""
        places = self.end + self._offsets
        visible = self.visible.gather(1, parents[..., None].expand_as(self.visible))
        visible[:, :, places] = self._itself
        self.visible.copy_(visible)
        self.positions[:, places] = positions
        self.segments[:, places] = segments
        self.end.add_(self.shape.queries)

        embeddings = self.language_model.embed_tokens(tokens)
        slot, num_slots = (tokens - self.config.num_words)[..., None], self.config.num_extension_slots
        entry = slot.clamp(0, num_slots - 1).expand_as(embeddings)
        is_slot = (slot >= 0) & (slot < num_slots)
        hidden_states = torch.where(is_slot, self.extensions.gather(1, entry), embeddings)

        pair = segments[:, :, None] * self.shape.segments + self.segments[:, None, :]
        relation = self.relations.flatten(1).gather(1, pair.flatten(1)).view_as(pair)
        distance = self.positions[:, None, :] - positions[:, :, None] + self.shape.places
        entry = torch.where(relation == 0, distance, 2 * self.shape.places - 1 + relation)
        bias = nn.functional.embedding(entry, self.bias_table.t()).permute(0, 3, 1, 2)
        return hidden_states, self.language_model.merge_bias(bias, visible, hidden_states.dtype), places

    def _leave(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.language_model.norm(hidden_states)
        return write_slots(self.lm_head(hidden_states), hidden_states, self.config, self.extensions, self.owned)

    def warm_up(self, compile: bool) -> None:
        """Compiles the step if asked to, and captures it on CUDA; buffers hold nothing of worth before and after."""
        progress = logging.tqdm(total=1, desc=f"Preparing fast decoding ({self.shape})", disable=None, leave=False)
        with progress:
            if compile:
                self._compile(in_parts=self.device.type == "cuda")
            if self.device.type == "cuda" and capture_problem(self.language_model) is None:
                self._capture()
            progress.update()

    def _compile(self, in_parts: bool) -> None:
        """Compiles the whole step, or one layer for all: a fraction of the time, at a call for each, which a captured
        graph doesn't have."""
        # With this option inductor writes the matrix-vector products of one query itself, and dequantises within them.
        options = {"coordinate_descent_tuning": True} if self.device.type == "cuda" else None

        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND, options=options)

        parts = self._parts
        if in_parts:
            self._parts = tuple(map(compiled, parts))
        else:
            self._run = compiled(self._step)
        try:
            with torch._dynamo.config.patch(recompile_limit=4 * MAX_GRAPHS):  # every class is a graph of one function
                self._run(*self.inputs)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:  # dynamo's are of the first kind
            reason = " ".join(str(error).strip().split("\n\n")[0].split())
            logger.warning(f"Fast decoding goes on without compilation, which failed: {reason}")
            self._run, self._parts = self._step, parts

    def _capture(self) -> None:
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._run(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self._replay = torch.cuda.CUDAGraph()
            # What other threads of a server do on the GPU meanwhile doesn't concern this graph.
            with torch.cuda.graph(self._replay, capture_error_mode="thread_local"):
                self._logits = self._run(*self.inputs)

    def load(self, num_prompt: int) -> None:
        """Empties the buffers for a request whose prompts have so many places."""
        buffers = (self.relations, self.extensions, self.owned, self.visible)
        for buffer in (*self.keys, *self.values, *self.inputs, *buffers):
            buffer.zero_()
        self.end.fill_(num_prompt)
        position_bias = self.language_model.position_bias
        span = self.shape.places
        distances = torch.arange(-span, span, device=self.device)
        weight = position_bias.relative_attention_bias.weight
        by_distance = weight[position_bias.distance_bucket(distances)]
        self.bias_table.copy_(torch.cat([by_distance, weight[position_bias.num_buckets :]]).t())

    def take_over(self, other: DecodingGraph) -> None:
        """Goes on with the request of a class with fewer places."""
        self.load(0)
        past = other.shape.places
        for mine, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            mine[:, :, :past].copy_(theirs)
        self.end.copy_(other.end)
        self.relations.copy_(other.relations)
        self.extensions.copy_(other.extensions)
        self.owned.copy_(other.owned)
        self.positions[:, :past].copy_(other.positions)
        self.segments[:, :past].copy_(other.segments)
        self.visible[:, :, :past].copy_(other.visible)

    def __call__(self) -> torch.Tensor:
        """A step with what is in `inputs`; the logits are valid until the next."""
        if self._replay is None:
            return self._run(*self.inputs)
        self._replay.replay()
        return self._logits


class FastDecoder:
    """The graphs of one model. Its requests run one after the other, since they share the graphs' buffers."""

    def __init__(self):
        self.enabled = False
        """Whether requests that don't say otherwise are decoded fast."""
        self.compile = True
        """Otherwise the steps run as they are, over the same buffers."""
        self.lock = threading.RLock()
        self.graphs: OrderedDict[tuple, DecodingGraph] = OrderedDict()
        self._weights: tuple = ()

    def __reduce__(self):
        return FastDecoder, ()  # a copied or loaded model compiles for itself

    def graph(self, model, shape: DecodingShape, dtype: torch.dtype, device: torch.device) -> DecodingGraph:
        """The graph of that class, compiled now unless it is there already."""
        key = (shape, dtype, device, self.compile)
        if key not in self.graphs:
            problem = compilation_problem(model, device) if self.compile else None
            if problem is not None:
                logger.warning_once(f"Fast decoding goes without compilation: {problem}.")
            graph = DecodingGraph(model, shape, dtype, device)
            graph.warm_up(compile=self.compile and problem is None)
            self.graphs[key] = graph
            while len(self.graphs) > MAX_GRAPHS:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        return self.graphs[key]

    @staticmethod
    def _places_of(parameters: list[nn.Parameter]) -> tuple[int, ...]:
        return tuple(parameter.data_ptr() for parameter in parameters)

    @in_place
    def begin(self, model, inputs: Mapping[str, Any], cache: CpmBeeCache, queries: int = 1) -> FastDecoding:
        """A request whose prompts have been read into `cache`; `inputs` are those of the prompts."""
        # Captured graphs read the weights where they were: none may outlive a moved, cast, fused or adapted model.
        parameters = [*model.language_model().parameters(), model.lm_head.weight]
        if self._places_of(parameters) != self._weights:
            self.graphs.clear()
            self._weights = self._places_of(parameters)
        return FastDecoding(self, model, inputs, cache, queries)


class FastDecoding:
    """One request.

    Args:
        inputs: `attention_mask (rows, prompt)`, `segment_ids`, `segment_relations` and `extension_table` of the
            prompts, each of which may be missing.
        cache: what the prompts left, `prompt` places.
        queries: of every row.
    """

    def __init__(self, decoder: FastDecoder, model, inputs: Mapping[str, Any], cache: CpmBeeCache, queries: int):
        self.decoder, self.model, self.queries = decoder, model, queries
        past = cache.layers[0].keys
        self.num_rows, self.end = past.shape[0], past.shape[2]
        self.dtype, self.device = past.dtype, past.device
        relations, table = inputs.get("segment_relations"), inputs.get("extension_table")
        num_segments = 1 if relations is None else relations.shape[1]
        shape = DecodingShape.of(self.num_rows, queries, self.end + queries, num_segments)
        self.graph = graph = decoder.graph(model, shape, self.dtype, self.device)

        rows, prompt = slice(self.num_rows), slice(self.end)
        graph.load(self.end)
        for index, layer in enumerate(cache.layers):
            graph.keys[index][rows, :, prompt].copy_(layer.keys)
            graph.values[index][rows, :, prompt].copy_(layer.values)
        graph.positions[:, prompt] = torch.arange(self.end, device=self.device)
        segment_ids, mask = inputs.get("segment_ids"), inputs.get("attention_mask")
        self.last_segments = torch.zeros(self.num_rows, 1, dtype=torch.long, device=self.device)
        if segment_ids is not None:
            self.last_segments = segment_ids[:, -1:].to(self.device)
            graph.segments[rows, prompt] = self.last_segments
            graph.segments[rows, : segment_ids.shape[1]] = segment_ids.to(self.device)
            graph.relations[rows, :num_segments, :num_segments] = relations.to(self.device)
        graph.visible[rows, :, prompt] = True if mask is None else mask[:, None, prompt].to(self.device, torch.bool)
        if table is not None and table.shape[1]:
            entries = slice(table.shape[1])
            embeddings = model.language_model().embed_extensions(table)
            graph.extensions[rows, entries] = embeddings.to(self.device, self.dtype)
            graph.owned[rows, entries] = (table[..., 1] > 0).to(self.device)

    @in_place
    def step(
        self, tokens: torch.Tensor, parents: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor
    ) -> torch.Tensor:
        """Logits of the next tokens.

        Args:
            tokens: `(rows, queries)`.
            parents: `(rows, queries)`, the query of the step before whose past each query goes on with.
            positions, segments: `(rows, queries)`, of `tokens`.

        Returns:
            `(rows, queries, vocab_size)`, valid until the next step.
        """
        if self.end + self.queries > self.graph.shape.places:
            shape = replace(self.graph.shape, places=room_for(self.end + self.queries))
            larger = self.decoder.graph(self.model, shape, self.dtype, self.device)
            larger.take_over(self.graph)
            self.graph = larger
        for buffer, given in zip(self.graph.inputs, (tokens, parents, positions, segments), strict=True):
            buffer[: self.num_rows].copy_(given)
        self.end += self.queries
        return self.graph()[: self.num_rows]


class FastDecodingCache(CpmBeeCache):
    """Has `generate` decode fast: the prompt is read into it as ever, and the tokens after it go to a graph."""

    def __init__(self, decoder: FastDecoder):
        super().__init__()
        self.decoder = decoder
        self._decoding: FastDecoding | None = None

    def decode(self, model, input_ids: torch.Tensor, inputs: Mapping[str, Any]) -> CausalLMOutputWithPast:
        """As `model.forward` for one new token `(rows, 1)` each."""
        if self._decoding is None:
            self._decoding = self.decoder.begin(model, inputs, self)
            self._parents = torch.zeros_like(input_ids)
        decoding = self._decoding
        positions = torch.full_like(input_ids, decoding.end)
        logits = decoding.step(input_ids, self._parents, positions, decoding.last_segments)
        return CausalLMOutputWithPast(logits=logits, **{CACHE: self})


def with_graphs(model, compiled_call: Callable[..., Any]) -> Callable[..., Any]:
    """What `generate` calls for a token: the cache's graph if it has one, else the `compiled_call`."""

    def call(input_ids: torch.Tensor, **inputs) -> Any:
        cache = inputs.get(CACHE)
        if isinstance(cache, FastDecodingCache):
            return cache.decode(model, input_ids, inputs)
        return compiled_call(input_ids=input_ids, **inputs)

    return call


__all__ = ["DecodingShape", "FastDecoder", "FastDecoding", "FastDecodingCache"]
