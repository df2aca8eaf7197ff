"""The `config.json` of VisCPM's siblings' original checkpoints in our words: language model, vision tower, resampler.

The originals' files know neither parts nor the tower's sizes. Dictionaries alone: neither torch nor transformers is
imported.
"""

from typing import Any


# What a checkpoint's name of its timm tower stands for. The last layer is left out by every one of these systems.
TIMM_TOWERS = {
    "eva02_enormous_patch14_clip_224": {
        "model_type": "vit", "hidden_size": 1792, "num_hidden_layers": 63, "num_attention_heads": 16,
        "intermediate_size": 15360, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "image_size": 224, "patch_size": 14,
    },
    "vit_so400m_patch14_siglip_384": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 16,
        "intermediate_size": 4304, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "image_size": 384, "patch_size": 14,
        "vision_use_head": False,
    },
}  # fmt: skip
EVA, SIGLIP = TIMM_TOWERS
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "image_size": 224, "patch_size": 14,
}  # fmt: skip
# Keys of the language model in an original flat configuration; the names are transformers' own.
_TEXT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "rope_theta", "rope_scaling", "attention_bias", "attention_dropout", "sliding_window", "pad_token_id",
    "bos_token_id", "eos_token_id", "tie_word_embeddings",
)  # fmt: skip
_PERCEIVER_HEAD_DIM = 128
VISUALCLA_VOCAB_SIZE = 49958


def _timm_tower(name: Any, drops_last_layer: bool = True) -> dict[str, Any]:
    # Also `timm/NAME`, or a path that ends with it.
    known = TIMM_TOWERS.get(str(name).replace("\\", "/").rstrip("/").rpartition("/")[2].partition(".")[0])
    if known is None:
        raise ValueError(f"The configuration names the vision tower {name!r}; known are {' and '.join(TIMM_TOWERS)}.")
    return known | {"num_hidden_layers": known["num_hidden_layers"] + (not drops_last_layer)}


def _required(original: dict[str, Any], *names: str) -> list[Any]:
    missing = [name for name in names if original.get(name) is None]
    if missing:
        raise ValueError(
            f"The original configuration (model_type {original.get('model_type')!r}) lacks {', '.join(missing)}."
        )
    return [original[name] for name in names]


def _text_keys(original: dict[str, Any]) -> dict[str, Any]:
    return {key: original[key] for key in _TEXT_KEYS if original.get(key) is not None}


def _common(original: dict[str, Any]) -> dict[str, Any]:
    dtype = original.get("dtype") or original.get("torch_dtype")
    return {"model_type": original.get("model_type"), "dtype": dtype}


def _omnilmm(original: dict[str, Any]) -> dict[str, Any]:
    hidden_size, vocab_size, num_query = _required(original, "hidden_size", "vocab_size", "num_query")
    if original.get("mm_use_im_start_end") is False:
        raise ValueError(
            "The configuration says mm_use_im_start_end false: OmniLMM is supported with <im_start> and <im_end> "
            "around its images only, as it was released."
        )
    return _common(original) | {
        "text_config": {"model_type": "mistral"} | _text_keys(original),
        "vision_config": _timm_tower(original.get("mm_vision_tower") or EVA),
        "resampler_config": {
            "num_query_tokens": num_query,
            "hidden_size": hidden_size,
            "num_attention_heads": hidden_size // _PERCEIVER_HEAD_DIM,
            "key_positions": "interpolated",
        },
        "image_token_id": vocab_size - 9,
    }


def _minicpmv(original: dict[str, Any]) -> dict[str, Any]:
    refuse_later_minicpmv(original)
    hidden_size, num_layers, num_heads, num_query = _required(
        original, "hidden_size", "num_hidden_layers", "num_attention_heads", "query_num"
    )
    text = {"model_type": "granite", "pad_token_id": 0} | _text_keys(original)
    text["residual_multiplier"] = original.get("scale_depth", 1.4) / num_layers**0.5
    text["attention_multiplier"] = (hidden_size // num_heads) ** -0.5
    text["logits_scaling"] = hidden_size / original.get("dim_model_base", 256)
    drops_last_layer = original.get("drop_vision_last_layer", True)
    return _common(original) | {
        "text_config": text,
        "vision_config": _timm_tower(original.get("vision_encoder") or SIGLIP, drops_last_layer),
        "resampler_config": {
            "num_query_tokens": num_query,
            "hidden_size": hidden_size,
            "num_attention_heads": hidden_size // _PERCEIVER_HEAD_DIM,
            # Only 2.0 knows of slices.
            "key_positions": "computed" if "slice_mode" in original else "interpolated",
        },
        "text_embedding_scale": original.get("scale_emb", 12),
    }


def refuse_later_minicpmv(original: dict[str, Any]) -> None:
    """Raises a ValueError for MiniCPM-V 2.5 and later, which share the model type but no architecture."""
    if "vision_config" not in original and "version" not in original:
        return
    version = original.get("version") or {4096: "2.5", 3584: "2.6"}.get(original.get("hidden_size"), "2.5 or later")
    raise ValueError(
        f"This is MiniCPM-V {version}, which shares the model type 'minicpmv' with 1.0 and 2.0 but is another "
        "architecture: viscpm_hf loads openbmb/MiniCPM-V and openbmb/MiniCPM-V-2. For this one use its own code "
        "(trust_remote_code=True without viscpm_hf, with the transformers version that its page names)."
    )


def _visualcla(original: dict[str, Any]) -> dict[str, Any]:
    text, vision, resampler = _required(original, "text_config", "vision_config", "visual_resampler_config")
    vocab_size = original.get("vocab_size") or text.get("vocab_size") or VISUALCLA_VOCAB_SIZE
    num_query = resampler.get("num_query_tokens", 64)
    if original.get("use_visual_resampler") is False or num_query < 1:
        raise ValueError(
            "The configuration is of a VisualCLA without resampler (use_visual_resampler false, or "
            f"num_query_tokens {num_query}), which was never released and isn't supported."
        )
    return _common(original) | {
        "text_config": {"model_type": "llama"} | _text_keys(text) | {"vocab_size": vocab_size},
        "vision_config": CLIP | {key: vision[key] for key in CLIP if key in vision and key != "model_type"},
        "resampler_config": {
            "resampler_type": "concatenating",
            "hidden_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "layer_norm_eps": original.get("layer_norm_eps", 1e-12),
            "initializer_range": original.get("initializer_range", 0.02),
        }
        | resampler,
        "image_token_id": vocab_size - 1,
    }


# By model type: an original `config.json` -> the same in our words. Each raises a ValueError for what can't be run
# here, or lacks what is needed.
IN_OUR_WORDS = {"omnilmm": _omnilmm, "minicpmv": _minicpmv, "visualcla": _visualcla}

__all__ = ["CLIP", "EVA", "IN_OUR_WORDS", "SIGLIP", "TIMM_TOWERS", "VISUALCLA_VOCAB_SIZE", "refuse_later_minicpmv"]
