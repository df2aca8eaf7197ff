"""Folders of LoRA adapters, as fine-tuning leaves them: which model they belong to, and putting them on it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from ..version import OLDEST, require
from .errors import OriginalCheckpointError
from .headers import safetensors_header
from .json_files import load_json


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, ProcessorMixin


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."  # peft's, before the names of the model's layers
PROCESSOR_CONFIG = "processor_config.json"


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter and the model that it was trained on."""

    path: Path
    base: str | None
    """File, folder or Hub id; None if the folder doesn't say."""

    @classmethod
    def find(cls, path: str | os.PathLike) -> AdapterFolder | None:
        """The adapter in a folder; None if it holds something else."""
        path = Path(path)
        if not (path / ADAPTER_CONFIG).is_file() or (path / "config.json").is_file():
            return None
        try:
            config = load_json(path / ADAPTER_CONFIG)
            return cls(path, config.get("base_model_name_or_path"))
        except (ValueError, AttributeError) as error:
            raise OriginalCheckpointError(f"{path / ADAPTER_CONFIG} is no adapter's configuration: {error}") from error

    def require_base(self) -> str:
        if not self.base:
            raise OriginalCheckpointError(
                f"{self.path} doesn't say which model it is an adapter of: load that model, then `model.load_adapter`."
            )
        return self.base

    def prepare(self, model: PreTrainedModel, processor: ProcessorMixin) -> ProcessorMixin:
        """Makes a model ready for the adapter, in place: its image size is the one that the adapter was trained at.

        Returns:
            The processor in the adapter's folder, or else the one given.

        Raises:
            ImportError: without the library peft, or if it is too old.
            OriginalCheckpointError: if the adapter is another model's.
        """
        if find_spec("peft") is None:
            raise ImportError(
                f'{self.path} is an adapter, which needs peft: pip install -c constraints.txt ".[train]".'
            )
        require(peft=OLDEST["peft"])
        if not (self.path / ADAPTER_WEIGHTS).is_file():
            raise OriginalCheckpointError(f"{self.path} has no {ADAPTER_WEIGHTS}: the adapter is not complete.")
        safetensors_header(self.path / ADAPTER_WEIGHTS)  # the library's own errors name no file
        with safe_open(self.path / ADAPTER_WEIGHTS, "pt") as weights:
            modules = dict(model.named_modules())
            for key in weights.keys():
                self._check_fit(modules, key, weights.get_slice(key).get_shape())
        if (self.path / PROCESSOR_CONFIG).is_file():
            processor = type(processor).from_pretrained(self.path)
        model.take_images_of(processor)
        return processor

    def apply(self, model: PreTrainedModel, processor: ProcessorMixin) -> ProcessorMixin:
        """As [`prepare`], and puts the adapter on the model."""
        processor = self.prepare(model, processor)
        model.load_adapter(os.fspath(self.path))
        return processor

    def _check_fit(self, modules: dict[str, nn.Module], key: str, shape: list[int]) -> None:
        name, is_lora, part = key.removeprefix(KEY_PREFIX).rpartition(".lora_")
        if not is_lora:
            return
        if name not in modules:
            raise OriginalCheckpointError(f"The adapter {self.path} is another model's: this one has no layer {name}.")
        is_input = part.startswith("A")
        width = getattr(modules[name], "in_features" if is_input else "out_features", None)
        given = shape[1] if is_input else shape[0]
        if width is not None and width != given:
            raise OriginalCheckpointError(
                f"The adapter {self.path} is another model's: its {name} is {given} wide, this model's {width}."
            )
