"""A model whose layers don't fit on the GPU: some stay there, the others pass through it from pinned memory.

While one streamed layer computes, the next one is copied on a stream of its own, so that decoding runs at the speed of
the bus. The last layers of a pass are followed by the first ones of the next, as decoding goes on.

diffusers' group offloading does the same without a budget, and with more memory on the host: it pins every tensor by
itself, which torch rounds up to a power of two, and begins every pass with an empty device.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..modeling.modeling_cpm_bee import CpmBeeModel
from ..plain_text import size_text
from .placement import parse_size


logger = logging.get_logger(__name__)

BUDGET_VARIABLE = "CUDA_MEMORY_CPMBEE_MAX"
# One layer computes while the next one arrives. More would only take memory: layers arrive slower than they compute.
NUM_SLOTS = 2
# Of tensors within a buffer: what matrix kernels like best.
ALIGNMENT = 256


def layer_budget(device: torch.device) -> int | None:
    """What `CUDA_MEMORY_CPMBEE_MAX` allows the layers in bytes; None without it, and for other devices than GPUs.

    Raises:
        ValueError: if it is no size.
    """
    text = os.environ.get(BUDGET_VARIABLE)
    if not text:
        return None
    budget = parse_size(text, BUDGET_VARIABLE)
    if device.type != "cuda":
        logger.warning("%s is ignored: the model runs on the device %s, not on a GPU.", BUDGET_VARIABLE, device)
        return None
    return budget


def stream_layers(model: nn.Module, device: torch.device, budget: int) -> nn.Module:
    """Puts a model on a device, of its CPM-Bee's layers at most `budget` bytes at a time.

    Raises:
        ValueError: for a budget below two layers, or layers of a kind that can't be streamed.
    """
    language_model = next(module for module in model.modules() if isinstance(module, CpmBeeModel))
    layers = language_model.layers
    language_model.layers = nn.ModuleList()
    try:
        model.to(device)
    finally:
        language_model.layers = layers
    model.requires_grad_(False)
    model.__dict__.pop("hf_device_map", None)  # says CPU, where it was loaded
    LayerStreamer(layers, device, budget)
    return model


@dataclass(frozen=True)
class StreamingPlan:
    num_resident: int
    """How many layers, from the first one on, stay on the device."""
    resident_bytes: int
    slot_bytes: int
    """Of each slot that the other layers pass through; 0 if all stay."""

    @property
    def device_bytes(self) -> int:
        return self.resident_bytes + NUM_SLOTS * self.slot_bytes


def plan_streaming(sizes: Sequence[int], budget: int) -> StreamingPlan:
    """As many resident layers as a budget allows.

    Args:
        sizes: bytes of every layer.

    Raises:
        ValueError: if the budget is too small for any plan.
    """
    if sum(sizes) <= budget:
        return StreamingPlan(len(sizes), sum(sizes), 0)
    slot = max(sizes)
    if budget < NUM_SLOTS * slot:
        raise ValueError(
            f"{BUDGET_VARIABLE} allows the layers {size_text(budget)}, but streaming takes {NUM_SLOTS} of them at a "
            f"time, which is {size_text(NUM_SLOTS * slot)}."
        )
    fitting = [total for total in accumulate(sizes) if total <= budget - NUM_SLOTS * slot]
    return StreamingPlan(len(fitting), fitting[-1] if fitting else 0, slot)


# ------------------------------------------------------------------------------------------------ tensors of a layer


@dataclass
class _Tensor:
    """A tensor of a layer, and all attributes that refer to it."""

    shape: torch.Size
    dtype: torch.dtype
    begin: int
    targets: list[tuple[Any, str]] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def within(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[self.begin : self.begin + self.num_bytes].view(self.dtype).view(self.shape)

    def point_into(self, buffer: torch.Tensor) -> None:
        tensor = self.within(buffer)
        for owner, attribute in self.targets:
            setattr(owner, attribute, tensor)


def _targets(layer: nn.Module) -> list[tuple[Any, str]]:
    """All attributes of a layer that hold tensors, those of bitsandbytes' quantised weights included.

    Raises:
        ValueError: for weights that are more than their data, such as torchao's.
    """
    targets: list[tuple[Any, str]] = []
    for module in layer.modules():
        if type(module).__name__ == "Linear8bitLt":  # the first call hands these on
            holder = module.state if module.weight.CB is None else module.weight
            targets += [(holder, "CB"), (holder, "SCB")]
        for name, parameter in module.named_parameters(recurse=False):
            if type(parameter).__name__ not in ("Parameter", "Params4bit", "Int8Params"):
                raise ValueError(
                    f"{BUDGET_VARIABLE} can't stream weights of {type(parameter).__name__} ({name} of a "
                    f"{type(module).__name__}): use full precision or bitsandbytes' 4bit or 8bit."
                )
            targets.append((parameter, "data"))
            state = getattr(parameter, "quant_state", None)
            for owner in (state, getattr(state, "state2", None)):
                targets += [(owner, name) for name in ("absmax", "code", "offset") if hasattr(owner, name)]
        targets += [(module, name) for name, _ in module.named_buffers(recurse=False)]
    return [(owner, name) for owner, name in targets if isinstance(getattr(owner, name), torch.Tensor)]


def _prepare(layer: nn.Module) -> None:
    """What the first call of a layer would do to its weights."""
    for module in layer.modules():
        if type(module).__name__ == "Linear8bitLt" and module.weight.CB is not None:
            module.init_8bit_state()


def _layout(layer: nn.Module) -> list[_Tensor]:
    """Where a layer's tensors lie in one buffer."""
    tensors: dict[tuple[int, torch.dtype, torch.Size], _Tensor] = {}
    end = 0
    for owner, name in _targets(layer):
        value = getattr(owner, name)
        key = (value.data_ptr(), value.dtype, value.shape)
        if key not in tensors:
            tensors[key] = _Tensor(value.shape, value.dtype, end)
            end += -(-tensors[key].num_bytes // ALIGNMENT) * ALIGNMENT
        tensors[key].targets.append((owner, name))
    return list(tensors.values())


def _num_bytes(layout: Sequence[_Tensor]) -> int:
    """0 for a layer that pruning left nothing of."""
    return layout[-1].begin + layout[-1].num_bytes if layout else 0


class _StreamedLayer:
    """A layer whose tensors lie in one buffer on the host, or for the time of a call in a slot."""

    def __init__(self, layer: nn.Module):
        _prepare(layer)
        self.tensors = _layout(layer)
        self.num_bytes = _num_bytes(self.tensors)
        self.buffer = torch.empty(self.num_bytes, dtype=torch.uint8)
        for tensor in self.tensors:
            owner, name = tensor.targets[0]
            tensor.within(self.buffer).copy_(getattr(owner, name))
        self.point_into(self.buffer)

    def point_into(self, buffer: torch.Tensor) -> None:
        for tensor in self.tensors:
            tensor.point_into(buffer)


# ---------------------------------------------------------------------------------------------------------- streaming


class _Slot:
    """A place on the device for one streamed layer.

    Args:
        stream: the stream of the copies; None where copies are done when they return.
    """

    def __init__(self, num_bytes: int, device: torch.device, stream: torch.cuda.Stream | None):
        self.buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.stream = stream
        if stream is not None:
            self._arrived, self._is_free = torch.cuda.Event(), torch.cuda.Event()
            self._is_free.record(torch.cuda.current_stream(device))

    def fetch(self, layer: _StreamedLayer) -> None:
        """Begins to copy a layer, as soon as the one before has been computed."""
        into = self.buffer[: layer.num_bytes]
        if self.stream is None:
            into.copy_(layer.buffer)
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self._is_free)
            into.copy_(layer.buffer, non_blocking=True)
            self._arrived.record(self.stream)

    def wait(self) -> None:
        """What is computed from now on finds the layer complete."""
        if self.stream is not None:
            torch.cuda.current_stream(self.buffer.device).wait_event(self._arrived)

    def release(self) -> None:
        """The layer isn't needed after what has been computed so far."""
        if self.stream is not None:
            self._is_free.record(torch.cuda.current_stream(self.buffer.device))


class LayerStreamer:
    """Runs layers on a device with at most `budget` bytes of their weights there.

    The layers are to be called in their order, over and over; any other call costs an additional copy. It works by
    hooks on the layers, and lives as long as they do.

    Args:
        layers: on the CPU.
        device: where they are to run.
        budget: bytes.

    Raises:
        ValueError: for a budget below two layers, or layers of a kind that can't be streamed.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device, budget: int):
        # In a buffer a layer takes no less than on the device.
        self.plan = plan_streaming([_num_bytes(_layout(layer)) for layer in layers], budget)
        for layer in layers[: self.plan.num_resident]:
            layer.to(device)
        logger.info(
            "%d of %d layers stay on %s, the others are streamed; together they take %s there.",
            self.plan.num_resident, len(layers), device, size_text(self.plan.device_bytes),
        )  # fmt: skip
        self._layers: list[_StreamedLayer] = []
        if self.plan.num_resident == len(layers):
            return
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._slots = [_Slot(self.plan.slot_bytes, device, stream) for _ in range(NUM_SLOTS)]
        streamed = [layer for layer in layers[self.plan.num_resident :] if _layout(layer)]
        for index, layer in enumerate(streamed):
            self._layers.append(_StreamedLayer(layer))
            layer.register_forward_pre_hook(self._before(index))
            layer.register_forward_hook(self._after, always_call=True)
        if stream is not None:
            _pin(self, [layer.buffer for layer in self._layers])
        self._restart(0)

    @property
    def upcoming(self) -> list[int]:
        """The streamed layers (those with weights) that are on the device or on their way there, in the order of their
        calls."""
        ahead = range(self._turn, self._turn + NUM_SLOTS) if self._layers else ()
        return [self.plan.num_resident + turn % len(self._layers) for turn in ahead]

    # Turn `t` is that of streamed layer `t % len(layers)` in slot `t % NUM_SLOTS`.

    def _restart(self, turn: int) -> None:
        self._turn = turn
        for ahead in range(turn, turn + NUM_SLOTS):
            self._fetch(ahead)

    def _fetch(self, turn: int) -> None:
        self._slots[turn % NUM_SLOTS].fetch(self._layers[turn % len(self._layers)])

    def _before(self, index: int) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple) -> None:
            if torch.is_grad_enabled() and any(torch.is_tensor(value) and value.requires_grad for value in args):
                raise RuntimeError(f"Streamed layers ({BUDGET_VARIABLE}) can't be trained: unset the variable.")
            if self._turn % len(self._layers) != index:
                self._restart(index)
            slot = self._slots[self._turn % NUM_SLOTS]
            slot.wait()
            self._layers[index].point_into(slot.buffer)

        return before

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        layer, slot = self._layers[self._turn % len(self._layers)], self._slots[self._turn % NUM_SLOTS]
        layer.point_into(layer.buffer)
        slot.release()
        self._fetch(self._turn + NUM_SLOTS)
        self._turn += 1


def _pin(owner: object, buffers: Sequence[torch.Tensor]) -> None:
    """Pins memory in place, for as long as `owner` lives; torch's own pinned memory comes in powers of two.

    Raises:
        RuntimeError: if the system refuses.
    """
    pinned: list[torch.Tensor] = []
    weakref.finalize(owner, _unpin, pinned)
    for buffer in buffers:
        if int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 1)) != 0:
            raise RuntimeError(
                f"The system pins {size_text(sum(it.nbytes for it in pinned))} of RAM and no more, but "
                f"{size_text(sum(it.nbytes for it in buffers))} are needed: load the model in 8 or 4 bits, or raise "
                f"{BUDGET_VARIABLE}."
            )
        pinned.append(buffer)


def _unpin(buffers: Sequence[torch.Tensor]) -> None:
    torch.cuda.synchronize()
    for buffer in buffers:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
