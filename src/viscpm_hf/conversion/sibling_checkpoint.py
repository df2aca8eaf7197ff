"""The siblings' checkpoints as the converter takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..checkpoints.configurations import read_config
from ..checkpoints.errors import OriginalCheckpointError
from ..checkpoints.location import Location
from ..checkpoints.sibling_original import (
    ADAPTER,
    CONFIG_CLASSES,
    MERGED,
    TEXT_FOLDER,
    VISION_FOLDER,
    OriginalSibling,
    check_tensors,
    converted_tensors,
    find_original_sibling,
    original_tensors,
    weight_paths,
    with_stored_sizes,
)
from ..checkpoints.tensor_files import SafetensorsFolder, TensorSpec
from ..families.sibling_key_maps import KEY_MAPS
from ..modeling.configuration_vision_resampler import VisionResamplerConfig
from .planning import TRANSFORMERS_WEIGHTS, Checkpoint, Part


# Of a generation_config.json that today's rules refuse; the rest is the originals' presets anyhow.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class SiblingCheckpoint(Checkpoint):
    """A sibling's tensors by their original names."""

    made_by: list[str] = field(default_factory=list)
    """The command but for the new folder's name, if it isn't `convert`."""

    @property
    def command(self) -> list[str]:
        return self.made_by or ["viscpm-hf", "convert", self.location.path.name]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return converted_tensors(self.kind, self.tensors)

    def generation_config(self) -> GenerationConfig | None:
        """The checkpoint's own, if it has one."""
        if not (self.location.path / "generation_config.json").is_file():
            return None
        config = GenerationConfig.from_pretrained(self.location.path)
        try:
            config.validate(strict=True)
        except ValueError:
            return GenerationConfig(**{name: getattr(config, name) for name in _TOKEN_IDS})
        return config


def open_sibling(location: Location) -> SiblingCheckpoint:
    """Maps an original checkpoint and checks that it is complete.

    Raises:
        OriginalCheckpointError: if it isn't, or is an adapter alone.
        FileNotFoundError: if a file is missing.
    """
    sibling = find_original_sibling(location.path)
    if sibling.layout == ADAPTER:
        raise OriginalCheckpointError(
            f"{location.name} is VisualCLA's adapter alone, which holds changes to two base models; merge it with "
            f"them: {merge_command(location.name)}"
        )
    tensors = original_tensors(sibling)
    folders = [location.path]
    if sibling.layout == MERGED:
        folders += [location.path / TEXT_FOLDER, location.path / VISION_FOLDER]
    files = [path for folder in folders for path in weight_paths(folder)]
    return checkpoint_of(location, sibling, tensors, files)


def merge_command(adapter: str) -> str:
    return (
        "viscpm-hf merge visualcla --text-model CHINESE-ALPACA-PLUS-7B --vision-model CLIP-VIT-LARGE-PATCH14 "
        f"--lora-model {adapter} OUT"
    )


def checkpoint_of(
    location: Location,
    sibling: OriginalSibling,
    tensors: Mapping[str, torch.Tensor],
    weight_files: list[Path],
    made_by: list[str] | None = None,
    checkpoint_class: type[SiblingCheckpoint] = SiblingCheckpoint,
    **own,
) -> SiblingCheckpoint:
    """A checkpoint of original tensors with the configuration that they need, checked; `own` are fields of its class.

    Raises:
        OriginalCheckpointError: if tensors are missing, unknown, or of another shape.
    """
    kind = sibling.model_type
    config = CONFIG_CLASSES[kind].from_dict(dict(sibling.original_config))
    part = Part("", TRANSFORMERS_WEIGHTS, KEY_MAPS[kind])
    checkpoint = checkpoint_class(
        location,
        kind,
        tensors,
        [part],
        weight_files,
        config,
        None,
        {"config.json": sibling.original_config},
        made_by=made_by or [],
        **own,
    )
    tensors = empty_tensors(kind, checkpoint.specs())
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    checkpoint.config = with_stored_sizes(config, shapes, location.path)
    check_tensors(tensors, model_class_of(kind), checkpoint.config, location.path)
    return checkpoint


def empty_tensors(kind: str, specs: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """Tensors without values, by our names."""
    empty = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    return converted_tensors(kind, empty)


def model_class_of(kind: str) -> type[PreTrainedModel]:
    from ..loading.sibling_models import MODEL_CLASSES

    return MODEL_CLASSES[kind]


def open_converted_sibling(location: Location) -> SiblingCheckpoint:
    """Maps a converted folder."""
    config: VisionResamplerConfig = read_config(location.path)
    weights = SafetensorsFolder(location.path, TRANSFORMERS_WEIGHTS)
    part = Part("", TRANSFORMERS_WEIGHTS, KEY_MAPS[location.kind])
    files = [location.path / file for file in weights.files]
    return SiblingCheckpoint(location, location.kind, weights.state_dict(), [part], files, config, None)
