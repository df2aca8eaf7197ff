"""What `inspect` found, in numbers."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.headers import TensorHeader
from ..checkpoints.location import Location
from ..checkpoints.original import CHAT, CPM_BEE, PAINT
from ..families.family import COMPOSITE_FORM, FAMILIES
from ..families.systems import system_of
from ..tiny.embedded import FOLDER
from ..tiny.embedded import LICENCE as EMBEDDED_LICENCE
from .model_card import LICENCE


# Without the siblings, which `siblings.systems` knows.
KINDS = {CHAT: "VisCPM-Chat", PAINT: "VisCPM-Paint", CPM_BEE: "CPM-Bee"}


# What a weight takes once quantised by bitsandbytes: int8, and 4 bits with a scale for every 64 values.
INT8_BYTES = 1.0
NF4_BYTES = 0.5 + 4 / 64
HALF_BYTES = 2.0

# Parts whose linear layers quantisation takes on; the rest stays in half precision.
QUANTISED_PARTS = ("language model", "text encoder")


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is."""

    source: str
    kind: str | None
    """`"chat"`, `"paint"`, `"cpm_bee"`, or a sibling's model type; None if the weights aren't at hand and nothing else
    tells."""
    layout: str
    files: dict[str, int]
    """Files of weights and their sizes in bytes."""
    parameters: dict[str, int] = field(default_factory=dict)
    """By part."""
    dtypes: dict[str, int] = field(default_factory=dict)
    """Parameters by dtype."""
    is_sharded: bool = False
    sizes: dict[str, Any] = field(default_factory=dict)
    """Width, layers, vocabulary, resolution, queries, as far as they apply."""
    missing: list[str] = field(default_factory=list)
    """Tensors and files that aren't there."""
    surplus: list[str] = field(default_factory=list)
    """Tensors that no model knows."""
    problems: list[str] = field(default_factory=list)
    """What else keeps the checkpoint from being used."""
    alternatives: list[str] = field(default_factory=list)
    """Several files in one folder are alternatives, of which one has to be chosen."""
    quantization: str | None = None
    """What the language model's layers are quantised to."""
    memory_bytes: dict[str, int] = field(default_factory=dict)
    """Memory of the weights in fp16, int8 and 4 bits."""
    next_command: str = ""
    system: str = ""
    """The name of the released system, and its version."""
    licence: str = ""
    """Of the weights."""

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values())

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def is_complete(self) -> bool:
        return not (self.missing or self.problems or self.alternatives)


def convert_command(source: str, missing: list[str]) -> str:
    name = Path(source).name.removesuffix(".bin").removesuffix(".pt") or "viscpm"
    words = ["viscpm-hf", "convert", source, f"{name}-hf", "--verify"]
    if "vocab.txt" in missing:
        words += ["--vocab", "vocab.txt"]
    if any(name.startswith("vae/") for name in missing):
        words += ["--vae", "vae"]
    return shlex.join(words)


def merge_command(adapter: str) -> str:
    return (
        "viscpm-hf merge visualcla --text-model CHINESE-ALPACA-PLUS-7B --vision-model CLIP-VIT-LARGE-PATCH14 "
        f"--lora-model {adapter} OUT"
    )


def inspection(location: Location, kind: str | None, files: dict[str, int], parts, config, **known) -> Inspection:
    parameters: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for part, spec in parts:
        parameters[part] += spec.numel
        dtypes[spec.dtype] += spec.numel
    system, licence = KINDS.get(kind, ""), LICENCE if kind in KINDS else ""
    if config is not None and FAMILIES[kind].form == COMPOSITE_FORM:
        facts = system_of(config)
        system, licence = facts.name, facts.licence
    elif location.path.parent == FOLDER:
        licence = EMBEDDED_LICENCE
    return Inspection(
        source=location.name,
        kind=kind,
        layout=location.layout,
        files=files,
        parameters=dict(parameters),
        dtypes=dict(dtypes),
        sizes=sizes_of(config),
        memory_bytes=_memory(parts) if parts else {},
        system=system,
        licence=licence,
        **known,
    )


def sizes_of(config: Any) -> dict[str, Any]:
    """Of a configuration, or of its values alone (`known_sizes`)."""
    if config is None:
        return {}
    text = getattr(config, "text_config", config)
    sizes = {
        "hidden_size": text.hidden_size,
        "layers": text.num_hidden_layers,
        "attention_heads": text.num_attention_heads,
        "vocabulary": getattr(text, "num_words", text.vocab_size),
    }
    vision = getattr(config, "vision_config", None)
    if vision is not None:
        sizes |= {
            "vision_layers": vision.num_hidden_layers,
            "resolution": vision.image_size,
            "patch_size": vision.patch_size,
            "queries": (getattr(config, "resampler_config", None) or vision).num_query_tokens,
        }
    if getattr(config, "projection_dim", None) is not None:
        sizes["prompt_embedding"] = config.projection_dim
    return sizes


def _memory(parts: list[tuple[str, TensorHeader]]) -> dict[str, int]:
    """Memory of the weights alone; images, prompts and answers come on top."""
    linear = other = 0
    for part, spec in parts:
        is_table = "embed" in spec.name or "relative_attention_bias" in spec.name
        if part in QUANTISED_PARTS and len(spec.shape) == 2 and not is_table:
            linear += spec.numel
        else:
            other += spec.numel
    return {
        name: math.ceil(linear * nbytes + other * HALF_BYTES)
        for name, nbytes in (("fp16", HALF_BYTES), ("int8", INT8_BYTES), ("4-bit", NF4_BYTES))
    }


def as_dict(inspection: Inspection) -> Mapping[str, Any]:
    """For JSON."""
    computed = ("num_bytes", "num_parameters", "is_complete")
    return {**asdict(inspection), **{name: getattr(inspection, name) for name in computed}}
