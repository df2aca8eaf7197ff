"""How the siblings' own interfaces decode; of a system's presets the first is its default."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "omnilmm": {
        "sampling": {
            "max_new_tokens": 1024, "do_sample": True, "temperature": 0.6, "top_k": 30, "top_p": 0.9,
            "repetition_penalty": 1.1,
        },
    },
    "minicpmv-1.0": {
        "beam": {"max_new_tokens": 2048, "num_beams": 3, "repetition_penalty": 1.2},
        "sampling": {"max_new_tokens": 2048, "do_sample": True, "temperature": 0.6, "top_k": 100, "top_p": 0.8},
    },
    "minicpmv-2.0": {
        "sampling": {
            "max_new_tokens": 1024, "do_sample": True, "temperature": 0.7, "top_k": 100, "top_p": 0.8,
            "repetition_penalty": 1.05,
        },
        "beam": {"max_new_tokens": 1024, "num_beams": 3, "repetition_penalty": 1.2},
    },
    "visualcla": {
        "sampling": {
            "max_new_tokens": 512, "do_sample": True, "temperature": 0.5, "top_k": 40, "top_p": 0.9,
            "repetition_penalty": 1.1, "no_repeat_ngram_size": 15,
        },
    },
}  # fmt: skip


def system_name(config: Any) -> str:
    """`"omnilmm"`, `"minicpmv-1.0"`, `"minicpmv-2.0"` or `"visualcla"`."""
    if config.model_type != "minicpmv":
        return config.model_type
    return "minicpmv-2.0" if config.resampler_config.key_positions == "computed" else "minicpmv-1.0"


def decoding_presets(config: Any) -> Mapping[str, Mapping[str, Any]]:
    """The presets of a configuration's system: name -> arguments of `generate`."""
    return MappingProxyType(_PRESETS[system_name(config)])


def default_preset(config: Any) -> dict[str, Any]:
    return dict(next(iter(decoding_presets(config).values())))


__all__ = ["decoding_presets", "default_preset", "system_name"]
