"""The key maps at work: on single names, on tensors, and as transformers' own weight conversions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from transformers.conversion_mapping import (
    WeightConverter,
    WeightRenaming,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import ConversionOps

from .key_maps import FOLD_WIDTH, KEEP, Entry, KeyMap


def apply_operation(operation: str, tensor: torch.Tensor) -> torch.Tensor:
    """Original tensor -> ours."""
    if operation == KEEP:
        return tensor
    if operation == FOLD_WIDTH:
        # Through fp32: the factor of an fp16 weight must not be rounded too.
        return (tensor.float() * tensor.shape[-1] ** -0.5).to(tensor.dtype)
    raise ValueError(f"unknown operation {operation!r}")


def revert_operation(operation: str, tensor: torch.Tensor) -> torch.Tensor:
    """Our tensor -> the original's."""
    if operation == KEEP:
        return tensor
    if operation == FOLD_WIDTH:
        return (tensor.float() * tensor.shape[-1] ** 0.5).to(tensor.dtype)
    raise ValueError(f"unknown operation {operation!r}")


class FoldWidth(ConversionOps):
    """`FOLD_WIDTH` as transformers applies it while loading."""

    operation = staticmethod(apply_operation)

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        **kwargs,
    ) -> dict[str, Any]:
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        return {full_layer_name: self.operation(FOLD_WIDTH, tensor)}

    @property
    def reverse_op(self) -> ConversionOps:
        return UnfoldWidth()


class UnfoldWidth(FoldWidth):
    """The reverse of [`FoldWidth`]."""

    operation = staticmethod(revert_operation)

    @property
    def reverse_op(self) -> ConversionOps:
        return FoldWidth()


def source_pattern(entry: Entry) -> str:
    return re.escape(entry.source).replace(r"\{n\}", r"(\d+)")


def target_pattern(entry: Entry) -> str:
    return entry.target.replace("{n}", r"\1")


class KeyMatcher:
    """Finds the entry of an original name."""

    def __init__(self, key_map: KeyMap):
        self.key_map = key_map
        self._patterns = [(re.compile(source_pattern(entry)), entry) for entry in key_map.entries]

    def match(self, name: str) -> tuple[str, Entry] | None:
        """Our name and the entry, or None for a name that the map doesn't have."""
        for pattern, entry in self._patterns:
            found = pattern.fullmatch(name)
            if found:
                return found.expand(target_pattern(entry)), entry
        return None

    def dropped_reason(self, name: str) -> str | None:
        """Why the map leaves a name out; None if it doesn't."""
        for entry in self.key_map.dropped:
            if name == entry.source or (entry.source.endswith(".") and name.startswith(entry.source)):
                return entry.reason
        return None

    def covers(self, names: Iterable[str]) -> bool:
        """Whether any of the names is of this map."""
        return any(self.match(name) for name in names)


def register_key_map(model_type: str, *key_maps: KeyMap) -> None:
    """Lets `from_pretrained` load original files of these maps into models of `model_type`."""
    transforms: list[WeightConverter | WeightRenaming] = []
    for key_map in key_maps:
        for entry in key_map.entries:
            # To the end of the name: of ours, some begin like an original one.
            source, target = f"^{source_pattern(entry)}(?![\\w.])", target_pattern(entry)
            if entry.operation == KEEP:
                transforms.append(WeightRenaming(source, target))
            else:
                transforms.append(WeightConverter(source, target, operations=[FoldWidth()]))
    register_checkpoint_conversion_mapping(model_type, transforms, overwrite=True)
