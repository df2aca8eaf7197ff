"""VisualCLA's release, a pair of base models and one or more adapters, as one folder.

Matrix after matrix goes from the mapped bases to the new files, so memory stays at a few matrices however big the
models are. What changes a matrix is added in fp32, of several adapters one after the other, and rounded once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..checkpoints.errors import OriginalCheckpointError
from ..checkpoints.location import (
    ADAPTER,
    ORIGINAL_FOLDER,
    Location,
    find_original,
    hub_arguments_for,
    model_folder,
    text_tensors,
    vision_tensors,
    weight_paths,
)
from ..checkpoints.tensor_files import TensorSpec
from ..checkpoints.visualcla_adapter import (
    ADAPTER_FILES,
    Adapter,
    check_adapter,
    check_bases,
    read_adapter,
    without_revision,
)
from .convert import ConversionResult, parse_dtype, parse_size, run_plan
from .plan import Checkpoint, spec_of
from .planning import checkpoint_of, plan_conversion


class MergedTensors(Mapping[str, torch.Tensor]):
    """The whole VisualCLA's tensors by original names, each computed when it is asked for.

    Args:
        bases: both bases' tensors.
        adapters: what changes them, the first one first.
    """

    def __init__(self, bases: Mapping[str, torch.Tensor], adapters: Sequence[Adapter]):
        self.bases, self.adapters = bases, adapters
        self.specs: dict[str, TensorSpec] = {name: spec_of(name, tensor) for name, tensor in bases.items()}

    @classmethod
    def checked(
        cls, bases: Mapping[str, torch.Tensor], adapters: Sequence[Adapter], text_model: Path
    ) -> MergedTensors:
        """Raises [`OriginalCheckpointError`] if an adapter is of other bases."""
        merged = cls(bases, adapters)
        for adapter in adapters:
            shapes = {name: torch.Size(spec.shape) for name, spec in merged.specs.items()}
            check_adapter(shapes, adapter, text_model)
            merged.specs |= {name: spec_of(name, tensor) for name, tensor in adapter.own.items()}
            merged.specs |= {
                name: TensorSpec(name, torch.float32, merged.specs[name].shape) for name in adapter.changes
            }
        return merged

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.bases.get(name)
        for adapter in self.adapters:
            if name in adapter.own:
                tensor = adapter.own[name]
            elif name in adapter.changes:
                tensor = adapter.changes[name].applied(tensor.float())
        if tensor is None:
            raise KeyError(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


@dataclass
class MergedCheckpoint(Checkpoint):
    """A checkpoint of [`MergedTensors`]."""

    names: dict[Path, str] = field(default_factory=dict)
    """What the files of weights are called; those of different folders may be called the same."""

    def specs(self) -> dict[str, TensorSpec]:
        return dict(self.tensors.specs)

    def source_name(self, path: Path) -> str:
        return self.names[path]


def merge_visualcla(
    text_model: str | os.PathLike | None,
    vision_model: str | os.PathLike | None,
    lora_model: str | os.PathLike | Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "float16",
    max_shard_size: int | str = "5GB",
    dry_run: bool = False,
    resume: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    show_progress: bool = False,
) -> ConversionResult:
    """Merges VisualCLA's adapters into their base models.

    Args:
        text_model: Chinese-Alpaca-Plus-7B, a folder or Hub id.
        vision_model: CLIP-L/14 or its vision tower, likewise.
        lora_model: the released adapter; several, or text with commas, are merged one after the other. Tokenizer and
            configuration are the last one's.
        output: the new folder, as [`convert`] writes it. It appears complete or not at all.
        dtype: of the new files: float16, bfloat16 or float32.
        revision: of the adapters' Hub repositories.
        token, cache_dir: of the Hub.
        max_shard_size, dry_run, resume, verify, overwrite, show_progress: see [`convert`].

    Raises:
        OriginalCheckpointError: if bases are missing, or aren't those of the adapter.
        ConversionError: if the output can't be written there.
        OSError: if files can't be read or written.
    """
    wanted, shard_bytes = parse_dtype(dtype), parse_size(max_shard_size)
    if wanted is None:
        raise ValueError("What is computed has no dtype to keep: choose float16, bfloat16 or float32.")
    adapters = _adapter_names(lora_model)
    check_bases(adapters[-1], text_model, vision_model)
    given = {"revision": revision, "token": token, "cache_dir": cache_dir}
    hub = hub_arguments_for(text_model, vision_model, *adapters, **given)
    checkpoint, sources = open_release(text_model, vision_model, adapters, hub)
    return run_plan(
        checkpoint,
        plan_conversion(checkpoint, wanted, shard_bytes),
        output,
        sources=sources,
        dry_run=dry_run,
        resume=resume,
        verify=verify,
        overwrite=overwrite,
        show_progress=show_progress,
    )


def _adapter_names(lora_model: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    if isinstance(lora_model, str):
        lora_model = lora_model.split(",")
    elif isinstance(lora_model, os.PathLike):
        lora_model = [lora_model]
    names = [os.fspath(name).strip() for name in lora_model]
    if not names or not all(names):
        raise ValueError(f"The adapters are folders or Hub ids with commas between them, got {','.join(names)!r}.")
    return names


def open_release(
    text_model: str | os.PathLike,
    vision_model: str | os.PathLike,
    lora_models: Sequence[str],
    hub: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[MergedCheckpoint, list[Path]]:
    """Maps bases and adapters, checks that they belong together; also returns their folders."""
    text, vision = (model_folder(name, without_revision(hub)) for name in (text_model, vision_model))
    folders = [model_folder(name, hub) for name in lora_models]
    adapters = [read_adapter(folder) for folder in folders]
    sibling = find_original(folders[-1])
    if sibling is None or sibling.layout != ADAPTER:
        raise OriginalCheckpointError(
            f"{folders[-1]} is no adapter of VisualCLA: its config.json is of another model."
        )
    tensors = MergedTensors.checked({**text_tensors(text), **vision_tensors(vision)}, adapters, text)
    names = {path: f"text_model/{path.name}" for path in weight_paths(text)}
    names |= {path: f"vision_model/{path.name}" for path in weight_paths(vision)}
    for number, folder in enumerate(folders, start=1):
        path = _adapter_file(folder)
        names[path] = f"lora_model/{path.name}" if number == 1 else f"lora_model_{number}/{path.name}"
    command = ["viscpm-hf", "merge", "visualcla", "--text-model", text.name, "--vision-model", vision.name]
    command += ["--lora-model", ",".join(folder.name for folder in folders)]
    location = Location(lora_models[-1], folders[-1], ORIGINAL_FOLDER, sibling.kind, sibling)
    checkpoint = checkpoint_of(MergedCheckpoint, location, tensors, list(names), made_by=command, names=names)
    return checkpoint, [text, vision, *folders]


def _adapter_file(folder: Path) -> Path:
    return next(folder / name for name in ADAPTER_FILES if (folder / name).is_file())


__all__ = ["MergedTensors", "merge_visualcla"]
