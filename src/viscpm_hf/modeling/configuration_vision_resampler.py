"""Configurations of VisCPM's siblings: a vision tower, a resampler and a language model.

The towers and language models are transformers' own. What differs between the siblings is here; the classes of the
single systems also read the `config.json` of the original checkpoints, which know neither parts nor their sizes.
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_limits import check_layers


# What a checkpoint's name of its timm tower stands for. The last layer is left out by every one of these systems.
_TIMM_TOWERS = {
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
_EVA, _SIGLIP = _TIMM_TOWERS
_CLIP = {
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


def _specification(text: dict[str, Any], vision: dict[str, Any], resampler: dict[str, Any]) -> dict[str, Any]:
    def specification(config_class: type, values: dict[str, Any]) -> SubConfigSpec:
        kwargs = {key: value for key, value in values.items() if key != "model_type"}
        return SubConfigSpec(config_class=config_class, model_type=values.get("model_type"), init_kwargs=kwargs)

    return {
        "text_config": specification(AutoConfig, text),
        "vision_config": specification(AutoConfig, vision),
        "resampler_config": specification(ResamplerConfig, resampler),
    }


def _timm_tower(name: Any, drops_last_layer: bool = True) -> dict[str, Any]:
    # Also `timm/NAME`, or a path that ends with it.
    known = _TIMM_TOWERS.get(str(name).replace("\\", "/").rstrip("/").rpartition("/")[2].partition(".")[0])
    if known is None:
        raise ValueError(f"The configuration names the vision tower {name!r}; known are {' and '.join(_TIMM_TOWERS)}.")
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


@strict
class ResamplerConfig(PreTrainedConfig):
    r"""
    Configuration of the module that turns any number of image tokens into `num_query_tokens`.

    Args:
        resampler_type (`str`):
            `"perceiver"`: one cross attention from the queries to the image ([`PerceiverResampler`]).
            `"concatenating"`: layers in which the queries also see themselves ([`ConcatenatingResampler`]).
        num_query_tokens (`int`): queries, so placeholders of one view. A square for the perceiver.
        hidden_size (`int`): width of the queries.
        num_attention_heads, num_hidden_layers, intermediate_size, hidden_act: of the attention and the layers. The
            perceiver has one layer and no feed-forward.
        key_positions (`str`, *optional*):
            positions of the perceiver's keys. `"interpolated"`: the queries' table, resized to the grid of patches,
            which has to be square; `"computed"`: sines and cosines of any grid.
    """

    model_type = "vision_resampler_queries"
    base_config_key = "resampler_config"

    resampler_type: Literal["perceiver", "concatenating"] = "perceiver"
    num_query_tokens: int = 64
    hidden_size: int = 2304
    num_attention_heads: int = 18
    num_hidden_layers: int = 1
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    key_positions: Literal["interpolated", "computed"] | None = None


_MINICPM = {"model_type": "granite", "vocab_size": 122753, "hidden_size": 2304, "intermediate_size": 5760,
            "num_hidden_layers": 40, "num_attention_heads": 36, "num_key_value_heads": 36, "initializer_range": 0.1,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "pad_token_id": 0,
            "residual_multiplier": 1.4 / 40**0.5, "attention_multiplier": 0.125, "logits_scaling": 9.0}  # fmt: skip
_ZEPHYR = {"model_type": "mistral", "vocab_size": 32009, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
_CHINESE_ALPACA = {"model_type": "llama", "vocab_size": 49958, "pad_token_id": 49956}


@strict
class VisionResamplerConfig(PreTrainedConfig):
    r"""
    Configuration of a [`VisionResamplerForConditionalGeneration`]; the defaults are MiniCPM-V 2.0's.

    Args:
        text_config (`PreTrainedConfig | dict`): the language model, any causal one of transformers.
        vision_config (`PreTrainedConfig | dict`): the vision tower: SigLIP, CLIP, or ViT, which stands for EVA-CLIP's
            form of it (`sibling_towers`).
        resampler_config (`ResamplerConfig | dict`): the resampler.
        image_token_id (`int`): id of an image placeholder.
        text_embedding_scale (`float`): what the text's embeddings are multiplied by, and the image's are not.
        interpolate_pos_encoding (`bool`): whether the tower takes other sizes than the one it was trained with.
        num_prefix_tokens (`int`): tokens at the tower's beginning that the resampler doesn't get.
        vision_post_norm (`bool`):
            whether the tower's last norm, which CLIP has for its pooled token only, is applied to all tokens.
    """

    model_type = "vision_resampler"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_outputs"]
    sub_configs_defaults = _specification(_MINICPM, _TIMM_TOWERS[_SIGLIP], {"key_positions": "computed"})

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    resampler_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 113
    text_embedding_scale: float | int = 1.0
    interpolate_pos_encoding: bool = True
    num_prefix_tokens: int = 0
    vision_post_norm: bool = False
    tie_word_embeddings: bool = False

    @property
    def num_query_tokens(self) -> int:
        """Placeholders of one view."""
        return self.resampler_config.num_query_tokens

    @property
    def most_views(self) -> int:
        """Of one image."""
        return 1

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Also takes an original's flat `config.json`."""
        check_layers(config_dict)
        if "resampler_config" not in config_dict:
            config_dict = cls.from_original_dict(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_original_dict(cls, original: dict[str, Any]) -> dict[str, Any]:
        """An original `config.json` -> the same in our words.

        Raises:
            ValueError: for what can't be run here, or lacks what is needed.
        """
        return original


def _common(original: dict[str, Any]) -> dict[str, Any]:
    dtype = original.get("dtype") or original.get("torch_dtype")
    return {"model_type": original.get("model_type"), "dtype": dtype}


@strict
class OmniLMMConfig(VisionResamplerConfig):
    r"""
    Configuration of OmniLMM-12B: EVA02-CLIP-E, one cross attention, Zephyr (Mistral). The nine tokens that it adds to
    the vocabulary are the last ones, the placeholder `<im_patch>` first.
    """

    model_type = "omnilmm"
    sub_configs_defaults = _specification(
        _ZEPHYR,
        _TIMM_TOWERS[_EVA],
        {"hidden_size": 4096, "num_attention_heads": 32, "key_positions": "interpolated"},
    )

    image_token_id: int = 32000
    num_prefix_tokens: int = 1

    @classmethod
    def from_original_dict(cls, original: dict[str, Any]) -> dict[str, Any]:
        hidden_size, vocab_size, num_query = _required(original, "hidden_size", "vocab_size", "num_query")
        if original.get("mm_use_im_start_end") is False:
            raise ValueError(
                "The configuration says mm_use_im_start_end false: OmniLMM is supported with <im_start> and <im_end> "
                "around its images only, as it was released."
            )
        return _common(original) | {
            "text_config": {"model_type": "mistral"} | _text_keys(original),
            "vision_config": _timm_tower(original.get("mm_vision_tower") or _EVA),
            "resampler_config": {
                "num_query_tokens": num_query,
                "hidden_size": hidden_size,
                "num_attention_heads": hidden_size // _PERCEIVER_HEAD_DIM,
                "key_positions": "interpolated",
            },
            "image_token_id": vocab_size - 9,
        }


@strict
class MiniCPMVConfig(VisionResamplerConfig):
    r"""
    Configuration of MiniCPM-V 1.0 (also called OmniLMM-3B) and 2.0: SigLIP, one cross attention, MiniCPM-2.4B, which
    is transformers' Granite. The defaults are 2.0's; 1.0 has `key_positions="interpolated"`.
    """

    model_type = "minicpmv"

    text_embedding_scale: float | int = 12

    @property
    def most_views(self) -> int:
        """Of one image: 2.0 cuts it into up to nine tiles and keeps an overview."""
        return 10 if self.resampler_config.key_positions == "computed" else 1

    @classmethod
    def from_original_dict(cls, original: dict[str, Any]) -> dict[str, Any]:
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
            "vision_config": _timm_tower(original.get("vision_encoder") or _SIGLIP, drops_last_layer),
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


@strict
class VisualCLAConfig(VisionResamplerConfig):
    r"""
    Configuration of VisualCLA-7B: CLIP-L/14, six layers of queries, Chinese-Alpaca-Plus (Llama). The four tokens that
    it adds to the vocabulary are the last ones, the placeholder `<img_token>` the very last.
    """

    model_type = "visualcla"
    sub_configs_defaults = _specification(
        _CHINESE_ALPACA,
        _CLIP,
        {"resampler_type": "concatenating", "hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 6,
         "intermediate_size": 4096, "layer_norm_eps": 1e-12},
    )  # fmt: skip

    image_token_id: int = 49957
    interpolate_pos_encoding: bool = False
    vision_post_norm: bool = True

    @classmethod
    def from_original_dict(cls, original: dict[str, Any]) -> dict[str, Any]:
        text, vision, resampler = _required(original, "text_config", "vision_config", "visual_resampler_config")
        vocab_size = original.get("vocab_size") or text.get("vocab_size") or _CHINESE_ALPACA["vocab_size"]
        num_query = resampler.get("num_query_tokens", 64)
        if original.get("use_visual_resampler") is False or num_query < 1:
            raise ValueError(
                "The configuration is of a VisualCLA without resampler (use_visual_resampler false, or "
                f"num_query_tokens {num_query}), which was never released and isn't supported."
            )
        return _common(original) | {
            "text_config": {"model_type": "llama"} | _text_keys(text) | {"vocab_size": vocab_size},
            "vision_config": _CLIP | {key: vision[key] for key in _CLIP if key in vision and key != "model_type"},
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


__all__ = ["MiniCPMVConfig", "OmniLMMConfig", "ResamplerConfig", "VisionResamplerConfig", "VisualCLAConfig"]
