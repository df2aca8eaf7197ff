"""The siblings' checkpoints as the converter takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import GenerationConfig

from ..checkpoints.configurations import read_config
from ..checkpoints.errors import OriginalCheckpointError
from ..checkpoints.location import (
    ADAPTER,
    MERGED,
    TEXT_FOLDER,
    VISION_FOLDER,
    Location,
    Original,
    find_original,
    json_object,
    tensors_of,
    weight_paths,
)
from ..checkpoints.sibling_original import (
    TEXT_PREFIX,
    VISION_PREFIX,
    check_tensors,
    converted_tensors,
    original_tensors,
    with_stored_sizes,
)
from ..checkpoints.tensor_files import SafetensorsFolder, TensorSpec
from ..families.family import FAMILIES
from ..modeling.configuration_vision_resampler import VisionResamplerConfig
from .plan import TRANSFORMERS_WEIGHTS, Checkpoint, Part, extra_tensors


# Of a generation_config.json that today's rules refuse; the rest is the originals' presets anyhow.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class SiblingCheckpoint(Checkpoint):
    """A sibling's tensors by their original names."""

    made_by: list[str] = field(default_factory=list)
    """The command but for the new folder's name, if it isn't `convert`."""
    places: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Of the original tensors, the file within the folder and the name in it; empty if they come from elsewhere."""

    @property
    def command(self) -> list[str]:
        return self.made_by or ["viscpm-hf", "convert", self.location.path.name]

    def place_of(self, name: str) -> dict[str, str]:
        if name not in self.places:
            return {}
        file, key = self.places[name]
        return {"source_file": file} | ({"source_key": key} if key != name else {})

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
    sibling = find_original(location.path)
    if sibling.layout == ADAPTER:
        raise OriginalCheckpointError(
            f"{location.name} is VisualCLA's adapter alone, which holds changes to two base models; merge it with "
            f"them: {merge_command(location.name)}"
        )
    tensors = original_tensors(sibling)
    parts = {"": ""}
    if sibling.layout == MERGED:
        parts |= {TEXT_FOLDER: TEXT_PREFIX, VISION_FOLDER: VISION_PREFIX}
    files, places = [], {}
    for part, prefix in parts.items():
        for path in weight_paths(location.path / part):
            files.append(path)
            file = path.relative_to(location.path).as_posix()
            for key in tensors_of([path]):
                # CLIP's tensors may lack the word that its whole model has before them.
                name = next((name for name in (prefix + key, 2 * prefix + key) if name in tensors), None)
                if name is not None:
                    places[name] = (file, key)
    checkpoint = checkpoint_of(location, sibling, tensors, files, places=places)
    # All that lies beside the weights and isn't written anew from them, to be given back on the way back.
    for folder in parts:
        for path in sorted((location.path / folder).glob("*.json")):
            checkpoint.original_configs[path.relative_to(location.path).as_posix()] = json_object(path)
    return checkpoint


def merge_command(adapter: str) -> str:
    return (
        "viscpm-hf merge visualcla --text-model CHINESE-ALPACA-PLUS-7B --vision-model CLIP-VIT-LARGE-PATCH14 "
        f"--lora-model {adapter} OUT"
    )


def checkpoint_of(
    location: Location,
    sibling: Original,
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
    kind = sibling.kind
    config = sibling.family.config_class.from_dict(dict(sibling.config))
    part = Part("", TRANSFORMERS_WEIGHTS, sibling.family.key_maps[0])
    checkpoint = checkpoint_class(
        location,
        kind,
        tensors,
        [part],
        weight_files,
        config,
        None,
        {"config.json": dict(sibling.config)},
        made_by=made_by or [],
        **own,
    )
    tensors = empty_tensors(kind, checkpoint.specs())
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    checkpoint.config = with_stored_sizes(config, shapes, sibling)
    check_tensors(tensors, sibling.family.model_class, checkpoint.config, location.path)
    return checkpoint


def empty_tensors(kind: str, specs: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """Tensors without values, by our names."""
    empty = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    return converted_tensors(kind, empty)


def open_converted_sibling(location: Location) -> SiblingCheckpoint:
    """Maps a converted folder.

    Raises:
        ConversionError, OSError: if it is damaged.
    """
    config: VisionResamplerConfig = read_config(location.path)
    weights = SafetensorsFolder(location.path, TRANSFORMERS_WEIGHTS)
    part = Part("", TRANSFORMERS_WEIGHTS, FAMILIES[location.kind].key_maps[0])
    files = [location.path / file for file in weights.files]
    tensors = {**weights.state_dict(), **extra_tensors(location.path)}
    return SiblingCheckpoint(location, location.kind, tensors, [part], files, config, None)
