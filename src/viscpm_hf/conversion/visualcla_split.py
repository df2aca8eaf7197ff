"""VisualCLA's adapter in two halves, as text-generation-webui's plugin takes them.

One changes the language model and is a plain LoRA of it, with the tokenizer that it needs; the other changes the
vision tower and brings the parts that are VisualCLA's own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.errors import OriginalCheckpointError
from ..checkpoints.location import (
    ADAPTER,
    ADAPTER_CONFIG_NAME,
    TEXT_PREFIX,
    VISION_PREFIX,
    find_original,
    hub_arguments_for,
    model_folder,
)
from ..checkpoints.original import read_json
from ..checkpoints.tensor_files import ArchiveWriter, pieces
from ..checkpoints.visualcla_adapter import NAME_PREFIX, Adapter, read_adapter
from .folder_files import write_json
from .plan import spec_of
from .workspace import Workspace


TEXT_SUFFIX, VISION_SUFFIX = "_text_lora_model_tgwebui", "_vision_lora_model_tgwebui"
RESAMPLER_CONFIG = "visual_resampler_config"
# Parts of VisualCLA's own, and their files.
OWN_PARTS = {
    "visual_resampler.": "visual_resampler_model.bin",
    "image_projection_layer.": "image_projection_layer_model.bin",
}
TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
IMAGE_FILES = ("preprocessor_config.json",)


def split_visualcla(
    lora_model: str | os.PathLike,
    output: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> list[Path]:
    """Writes both halves into a new folder, named after the adapter.

    Args:
        lora_model: the released adapter, a folder or Hub id.
        output: the new folder. It appears complete or not at all.
        revision, token, cache_dir: of the adapter's Hub repository.

    Returns:
        The halves' folders, the language model's first.

    Raises:
        OriginalCheckpointError: if it is no adapter of VisualCLA, or lacks one of the parts.
        ConversionError: if the output can't be written there.
        OSError: if files can't be read or written.
    """
    given = {"revision": revision, "token": token, "cache_dir": cache_dir}
    folder = model_folder(lora_model, hub_arguments_for(lora_model, **given))
    adapter = read_adapter(folder)
    sibling = find_original(folder)
    if sibling is None or sibling.layout != ADAPTER:
        raise OriginalCheckpointError(f"{folder} is no adapter of VisualCLA: its config.json is of another model.")
    resampler = sibling.config.get(RESAMPLER_CONFIG)
    missing = [part for part in OWN_PARTS if not _of_part(adapter.own, part)]
    if missing or resampler is None:
        raise OriginalCheckpointError(f"{folder} lacks {', '.join(missing) or RESAMPLER_CONFIG}: it is incomplete.")

    workspace = Workspace(output, [folder], resume=None, overwrite=False)
    with workspace.open({"split": folder.name}):
        text, vision = (workspace.path / f"{folder.resolve().name}{suffix}" for suffix in (TEXT_SUFFIX, VISION_SUFFIX))
        _write_half(adapter, TEXT_PREFIX, text, {"task_type": "CAUSAL_LM"})
        _write_half(adapter, VISION_PREFIX, vision, {"task_type": None})
        for part, file in OWN_PARTS.items():
            _write(vision / file, _of_part(adapter.own, part))
        write_json(vision / f"{RESAMPLER_CONFIG}.json", resampler)
        for target, names in ((text, TOKENIZER_FILES), (vision, IMAGE_FILES)):
            for name in names:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, target / name)
        workspace.complete()
    return [workspace.output / path.name for path in (text, vision)]


def _of_part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _write_half(adapter: Adapter, prefix: str, folder: Path, changed: Mapping[str, Any]) -> None:
    """The changes to one base, by its own names, as an adapter of that base."""
    folder.mkdir()
    own = _of_part(adapter.own, prefix)
    changes = {name: change for name, change in adapter.changes.items() if name.startswith(prefix)}
    if not changes:
        raise OriginalCheckpointError(f"{adapter.folder} changes nothing in {prefix.rstrip('.')}: it is incomplete.")
    tensors = {NAME_PREFIX + name: tensor for name, tensor in own.items()}
    for name, change in changes.items():
        module = NAME_PREFIX + name.removeprefix(prefix).removesuffix(".weight")
        tensors |= {f"{module}.lora_A.weight": change.a, f"{module}.lora_B.weight": change.b}
    config = read_json(adapter.folder / ADAPTER_CONFIG_NAME, "The adapter's configuration")
    modules = (name.removesuffix(".weight").rpartition(".")[2] for name in changes)
    config |= {
        "target_modules": sorted(set(modules)),
        "modules_to_save": sorted({name.removesuffix(".weight").rpartition(".")[2] for name in own}) or None,
        **changed,
    }
    write_json(folder / ADAPTER_CONFIG_NAME, config)
    _write(folder / "adapter_model.bin", tensors)


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    writer = ArchiveWriter(path, [spec_of(name, tensor) for name, tensor in tensors.items()])
    try:
        for name, tensor in tensors.items():
            writer.write(name, pieces(tensor))
        writer.finish_unhashed()
    except BaseException:
        writer.close()
        raise


__all__ = ["split_visualcla"]
