"""What a folder's configuration says of its quantisation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .location import json_object


PACKED = "viscpm_packed"  # `QUANT_METHOD` of `modeling.packed_linear`


def describe_quantization(config: Any) -> str | None:
    """A configuration's `quantization_config` for people; None for None."""
    if config is None:
        return None
    config = config if isinstance(config, Mapping) else config.to_dict()
    method = getattr(config.get("quant_method"), "value", config.get("quant_method"))
    if method == "bitsandbytes" and config.get("load_in_4bit"):
        return f"4 bits ({config['bnb_4bit_quant_type']}, bitsandbytes)"
    if method == "bitsandbytes":
        return "8 bits (bitsandbytes)"
    if method == PACKED:
        return f"{config['bits']} bits (packed{', embedding too' if config['quantize_embedding'] else ''})"
    if method == "torchao":
        kind = config["quant_type"]["default"].get("_type", "")
        return f"{'4 bits' if 'Int4' in kind else '8 bits' if 'Int8' in kind else kind} (torchao)"
    return str(method)


def stored_quantization(folder: Path) -> str | None:
    """What the model of a converted folder, for Paint its text encoder, is quantised to."""
    configs = (json_object(folder / part / "config.json") for part in ("", "text_encoder"))
    return next(
        (describe_quantization(it["quantization_config"]) for it in configs if "quantization_config" in it), None
    )
