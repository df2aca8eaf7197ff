"""Configurations as plain values, for those who want sizes and no model; torch and transformers aren't imported.

What is said here is what the configuration classes would say. They alone judge whatever is out of the ordinary: a
value of another type, a name that isn't in the lists below, sizes that don't fit each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from ..modeling.configuration_limits import MAX_LAYERS
from ..modeling.token_ids_cpm_bee import padded_vocab_size
from .family import CHAT, CPM_BEE, FAMILIES, MINICPMV, OMNILMM, PAINT, VISUALCLA


ACTIVATIONS = ("gelu", "gelu_new", "quick_gelu", "relu", "silu", "tanh")
DTYPES = ("float32", "float16", "bfloat16")
# Model types of tower and language model, and the kind of resampler, of the siblings as they were released.
STOCK_TYPES = {
    OMNILMM: ("vit", "mistral", "perceiver"),
    MINICPMV: ("siglip_vision_model", "granite", "perceiver"),
    VISUALCLA: ("clip_vision_model", "llama", "concatenating"),
}


def _is(kind: type | tuple[type, ...], least: float | None = None) -> Callable[[Any], bool]:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return lambda value: type(value) in kinds and (least is None or value >= least)


def _one_of(*known: Any) -> Callable[[Any], bool]:
    return lambda value: type(value) is type(known[0]) and value in known


def _named(names: str, test: Callable[[Any], bool]) -> dict[str, Callable[[Any], bool]]:
    return dict.fromkeys(names.split(), test)


# What the values of a configuration look like, by their names.
VALUES = {
    **_named(
        "vocab_size num_words hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim image_size patch_size num_channels num_query_tokens max_query_positions position_bias_num_buckets "
        "position_bias_num_segment_buckets position_bias_max_distance max_position_embeddings projection_dim "
        "encoder_stride pooler_output_size pretraining_tp sliding_window",
        _is(int, 1),
    ),
    **_named("pad_token_id unk_token_id bos_token_id eos_token_id image_token_id num_prefix_tokens", _is(int, 0)),
    **_named(
        "rms_norm_eps layer_norm_eps projection_layer_norm_eps initializer_range initializer_factor attention_dropout "
        "hidden_dropout_prob attention_probs_dropout_prob attention_multiplier embedding_multiplier "
        "residual_multiplier logits_scaling rope_theta",
        _is(float, 0),
    ),
    "residual_divisor": _is(float, 0.1),
    "text_embedding_scale": _is((int, float), 0),
    **_named(
        "use_cache tie_word_embeddings attention_bias mlp_bias qkv_bias vision_use_head interpolate_pos_encoding "
        "vision_post_norm",
        _is(bool),
    ),
    **_named("hidden_act projector_hidden_act pooler_act", _one_of(*ACTIVATIONS)),
    "dtype": _one_of(*DTYPES),
    "transformers_version": _is(str),
    "quantization_config": _is(dict),
    "architectures": lambda value: type(value) is list and set(map(type, value)) <= {str},
    "auto_map": lambda value: type(value) is dict and set(map(type, value.values())) <= {str},
    "resampler_type": _one_of("perceiver", "concatenating"),
    "key_positions": _one_of("interpolated", "computed"),
    "rope_parameters": lambda value: (
        isinstance(value, dict)
        and value.keys() <= {"rope_theta", "rope_type"}
        and value.get("rope_type", "default") == "default"
        and _is(float, 0)(value.get("rope_theta", 1.0))
    ),
    "mask_modules": lambda value: (
        isinstance(value, list)
        and all(isinstance(pair, list) and len(pair) == 2 and set(map(type, pair)) == {bool} for pair in value)
        and any(map(any, value))
        and not all(attention for attention, _ in value)
    ),
}
# Those that may be null.
OPTIONAL = ("pad_token_id", "unk_token_id", "bos_token_id", "eos_token_id", "mask_modules", "sliding_window", "dtype")
RESAMPLER_TYPE, RESAMPLER_OPTIONAL = "vision_resampler_queries", ("intermediate_size", "key_positions", "dtype")


def known_sizes(kind: str, config: Mapping[str, Any]) -> SimpleNamespace | None:
    """A configuration by our names as plain values, or None if only its class can tell what it means.

    Args:
        kind: of `FAMILIES`.
        config: what a `config.json` of ours holds, or an original's says in our words.
    """
    sizes = usual_values(kind, config)
    if sizes is None or kind in STOCK_TYPES:
        return sizes if sizes is not None and _is_stock(kind, sizes) else None
    is_known = _is_cpm_bee(getattr(sizes, "text_config", sizes), getattr(sizes, "tie_word_embeddings", True))
    return sizes if is_known and (kind != CHAT or _is_beit3(sizes.vision_config)) else None


def usual_values(kind: str, config: Mapping[str, Any]) -> SimpleNamespace | None:
    """As [`known_sizes`], whether they fit each other or not, and nothing completed."""
    family = FAMILIES[kind]
    if config.get("model_type", family.model_type) != family.model_type:
        return None
    if kind == CHAT:
        types = {"text_config": FAMILIES[CPM_BEE].model_type, "vision_config": "viscpm_beit3"}
    elif kind in STOCK_TYPES:
        vision, text, _ = STOCK_TYPES[kind]
        types = {"text_config": text, "vision_config": vision, "resampler_config": RESAMPLER_TYPE}
    elif kind in (CPM_BEE, PAINT):
        types = {}
    else:
        return None
    parts = {name: _plain(config.get(name), model_type) for name, model_type in types.items()}
    own = _plain({name: value for name, value in config.items() if name not in types}, family.model_type)
    if own is None or None in parts.values():
        return None
    return SimpleNamespace(**vars(own), model_type=family.model_type, **parts)


def _plain(config: Any, model_type: str) -> SimpleNamespace | None:
    """The values of a configuration without parts; None if one isn't as it usually is."""
    if not isinstance(config, Mapping) or config.get("model_type", model_type) != model_type:
        return None
    values = {name: value for name, value in config.items() if name != "model_type"}
    for name, value in values.items():
        optional = RESAMPLER_OPTIONAL if model_type == RESAMPLER_TYPE else OPTIONAL
        if name not in VALUES or not ((value is None and name in optional) or VALUES[name](value)):
            return None
    if values.get("num_hidden_layers", 1) > MAX_LAYERS:
        return None
    return SimpleNamespace(**values)


def _has(sizes: SimpleNamespace, names: str) -> bool:
    return all(getattr(sizes, name, None) is not None for name in names.split())


def _is_cpm_bee(text: SimpleNamespace, is_tied: bool) -> bool:
    """Completed in place: folders of version 0.1, and originals, have the number of words as that of ids."""
    needed = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim "
        "position_bias_num_buckets position_bias_num_segment_buckets"
    )
    if not _has(text, needed) or not (is_tied and getattr(text, "tie_word_embeddings", True)):
        return False
    if getattr(text, "num_words", None) is None:
        text.num_words, text.vocab_size = text.vocab_size, padded_vocab_size(text.vocab_size)
    mask = getattr(text, "mask_modules", None)
    return (
        text.vocab_size >= padded_vocab_size(text.num_words)
        and text.position_bias_num_buckets % 4 == 0
        and (mask is None or len(mask) == text.num_hidden_layers)
        and _ids_fit(text)
    )


def _ids_fit(text: SimpleNamespace) -> bool:
    ids = (getattr(text, f"{name}_token_id", None) for name in ("pad", "unk", "bos", "eos"))
    return all(number is None or number < text.vocab_size for number in ids)


def _is_beit3(vision: SimpleNamespace) -> bool:
    needed = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size num_query_tokens "
        "max_query_positions num_channels"
    )
    return (
        _has(vision, needed)
        and vision.image_size % vision.patch_size == 0
        and vision.hidden_size % vision.num_attention_heads == 0
        and vision.num_query_tokens + 2 <= vision.max_query_positions
    )


def _is_stock(kind: str, sizes: SimpleNamespace) -> bool:
    """Completed in place by what transformers' classes and ours have where a file says nothing."""
    text, vision, resampler = sizes.text_config, sizes.vision_config, sizes.resampler_config
    needed = "hidden_size intermediate_size num_hidden_layers num_attention_heads"
    if not (
        _has(text, f"{needed} vocab_size")
        and _has(vision, f"{needed} image_size patch_size")
        and _has(resampler, "hidden_size num_attention_heads num_query_tokens")
    ):
        return False
    vision.num_channels = getattr(vision, "num_channels", 3)
    if kind != OMNILMM:  # Mistral's default is another
        text.num_key_value_heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
    text.head_dim = getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    resampler_type = STOCK_TYPES[kind][2]
    if getattr(resampler, "resampler_type", "perceiver") != resampler_type:
        return False
    side = math.isqrt(resampler.num_query_tokens)
    is_concatenating = resampler_type == "concatenating"
    fits = (
        resampler.hidden_size == vision.hidden_size and _has(resampler, "num_hidden_layers intermediate_size")
        if is_concatenating
        else side**2 == resampler.num_query_tokens and resampler.hidden_size % 4 == 0
    )
    return (
        fits
        and _has(text, "num_key_value_heads")
        and text.hidden_size % text.num_attention_heads == 0
        and text.num_attention_heads % text.num_key_value_heads == 0
        and text.head_dim * text.num_attention_heads == text.hidden_size
        and vision.hidden_size % vision.num_attention_heads == 0
        and resampler.hidden_size % resampler.num_attention_heads == 0
        and vision.image_size >= vision.patch_size
        and _ids_fit(text)
        and not getattr(text, "attention_bias", False)
        and not getattr(text, "mlp_bias", False)
        and getattr(vision, "qkv_bias", True)
        and (kind != MINICPMV or not getattr(vision, "vision_use_head", True))
        and not getattr(sizes, "tie_word_embeddings", False)
        and not getattr(text, "tie_word_embeddings", False)
    )
