"""`from_pretrained` where the parts of a model lie on several devices, or are quantised."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .placement import load_with_device_map
from .quantization import load_quantized


def needs_placement(config: PreTrainedConfig, kwargs: Mapping[str, Any]) -> bool:
    """Whether [`load_placed`] has something to do."""
    return kwargs.get("device_map") is not None or _is_quantized(config, kwargs)


def load_placed(
    stock: Callable[..., Any],
    model_class: type[PreTrainedModel],
    name_or_path: Any,
    *,
    config: PreTrainedConfig | None,
    shape: PreTrainedConfig,
    state_dict: Mapping[str, torch.Tensor] | None,
    **kwargs,
) -> Any:
    """Loads with a `device_map`, a `quantization_config`, or both.

    Args:
        stock: transformers' own `from_pretrained`, with the class as its first argument.
        config: as the user gave it; `shape` is what the model will be like in any case.
        state_dict: of the mapped original file, if it is one.
        kwargs: further arguments of `from_pretrained`.
    """

    def load(path, *, config, state_dict, **kwargs):
        stock_load = functools.partial(stock, model_class, config=config)
        if kwargs.get("device_map") is not None:
            return load_with_device_map(stock_load, model_class, path, shape, state_dict, **kwargs)
        return stock_load(path, state_dict=state_dict if path is None else None, **kwargs)

    if _is_quantized(shape, kwargs):
        return load_quantized(load, model_class, name_or_path, shape, state_dict=state_dict, **kwargs)
    return load(name_or_path, config=config, state_dict=state_dict, **kwargs)


def _is_quantized(config: PreTrainedConfig, kwargs: Mapping[str, Any]) -> bool:
    return kwargs.get("quantization_config") is not None or hasattr(config, "quantization_config")
