"""What an original checkpoint of the siblings is; no weight is read."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints.errors import ConversionError, OriginalCheckpointError
from ..checkpoints.location import (
    ADAPTER,
    MERGED,
    TEXT_FOLDER,
    VISION_FOLDER,
    Location,
    Original,
    find_original,
    weight_paths,
)
from ..checkpoints.sibling_original import original_tensors, problems_of, with_stored_sizes
from ..checkpoints.tensor_files import TensorSpec
from ..checkpoints.visualcla_adapter import ADAPTER_FILES, read_adapter
from .inspection import Inspection, convert_command, inspection
from .plan import spec_of
from .sibling_checkpoint import empty_tensors, merge_command


TOKENIZERS = ("tokenizer.model", "tokenizer.json")
# Beginnings of original names; all others are the language model's.
PARTS = {
    "omnilmm": (("model.vision_tower.", "vision tower"), ("model.resampler.", "resampler")),
    "minicpmv": (("vpm.", "vision tower"), ("resampler.", "resampler")),
    "visualcla": (
        ("vision_model.", "vision tower"),
        ("visual_resampler.", "resampler"),
        ("image_projection_layer.", "resampler"),
    ),
}
BASES = (
    "text_model (Chinese-Alpaca-Plus-7B, which the adapter changes)",
    "vision_model (openai/clip-vit-large-patch14, likewise)",
)


def inspect_sibling(location: Location) -> Inspection:
    """Inspects an original folder, or a Hub repository of which only the configuration is at hand."""
    sibling = find_original(location.path)
    missing = [] if _has_tokenizer(location.path) else [f"tokenizer ({' or '.join(TOKENIZERS)})"]
    if sibling.layout == ADAPTER:
        return _inspect_adapter(location, sibling, missing)
    folders = [location.path]
    if sibling.layout == MERGED:
        folders += [location.path / TEXT_FOLDER, location.path / VISION_FOLDER]
    files: dict[str, int] = {}
    specs: dict[str, TensorSpec] = {}
    problems: list[str] = []
    try:
        for folder in folders:
            for path in weight_paths(folder):
                files[path.relative_to(location.path).as_posix()] = path.stat().st_size
        specs = {name: spec_of(name, tensor) for name, tensor in original_tensors(sibling).items()}
    except FileNotFoundError as error:
        missing.append(str(error))
    except (ConversionError, OriginalCheckpointError) as error:
        problems.append(str(error))
    config, surplus = None, []
    try:
        config = sibling.family.config_class.from_dict(dict(sibling.config))
    except ValueError as error:
        problems.append(" ".join(str(error).split()))
    if config is not None and specs:
        tensors = empty_tensors(sibling.kind, specs)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        config = with_stored_sizes(config, shapes, sibling)
        found = problems_of(tensors, sibling.family.model_class, config)
        missing += found.missing
        surplus = list(found.unexpected)
        problems += [*found.misshaped, *found.mistyped]
    return _inspection(
        location,
        sibling,
        files,
        specs,
        config,
        is_sharded=len(files) > len(folders),
        missing=missing,
        surplus=surplus,
        problems=problems,
        next_command=convert_command(location.name.rstrip("/"), []),
    )


def _inspect_adapter(location: Location, sibling: Original, missing: list[str]) -> Inspection:
    """The changes alone: what they are changes to is missing."""
    missing = [*BASES, *missing]
    config = sibling.family.config_class.from_dict(dict(sibling.config))
    files = {name: (location.path / name).stat().st_size for name in ADAPTER_FILES if (location.path / name).is_file()}
    specs: dict[str, TensorSpec] = {}
    problems = []
    try:
        adapter = read_adapter(location.path)
        specs = {name: spec_of(name, tensor) for name, tensor in adapter.own.items()}
        for name, change in adapter.changes.items():
            specs |= {f"{name}.{side}": spec_of(name, half) for side, half in (("A", change.a), ("B", change.b))}
    except FileNotFoundError as error:
        missing.append(str(error))
    except OriginalCheckpointError as error:
        problems.append(str(error))
    return _inspection(
        location,
        sibling,
        files,
        specs,
        config,
        missing=missing,
        problems=problems,
        next_command=merge_command(location.name),
    )


def _inspection(
    location: Location, sibling: Original, files: dict[str, int], specs: dict[str, TensorSpec], config, **known
) -> Inspection:
    parts = [(_part(sibling.kind, name), spec) for name, spec in specs.items()]
    return inspection(location, sibling.kind, files, parts, config, **known)


def _part(model_type: str, name: str) -> str:
    return next((part for prefix, part in PARTS[model_type] if name.startswith(prefix)), "language model")


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


__all__ = ["inspect_sibling"]
