"""The key maps at work on tensors, and as transformers' own weight conversions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from typing import Any

import torch
from transformers.conversion_mapping import (
    WeightConverter,
    WeightRenaming,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import ConversionOps

from ..families.key_maps import (
    AS_MATRIX,
    FOLD_WIDTH,
    KEEP,
    THIRDS,
    TOKEN_ROWS,
    TRANSPOSED,
    WITHOUT_BATCH,
    KeyMap,
)
from ..modeling.token_ids_cpm_bee import padded_vocab_size
from ..modeling.token_space_cpm_bee import pad_token_rows
from .key_matching import KeyMatcher as KeyMatcher  # whose place this was
from .key_matching import name_pattern, target_pattern


# Values that are scaled at a time.
SCALED_VALUES = 2**18


def apply_operation(operation: str, tensor: torch.Tensor) -> torch.Tensor:
    """Original tensor -> ours."""
    if operation == KEEP:
        return tensor
    if operation == FOLD_WIDTH:
        return _scaled(tensor, factor_of(operation, tensor.shape))
    if operation == TOKEN_ROWS:
        return apply_operation(FOLD_WIDTH, pad_token_rows(tensor))
    if operation == AS_MATRIX:
        return tensor.flatten(1) if tensor.ndim == 4 else tensor
    if operation in THIRDS:
        return tensor.tensor_split(3)[THIRDS.index(operation)]
    if operation == WITHOUT_BATCH:
        return tensor.squeeze(0)
    if operation == TRANSPOSED:
        return tensor.T.contiguous()
    raise ValueError(f"unknown operation {operation!r}")


def factor_of(operation: str, shape: torch.Size) -> float:
    """What an operation multiplies the values by."""
    return shape[-1] ** -0.5 if operation in (FOLD_WIDTH, TOKEN_ROWS) else 1.0


def revert_operation(operation: str, tensor: torch.Tensor, num_words: int | None = None) -> torch.Tensor:
    """Our tensor -> the original's; of one that was split, the part. `num_words` are the rows that `TOKEN_ROWS`
    leaves: a padded embedding doesn't say how many of its rows are words."""
    if operation in (KEEP, AS_MATRIX, *THIRDS):
        return tensor
    if operation == WITHOUT_BATCH:
        return tensor.unsqueeze(0)
    if operation == TRANSPOSED:
        return tensor.T.contiguous()
    if operation == FOLD_WIDTH:
        return _scaled(tensor, tensor.shape[-1] ** 0.5)
    if operation == TOKEN_ROWS:
        if num_words is None:
            raise ValueError("an embedding can't be trimmed without the number of words")
        num_added = len(tensor) - padded_vocab_size(num_words)
        if num_added > 0:
            raise ValueError(
                f"The embedding has {num_added:,} rows more than those of {num_words:,} words and their slots: tokens "
                "were added, which the original's format can't hold. Save with today's names "
                "(save_original_format=False)."
            )
        return revert_operation(FOLD_WIDTH, tensor[:num_words])
    raise ValueError(f"unknown operation {operation!r}")


def _scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Scaled in a wider dtype, so that values are rounded once and there and back is at most one rounding off."""
    if tensor.dtype != torch.float32 or tensor.device.type == "mps":
        return tensor * factor  # torch itself multiplies half precision in fp32 and rounds once
    if tensor.device.type != "cpu" or tensor.ndim < 2 or tensor.numel() <= SCALED_VALUES:
        return (tensor.double() * factor).float()
    # By the row: no second copy of a big tensor in fp64, and faster, since a piece stays in the cache.
    scaled = torch.empty_like(tensor)
    rows = max(1, SCALED_VALUES * tensor.shape[0] // tensor.numel())
    for piece, into in zip(tensor.split(rows), scaled.split(rows), strict=True):
        into.copy_(piece.double().mul_(factor))
    return scaled


class KeyMapOperation(ConversionOps):
    """An operation of the key maps as transformers applies it while loading, and undoes it for saving."""

    def __init__(self, operation: str, is_reverted: bool = False):
        self.operation, self.is_reverted = operation, is_reverted

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        config: Any = None,
        **kwargs,
    ) -> dict[str, Any]:
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        num_words = getattr(config, "get_text_config", lambda: config)().num_words if self._counts_words else None
        return {full_layer_name: self.change(tensor, num_words)}

    @property
    def _counts_words(self) -> bool:
        return self.operation == TOKEN_ROWS and self.is_reverted

    def change(self, tensor: torch.Tensor, num_words: int | None) -> torch.Tensor:
        if self.is_reverted:
            return revert_operation(self.operation, tensor, num_words)
        return apply_operation(self.operation, tensor)

    @property
    def reverse_op(self) -> ConversionOps:
        return KeyMapOperation(self.operation, not self.is_reverted)


class PadTokenRows(KeyMapOperation):
    """Adds the rows that folders of version 0.1 lack: their embedding has those of the words alone."""

    def __init__(self):
        super().__init__(TOKEN_ROWS)

    _counts_words = True

    def change(self, tensor: torch.Tensor, num_words: int | None) -> torch.Tensor:
        return pad_token_rows(tensor, factor_of(TOKEN_ROWS, tensor.shape)) if len(tensor) == num_words else tensor


class PaddingConverter(WeightConverter):
    """Pads an embedding of today's name, and has no way back: for saving, the key map's own entries are to find it."""

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        return WeightRenaming("^$", "^$")  # no name


_rows_as_stored: ContextVar[bool] = ContextVar("rows_as_stored", default=False)


class Transforms(list):
    """What `from_pretrained` does to a model's tensors; transformers copies it for every load."""

    def __deepcopy__(self, memo: dict[int, Any]) -> list[WeightConverter | WeightRenaming]:
        return [deepcopy(each, memo) for each in self if not (_rows_as_stored.get() and _pads_rows(each))]


def _pads_rows(transform: WeightConverter | WeightRenaming) -> bool:
    return any(isinstance(operation, PadTokenRows) for operation in getattr(transform, "operations", ()))


@contextmanager
def rows_as_stored() -> Iterator[None]:
    """Folders are loaded without padding an embedding of version 0.1. transformers writes whatever is converted to an
    `offload_folder`, also where the conversion would change nothing; without it weights are read in place."""
    token = _rows_as_stored.set(True)
    try:
        yield
    finally:
        _rows_as_stored.reset(token)


def register_key_map(model_type: str, *key_maps: KeyMap) -> None:
    """Lets `from_pretrained` load original files of these maps into models of `model_type`."""
    transforms = Transforms()
    for key_map in key_maps:
        for entry in key_map.entries:
            # To the end of the name: of ours, some begin like an original one.
            source, target = f"^{name_pattern(entry.source)}(?![\\w.])", target_pattern(entry)
            if entry.operation == KEEP:
                transforms.append(WeightRenaming(source, target))
            else:
                transforms.append(WeightConverter(source, target, operations=[KeyMapOperation(entry.operation)]))
    transforms.append(PaddingConverter(r"^((?:.*\.)?embed_tokens\.weight)$", r"\1", operations=[PadTokenRows()]))
    register_checkpoint_conversion_mapping(model_type, transforms, overwrite=True)
