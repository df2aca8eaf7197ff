"""What `VisCPMChat` and `VisCPMPaint` have in common when they load: which file, where to, in which precision."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoints.location import only_original_file
from ..checkpoints.original import (
    ORIGINAL_SUFFIXES,
    ORIGINAL_WEIGHTS_NAME,
    load_state_dict,
)
from ..checkpoints.tensor_files import named_dtype
from .layer_streaming import BUDGET_VARIABLE, layer_budget, stream_layers
from .placement import check_placement, main_device
from .quantization import (
    QUANTIZATIONS,
    check_quantization,
    check_same_quantization,
    computing_dtype,
    quantization_config,
)


@dataclass(frozen=True)
class LoadOptions:
    """Where a model is put, and in which precision."""

    device: torch.device
    dtype: torch.dtype | str | None = None
    """As stored, or what suits the device, if None; as stored in any case if "auto"."""
    quantization: str | None = None
    """A name of `quantization.QUANTIZATIONS`."""
    quantize_all: bool = False
    """Also what is kept in `dtype` by default although it could be quantised: vision tower, UNet."""
    quantize_embedding: bool = False
    """Also embedding and head, to 8 bits."""
    device_map: str | Mapping[str, Any] | None = None
    max_memory: Mapping[int | str, int | str] | None = None
    offload_folder: str | os.PathLike | None = None
    fast: bool = False
    layer_budget: int | None = None
    """Bytes of GPU memory for the language model's layers, the rest is streamed; None for no limit."""

    @classmethod
    def checked(
        cls,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        offload_folder: str | os.PathLike | None = None,
        fast: bool = False,
        **options,
    ) -> LoadOptions:
        """As given by a user.

        Raises:
            ValueError: for a device that can't be used, more memory than there is, a dtype that no model can have, or
                options that don't go together.
            OSError: if the folder can't be written to.
        """
        max_memory = check_placement(device_map, max_memory, offload_folder, device)
        if device_map is not None:
            main = main_device(device_map)
        else:
            main = usable_device(device) if device is not None else default_device()
        if options.get("quantization") is not None:
            check_quantization(options["quantization"], main)
        elif options.get("quantize_all") or options.get("quantize_embedding"):
            raise ValueError(
                f"More is to be quantised, but not how: quantization is one of {', '.join(QUANTIZATIONS)}."
            )
        budget = layer_budget(main)
        for name, is_given in (("device_map", device_map is not None), ("fast", fast)):
            if budget is not None and is_given:
                raise ValueError(f"{BUDGET_VARIABLE} streams layers, which excludes {name}: unset it, or drop {name}.")
        return cls(
            device=main,
            dtype=None if dtype is None else named_dtype(dtype, "auto"),
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=offload_folder,
            fast=fast,
            layer_budget=budget,
            **options,
        )

    @property
    def is_placed_by_loading(self) -> bool:
        """Whether `from_pretrained` puts the model where it belongs, and nothing may move it any more."""
        return self.layer_budget is None and (self.quantization is not None or self.device_map is not None)

    def choose_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The dtype for a checkpoint that is stored in `stored`."""
        if self.dtype is not None:
            return stored if self.dtype == "auto" else self.dtype
        return computing_dtype(self.quantization, self.device, default_dtype(self.device, stored))

    def from_pretrained_arguments(
        self, dtype: torch.dtype | str, stored_quantization: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Arguments of a transformers model's `from_pretrained`, the dtype aside.

        Args:
            dtype: of the model.
            stored_quantization: the `quantization_config` of a folder that is quantised already.

        Raises:
            ValueError: if the folder is quantised otherwise than asked for.
        """
        arguments: dict[str, Any] = {}
        if self.quantization is not None:
            wanted = quantization_config(
                self.quantization,
                dtype,
                quantize_vision=self.quantize_all,
                quantize_embedding=self.quantize_embedding,
                device=self.device,
            )
            check_same_quantization(wanted, stored_quantization, self.quantization)
            if stored_quantization is None:
                arguments["quantization_config"] = wanted
        if self.quantization is not None or stored_quantization is not None:
            arguments["device_map"] = {"": self.device}
        if self.device_map is not None:
            arguments["device_map"] = self.device_map
            arguments["max_memory"] = self.max_memory
            arguments["offload_folder"] = self.offload_folder
        elif self.layer_budget is not None:
            arguments["device_map"] = {"": "cpu"}  # from where the layers are streamed
        return arguments

    def place(self, model: PreTrainedModel) -> PreTrainedModel:
        """Puts a loaded model on its device."""
        if self.layer_budget is not None:
            return stream_layers(model, self.device, self.layer_budget)
        return model if self.is_placed_by_loading or getattr(model, "is_quantized", False) else model.to(self.device)


def default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: if torch knows no such device, or can't use it here.
    """
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an assertion where torch is built without CUDA
        raise ValueError(f"The device {str(device)!r} can't be used: {str(error).splitlines()[0]}") from error
    return device


def default_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The dtype that suits the device, for a checkpoint stored in `stored`."""
    if stored not in (torch.float16, torch.bfloat16) or device.type not in ("cpu", "mps"):
        return stored
    if device.type == "mps":
        return torch.float16  # not every Mac has bf16
    # Half precision on a CPU is bf16 or nothing: fp16 products are emulated.
    has_mkldnn = torch.backends.mkldnn.is_available()  # builds without it, such as those for Macs, lack its ops too
    return torch.bfloat16 if has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def stored_dtype(name_or_path: str | os.PathLike) -> torch.dtype | None:
    """Dtype of a folder's original weights; None if there are none at hand."""
    weights = Path(name_or_path) / ORIGINAL_WEIGHTS_NAME
    if not weights.is_file():
        return None
    return next((tensor.dtype for tensor in load_state_dict(weights).values() if tensor.is_floating_point()), None)


def find_original_file(model_path: str | os.PathLike) -> Path | None:
    """The original file that `model_path` means; None for a folder with its own configuration, or a Hub id.

    Raises:
        OriginalCheckpointError: if a folder without configuration holds several original files, or none.
        FileNotFoundError: for a path that looks like a file and isn't there.
    """
    path = Path(model_path)
    if path.is_file():
        return path
    if not path.is_dir():
        name = os.fspath(model_path)
        if path.suffix in ORIGINAL_SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") > 1:  # no Hub id
            raise FileNotFoundError(f"There is no checkpoint at {path}.")
        return None
    if (path / "config.json").is_file():
        return None
    return only_original_file(path, "config.json")
