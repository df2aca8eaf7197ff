"""Names and shapes of the systems' weights by the names of [`key_maps`] and the sizes of a configuration.

The models themselves say the same once they are made without weights, for which torch is needed; here it isn't.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace

from .family import FAMILIES, OMNILMM, VISUALCLA


Shapes = dict[str, tuple[int, ...]]

# The last words of a weight's name -> the names of its dimensions; a bias has the first of them.
LANGUAGE_MODEL = {
    "embed_tokens": "vocab_size hidden_size",
    "lm_head": "vocab_size hidden_size",
    "relative_attention_bias": "buckets num_attention_heads",
    "q_proj": "attention hidden_size",
    "k_proj": "key_values hidden_size",
    "v_proj": "key_values hidden_size",
    "o_proj": "hidden_size attention",
    "gate_proj": "intermediate_size hidden_size",
    "up_proj": "intermediate_size hidden_size",
    "down_proj": "hidden_size intermediate_size",
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm", "norm"), "hidden_size"),
    "projection": "projection_dim hidden_size",  # of Paint
    "layer_norm": "projection_dim",
}
_SQUARES = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "q_experts", "k_experts", "v_experts", "out_experts")
_NORMS = (
    "inner_layer_norm", "self_attn_layer_norm", "final_layer_norm", "layer_norm", "layer_norm1", "layer_norm2",
    "layernorm", "layernorm_before", "layernorm_after", "pre_layrnorm", "post_layernorm",
)  # fmt: skip
VISION_TOWER = {
    "query_tokens": "num_query_tokens hidden_size",
    "cls_token": "one one hidden_size",
    "class_embedding": "hidden_size",
    "patch_embedding": "hidden_size num_channels patch_size patch_size",
    "projection": "hidden_size num_channels patch_size patch_size",
    "image_position_embedding": "padded_positions hidden_size",
    "query_position_embedding": "max_query_positions hidden_size",
    "position_embeddings": "one positions hidden_size",
    "position_embedding": "positions hidden_size",
    **dict.fromkeys(_SQUARES, "hidden_size hidden_size"),
    **dict.fromkeys(_NORMS, "hidden_size"),
    "mlp.layer_norm": "intermediate_size",
    "fc1": "intermediate_size hidden_size",
    "fc2": "hidden_size intermediate_size",
}
RESAMPLER = {
    "query": "num_query_tokens hidden_size",
    "pos_embed": "num_query_tokens hidden_size",
    "kv_proj": "hidden_size vision_size",
    **dict.fromkeys(_SQUARES, "hidden_size hidden_size"),
    **dict.fromkeys(("ln_q", "ln_kv", "ln_post", "attn_norm", "mlp_norm"), "hidden_size"),
    "proj": "text_size hidden_size",
    "projection": "text_size hidden_size",
    "fc1": "intermediate_size hidden_size",
    "fc2": "hidden_size intermediate_size",
    "linear_1": "text_size vision_size",  # of VisCPM-Chat's projector
    "linear_2": "text_size text_size",
}

# What the maps take as it comes: transformers' language models, and CLIP.
_LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
          "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")  # fmt: skip
STOCK_LANGUAGE_MODEL = (
    "language_model.model.embed_tokens.weight",
    *(f"language_model.model.layers.{{n}}.{module}.weight" for module in _LAYER),
    "language_model.model.norm.weight",
    "language_model.lm_head.weight",
)
CLIP_TOWER = (
    "vision_tower.embeddings.class_embedding",
    "vision_tower.embeddings.patch_embedding.weight",
    "vision_tower.embeddings.position_embedding.weight",
    *(
        f"vision_tower.{module}.{leaf}"
        for module in (
            "pre_layrnorm",
            *(f"encoder.layers.{{n}}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
            *(f"encoder.layers.{{n}}.{part}" for part in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")),
            "post_layernorm",
        )
        for leaf in ("weight", "bias")
    ),
)


def model_shapes(kind: str, sizes: SimpleNamespace) -> Shapes:
    """Our names and shapes of a system's weights, tied copies left out; of Paint those of its text encoder.

    Args:
        sizes: see `known_sizes`.
    """
    text = getattr(sizes, "text_config", sizes)
    vision, resampler = getattr(sizes, "vision_config", None), getattr(sizes, "resampler_config", None)
    dimensions = {
        "language": {
            "attention": text.num_attention_heads * text.head_dim,
            "key_values": getattr(text, "num_key_value_heads", text.num_attention_heads) * text.head_dim,
            **_buckets(text),
            **vars(text),
        }
    }
    if vision is not None:
        patches = (vision.image_size // vision.patch_size) ** 2
        has_class_token = kind == OMNILMM or kind == VISUALCLA
        dimensions["vision"] = {
            "one": 1,
            "positions": patches + has_class_token,
            "padded_positions": patches + 3,
            **vars(vision),
        }
        between = {} if resampler is None else vars(resampler)
        dimensions["between"] = {"vision_size": vision.hidden_size, "text_size": text.hidden_size, **between}
    shapes: Shapes = {}
    for name in _names(kind):
        if "vision_tower." in name:
            part, table = "vision", VISION_TOWER
        elif name.startswith("resampler.") or "multi_modal_projector." in name:
            part, table = "between", RESAMPLER
        else:
            part, table = "language", LANGUAGE_MODEL
        own = dimensions[part]
        if name == "resampler.kv_proj.weight" and own["vision_size"] == own["hidden_size"]:
            continue  # widths that are equal need no map
        shape = _shape(name, table, own)
        for layer in range(own.get("num_hidden_layers", 1)) if "{n}" in name else (0,):
            if part != "language" or not _is_pruned(text, layer, name):
                shapes[name.replace("{n}", str(layer))] = shape
    return shapes


def _buckets(text: SimpleNamespace) -> dict[str, int]:
    if not hasattr(text, "position_bias_num_buckets"):
        return {}
    return {"buckets": text.position_bias_num_buckets + text.position_bias_num_segment_buckets}


def _names(kind: str) -> Iterator[str]:
    """Our names, `{n}` standing for the layers' numbers."""
    targets = dict.fromkeys(entry.target for entry in FAMILIES[kind].key_maps[0].entries)
    yield from (name for name in targets if "{name}" not in name)
    stock: Iterable[str] = ()
    if any(name.startswith("language_model.") for name in targets):
        stock = (*STOCK_LANGUAGE_MODEL, *(CLIP_TOWER if kind == VISUALCLA else ()))
    yield from (name for name in stock if name not in targets)


def _shape(name: str, table: Mapping[str, str], dimensions: Mapping[str, int]) -> tuple[int, ...]:
    words = name.split(".")
    leaf = words[-1] if words[-1] in ("weight", "bias") else ""
    # Of BEiT-3 every module has two experts, the image's and the queries'.
    words = [word for word in words[: -1 if leaf else None] if word not in ("image", "query") or word == words[-1]]
    wanted = next(table[key] for key in (".".join(words[-2:]), words[-1]) if key in table).split()
    return tuple(dimensions[word] for word in (wanted[:1] if leaf == "bias" else wanted))


def _is_pruned(text: SimpleNamespace, layer: int, name: str) -> bool:
    """Whether the block of a layer that a weight is of was removed."""
    mask = getattr(text, "mask_modules", None)
    if mask is None or "{n}" not in name:
        return False
    attention, mlp = mask[layer]
    return attention if ".self_attn." in name or ".input_layernorm." in name else mlp
