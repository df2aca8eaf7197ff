"""VisualCLA as it was released: changes to two base models, and the parts that are its own.

A changed matrix is W + alpha / r · B · A, computed in fp32. Source: LoRA (arXiv:2106.09685); the names are those of
PEFT 0.3.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import OriginalCheckpointError
from .headers import TensorHeader
from .location import ADAPTER_CONFIG_NAME, TEXT_PREFIX, model_folder, tensors_of, text_tensors, vision_tensors
from .original import read_json


if TYPE_CHECKING:
    import torch


ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NAME_PREFIX = "base_model.model."
LORA_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
VOCABULARY_NAMES = (f"{TEXT_PREFIX}model.embed_tokens.weight", f"{TEXT_PREFIX}lm_head.weight")
NUM_ADDED_TOKENS = 4


@dataclass(frozen=True)
class LoraChange:
    """One matrix's `a (r, in)` and `b (out, r)`, or what is known of them."""

    a: torch.Tensor | TensorHeader
    b: torch.Tensor | TensorHeader
    scale: float

    def applied(self, weight: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.addmm(weight.float(), self.b.float(), self.a.float(), alpha=self.scale).to(weight.dtype)


@dataclass(frozen=True)
class Adapter:
    """An adapter's tensors by the names of the whole VisualCLA."""

    folder: Path
    changes: dict[str, LoraChange]
    own: dict[str, torch.Tensor | TensorHeader]
    """What takes a base's place, or has none there."""

    def applied(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A tensor of a base, or of what an earlier adapter made of it, with this one's change."""
        if name in self.own:
            return self.own[name].to(weight.dtype)
        return self.changes[name].applied(weight) if name in self.changes else weight


def read_adapter(folder: str | os.PathLike, read: Callable[[list[Path]], dict[str, Any]] = tensors_of) -> Adapter:
    """Reads an adapter; its tensors are mapped, or with `headers_of` none is read.

    Raises:
        OriginalCheckpointError: if it is of another kind, damaged, or lacks a half of a pair.
        OSError: if a file is missing.
    """
    folder = Path(folder)
    config_file = folder / ADAPTER_CONFIG_NAME
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} has no {ADAPTER_CONFIG_NAME}: it is no adapter.")
    config = read_json(config_file, "The adapter's configuration")
    weights = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{folder} has neither {' nor '.join(ADAPTER_FILES)}.")
    tensors = read([weights])
    scale = _scale(config, config_file)
    sides: dict[str, dict[str, Any]] = {}
    own: dict[str, Any] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(NAME_PREFIX)
        match = LORA_NAME.fullmatch(name)
        if match is None:
            # PEFT wraps modules that it saves whole, and some of its versions say so in the name.
            own[name.replace(".modules_to_save.default", "").replace(".modules_to_save", "")] = tensor
        else:
            sides.setdefault(f"{match['module']}.weight", {})[match["side"]] = tensor
    changes = {}
    for name, pair in sides.items():
        if len(pair) != 2:
            raise OriginalCheckpointError(f"{weights} has one half only of the change to {name}.")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise OriginalCheckpointError(
                f"The halves of the change to {name} in {weights} don't fit: {tuple(pair['A'].shape)} and "
                f"{tuple(pair['B'].shape)}."
            )
        changes[name] = LoraChange(pair["A"], pair["B"], scale)
    return Adapter(folder, changes, own)


def _scale(config: Mapping[str, Any], source: Path) -> float:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type") not in (None, "LORA") or not rank or alpha is None:
        raise OriginalCheckpointError(f"{source} is of no LoRA: it has no r and lora_alpha.")
    if config.get("fan_in_fan_out"):
        raise OriginalCheckpointError(f"{source} says fan_in_fan_out, which VisualCLA's layers don't have.")
    return alpha / rank


def changed_matrices(
    text_model: str | os.PathLike, vision_model: str | os.PathLike, adapter: str | os.PathLike, hub: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """What an adapter changes, without the changes: the bases' own tensors, by the names of the whole VisualCLA.

    Args:
        text_model, vision_model, adapter: folders or Hub ids.
        hub: where the adapter comes from.
    """
    text, vision = (model_folder(name, without_revision(hub)) for name in (text_model, vision_model))
    tensors = {**text_tensors(text), **vision_tensors(vision)}
    return {name: tensors[name] for name in read_adapter(model_folder(adapter, hub)).changes}


def without_revision(hub: Mapping[str, Any]) -> dict[str, Any]:
    """Where the bases come from: a revision is one of the adapter's repository."""
    return {name: value for name, value in hub.items() if name != "revision"}


def check_bases(
    adapter: str | os.PathLike,
    text_model: str | os.PathLike | None,
    vision_model: str | os.PathLike | None,
) -> None:
    """Raises a ValueError that names the bases which are missing."""
    missing = [
        f"{argument} ({what})"
        for argument, value, what in (
            ("text_model", text_model, "Chinese-Alpaca-Plus-7B, merged from LLaMA-7B and its two LoRAs"),
            ("vision_model", vision_model, "openai/clip-vit-large-patch14"),
        )
        if value is None
    ]
    if missing:
        raise OriginalCheckpointError(
            f"{adapter} is VisualCLA's adapter alone, which holds changes to two base models: give "
            f"{' and '.join(missing)}."
        )


def check_adapter(shapes: Mapping[str, tuple[int, ...]], adapter: Adapter, text_model: Path) -> None:
    """Compares an adapter with the shapes of what it changes, by original names.

    Raises:
        OriginalCheckpointError: if it changes what the bases don't have, or is of another vocabulary or size.
    """
    check_vocabulary(shapes, adapter, text_model)
    unknown = [name for name in adapter.changes if name not in shapes]
    if unknown:
        raise OriginalCheckpointError(
            f"{adapter.folder} changes {len(unknown)} matrices that the bases don't have ({', '.join(unknown[:3])})."
        )
    for name, change in adapter.changes.items():
        wants = (change.b.shape[0], change.a.shape[1])
        if shapes[name] != wants:
            raise OriginalCheckpointError(
                f"{adapter.folder} changes {name} of {wants}, but the base's is {tuple(shapes[name])}: it is "
                "of another model or size."
            )


def check_vocabulary(shapes: Mapping[str, tuple[int, ...]], adapter: Adapter, text_model: Path) -> None:
    """Raises [`OriginalCheckpointError`] if the language model isn't the one that the adapter was made for."""
    name = VOCABULARY_NAMES[0]
    if name not in adapter.own or name not in shapes:
        return
    has, wants = shapes[name][0], adapter.own[name].shape[0]
    if has not in (wants - NUM_ADDED_TOKENS, wants):
        raise OriginalCheckpointError(
            f"{text_model} has a vocabulary of {has:,} tokens, but the adapter was made for one of "
            f"{wants - NUM_ADDED_TOKENS:,} (and adds {NUM_ADDED_TOKENS}): it needs Chinese-Alpaca-Plus-7B, which is "
            "LLaMA-7B with chinese-llama-plus-lora-7b and chinese-alpaca-plus-lora-7b merged into it."
        )


def adapted_tensors(
    text_model: Path, vision_model: Path, adapters: Sequence[str | os.PathLike]
) -> dict[str, torch.Tensor]:
    """The whole VisualCLA of two bases and one or several adapters, one after the other, by original names.

    Raises:
        OriginalCheckpointError: if an adapter changes what the bases don't have, or of another shape.
    """
    from tqdm.auto import tqdm

    tensors = {**text_tensors(text_model), **vision_tensors(vision_model)}
    for folder in adapters:
        adapter = read_adapter(folder)
        check_adapter({name: tensor.shape for name, tensor in tensors.items()}, adapter, text_model)
        for name in tqdm(adapter.changes, desc="Applying the adapter", disable=None):
            tensors[name] = adapter.applied(name, tensors[name])
        tensors |= {name: adapter.applied(name, tensors.get(name, own)) for name, own in adapter.own.items()}
    return tensors
