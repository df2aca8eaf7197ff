"""Configurations of VisCPM's siblings: a vision tower, a resampler and a language model.

The towers and language models are transformers' own. What differs between the siblings is here; the classes of the
single systems also read the `config.json` of the original checkpoints (`original_vision_resampler`).
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_limits import check_layers
from .original_vision_resampler import CLIP, EVA, IN_OUR_WORDS, SIGLIP, TIMM_TOWERS, VISUALCLA_VOCAB_SIZE


def _specification(text: dict[str, Any], vision: dict[str, Any], resampler: dict[str, Any]) -> dict[str, Any]:
    def specification(config_class: type, values: dict[str, Any]) -> SubConfigSpec:
        kwargs = {key: value for key, value in values.items() if key != "model_type"}
        return SubConfigSpec(config_class=config_class, model_type=values.get("model_type"), init_kwargs=kwargs)

    return {
        "text_config": specification(AutoConfig, text),
        "vision_config": specification(AutoConfig, vision),
        "resampler_config": specification(ResamplerConfig, resampler),
    }


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
_CHINESE_ALPACA = {"model_type": "llama", "vocab_size": VISUALCLA_VOCAB_SIZE, "pad_token_id": 49956}


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
    sub_configs_defaults = _specification(_MINICPM, TIMM_TOWERS[SIGLIP], {"key_positions": "computed"})

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
        # A class of another system may be made of one of these.
        types = (getattr(base, "model_type", None) for base in cls.__mro__)
        return next((IN_OUR_WORDS[kind](original) for kind in types if kind in IN_OUR_WORDS), original)


@strict
class OmniLMMConfig(VisionResamplerConfig):
    r"""
    Configuration of OmniLMM-12B: EVA02-CLIP-E, one cross attention, Zephyr (Mistral). The nine tokens that it adds to
    the vocabulary are the last ones, the placeholder `<im_patch>` first.
    """

    model_type = "omnilmm"
    sub_configs_defaults = _specification(
        _ZEPHYR,
        TIMM_TOWERS[EVA],
        {"hidden_size": 4096, "num_attention_heads": 32, "key_positions": "interpolated"},
    )

    image_token_id: int = 32000
    num_prefix_tokens: int = 1


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


@strict
class VisualCLAConfig(VisionResamplerConfig):
    r"""
    Configuration of VisualCLA-7B: CLIP-L/14, six layers of queries, Chinese-Alpaca-Plus (Llama). The four tokens that
    it adds to the vocabulary are the last ones, the placeholder `<img_token>` the very last.
    """

    model_type = "visualcla"
    sub_configs_defaults = _specification(
        _CHINESE_ALPACA,
        CLIP,
        {"resampler_type": "concatenating", "hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 6,
         "intermediate_size": 4096, "layer_norm_eps": 1e-12},
    )  # fmt: skip

    image_token_id: int = 49957
    interpolate_pos_encoding: bool = False
    vision_post_norm: bool = True


__all__ = ["MiniCPMVConfig", "OmniLMMConfig", "ResamplerConfig", "VisionResamplerConfig", "VisualCLAConfig"]
