"""What a checkpoint consists of, and what a conversion of it writes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from ..checkpoints.errors import OriginalCheckpointError
from ..checkpoints.location import (
    Location,
)
from ..checkpoints.readers import reader_of
from ..checkpoints.tensor_files import TensorSpec
from ..checkpoints.transfer import TensorTransfer
from ..families import key_maps
from ..families.family import FAMILIES, Family
from ..modeling.generation_cpm_bee import CpmBeeGenerationMixin


# Names of weights without the endings, as the two libraries have them.
TRANSFORMERS_WEIGHTS, DIFFUSERS_WEIGHTS = "model", "diffusion_pytorch_model"


# The model has no use for these tensors; with them the original file can be had back.
EXTRAS_NAME = "original_extras.safetensors"

# Of a generation_config.json that today's rules refuse; the rest of such a one is the originals' presets anyhow.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Part:
    """A model of a checkpoint, in a folder of its own."""

    folder: str
    """`""` for the checkpoint's own."""
    weights_name: str
    key_map: key_maps.KeyMap
    source_prefix: str = ""
    """Before the names in `Checkpoint.tensors`; the map doesn't know it."""


@dataclass
class Checkpoint:
    """A checkpoint whose tensors are mapped and whose configurations are read."""

    location: Location
    kind: str
    tensors: Mapping[str, torch.Tensor]
    parts: list[Part]
    weight_files: list[Path]
    config: PreTrainedConfig | None
    """Of the model, for Paint of its text encoder."""
    vocab: Path | None
    """`vocab.txt`; None where the vocabulary is of another kind."""
    original_configs: dict[str, Any] = field(default_factory=dict)
    """The original's JSON files by their names, to be given back on the way back."""
    diffusion: Any = None
    """Paint's UNet, VAE and scheduler configurations."""
    places: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Of the original tensors, the file within the folder and the name in it; empty if there is one file, or they
    come from elsewhere."""
    made_by: list[str] = field(default_factory=list)
    """The command but for the new folder's name, if it isn't `convert`."""

    @property
    def family(self) -> Family:
        return FAMILIES[self.kind]

    @property
    def command(self) -> list[str]:
        """What it is converted by, up to the name of the new folder."""
        source = self.location.path if self.family.shares_model_type else self.weight_files[0]
        return self.made_by or ["viscpm-hf", "convert", source.name]

    def specs(self) -> dict[str, TensorSpec]:
        """Names, dtypes and shapes of the tensors, of which none is read."""
        return {name: spec_of(name, tensor) for name, tensor in self.tensors.items()}

    def empty_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors without values."""
        return {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in self.specs().items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors as `from_pretrained` takes them."""
        return reader_of(self.kind).state_dict(self.tensors, self.family.model_class, self.config, self.location.name)

    def generation_config(self) -> GenerationConfig | None:
        """The checkpoint's own, if it has one."""
        if not (self.location.folder / GENERATION_CONFIG_NAME).is_file():
            return None
        config = GenerationConfig.from_pretrained(self.location.folder)
        try:
            config.validate(strict=True)
        except ValueError:
            return GenerationConfig(**{name: getattr(config, name) for name in TOKEN_IDS})
        return config

    def place_of(self, name: str) -> dict[str, str]:
        """For the manifest: the file of an original tensor and its name there, where the tensor's own name doesn't
        tell them."""
        if name not in self.places:
            return {}
        file, key = self.places[name]
        return {"source_file": file} | ({"source_key": key} if key != name else {})

    def set_generation(self, model: Any) -> None:
        """Gives a model of the checkpoint its generation configuration."""
        model.generation_config = self.generation_config() or model.generation_config
        if isinstance(model, CpmBeeGenerationMixin):
            model.set_default_generation()

    def source_name(self, path: Path) -> str:
        """The name of one of the files of weights."""
        folder = self.location.folder
        return path.relative_to(folder).as_posix() if folder in path.parents else path.name


@dataclass(frozen=True)
class FilePlan:
    """A file of tensors."""

    path: str
    """Relative to the new folder."""
    tensors: tuple[TensorTransfer, ...]
    is_model: bool = True
    """Whether a model loads it."""

    @property
    def nbytes(self) -> int:
        return sum(transfer.target.nbytes for transfer in self.tensors)


@dataclass(frozen=True)
class ConversionPlan:
    """Everything that is written, in order."""

    files: tuple[FilePlan, ...]
    dropped: dict[str, str] = field(default_factory=dict)
    """Tensors that no model needs, and why."""
    dtype: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def num_parameters(self) -> int:
        return sum(transfer.target.numel for file in self.files if file.is_model for transfer in file.tensors)

    def file_of_dropped(self, name: str) -> str | None:
        kept = (file for file in self.files if not file.is_model)
        return next((file.path for file in kept if any(t.target.name == name for t in file.tensors)), None)

    def stored_dtype(self, folder: str = "") -> torch.dtype:
        """The dtype of most of a part's values."""
        counts: dict[torch.dtype, int] = {}
        for file in self.files:
            if file.is_model and os.path.dirname(file.path) == folder:
                for transfer in file.tensors:
                    counts[transfer.target.dtype] = counts.get(transfer.target.dtype, 0) + transfer.target.numel
        return max(counts, key=counts.__getitem__)


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, tensor.dtype, tuple(tensor.shape))


def check_vocabulary(vocab: Path, config: PreTrainedConfig) -> None:
    """Raises [`OriginalCheckpointError`] if the vocabulary isn't the model's."""
    from ..modeling.tokenization_cpm_bee import load_vocab

    tokens, rows = len(load_vocab(vocab)), config.get_text_config(decoder=True).num_words
    if tokens != rows:
        raise OriginalCheckpointError(
            f"The vocabulary {vocab} has {tokens:,} tokens, but the model {rows:,}: they are not of the same "
            "checkpoint."
        )


def extra_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What a conversion put aside, by the original's names."""
    from ..checkpoints.tensor_files import mapped_tensors

    path = folder / EXTRAS_NAME
    return mapped_tensors(path) if path.is_file() else {}
