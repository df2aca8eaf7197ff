"""Tokenizers, image processors and processors of original checkpoints.

The originals have no processor, some have no image processor, and the siblings' name tokenizer classes that would read
their files otherwise than they were read in training. Every function takes what [`find_original`] found.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AddedToken, TokenizersBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..modeling.configuration_vision_resampler import MiniCPMVConfig, OmniLMMConfig, VisualCLAConfig
from ..modeling.image_processing_minicpmv import MiniCPMVImageProcessor
from ..modeling.image_processing_viscpm import VisCPMImageProcessor
from ..modeling.processing_viscpm_chat import VisCPMChatProcessor
from ..modeling.processing_vision_resampler import VisionResamplerProcessor
from ..modeling.processing_visualcla import VisualCLAProcessor
from ..modeling.tokenization_cpm_bee import CpmBeeTokenizer
from ..modeling.tokenization_legacy_sentencepiece import LegacySentencePieceTokenizer
from .errors import OriginalCheckpointError
from .location import HUB_ARGUMENTS, Original
from .original import VOCAB_NAME


IMAGE_PROCESSOR_NAME = "preprocessor_config.json"


# Arguments that say where files come from, and those of the Auto classes; the rest belongs to the object itself.
SOURCE_ARGUMENTS = (
    *HUB_ARGUMENTS,
    "trust_remote_code", "code_revision", "gguf_file", "config", "backend", "use_fast", "tokenizer_type", "user_agent",
    "name_or_path", "return_unused_kwargs", "_from_auto", "_from_pipeline", "_commit_hash",
    "_raise_exceptions_for_gated_repo", "_raise_exceptions_for_missing_entries",
    "_raise_exceptions_for_connection_errors",
)  # fmt: skip


def without_source(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the object that is loaded."""
    return {name: value for name, value in kwargs.items() if name not in SOURCE_ARGUMENTS}


# ---------------------------------------------------------------------------------------------------------- tokenizers


def load_tokenizer(original: Original, **kwargs: Any) -> Any:
    """The tokenizer of an original checkpoint; where it isn't CPM-Bee's it pads on the left, as generation needs."""
    usual = _cpm_bee_tokenizer if original.family.tokenizer_class is CpmBeeTokenizer else _stock_tokenizer
    return _TOKENIZERS.get(original.kind, usual)(original, without_source(kwargs))


def _cpm_bee_tokenizer(original: Original, own: Mapping[str, Any]) -> CpmBeeTokenizer:
    vocab = original.vocab or original.file(VOCAB_NAME)
    if vocab is None:
        raise OSError(f"{original.name} has no {VOCAB_NAME}, the vocabulary of the original checkpoint.")
    return CpmBeeTokenizer(os.fspath(vocab), name_or_path=original.name, **own)


def _omnilmm_tokenizer(original: Original, own: Mapping[str, Any]) -> Any:
    if original.file("tokenizer.json") is None:
        return _with_omnilmm_tokens(_stock_tokenizer(original, own), original)
    options = {**original.hub, "padding_side": "left", **own}
    return _with_omnilmm_tokens(TokenizersBackend.from_pretrained(original.name, **options), original)


# In the order of their ids, which are the vocabulary's last ones.
_OMNILMM_TOKENS = (
    "<im_patch>", "<im_start>", "<im_end>", "<box>", "</box>", "<ref>", "</ref>", "<quad>", "</quad>"
)  # fmt: skip


def _with_omnilmm_tokens(tokenizer: Any, original: Original) -> Any:
    """Adds the tokens that the folder's own files lack, as OmniLMM's code did after loading.

    Raises:
        OriginalCheckpointError: if they don't get the ids that the model has for them.
    """
    known = tokenizer.get_vocab()
    lacking = [token for token in _OMNILMM_TOKENS if token not in known]
    if not lacking:
        return tokenizer
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in lacking], special_tokens=True)
    size = original.config.get("vocab_size")
    first = None if size is None else size - len(_OMNILMM_TOKENS)
    ids = tokenizer.convert_tokens_to_ids(list(_OMNILMM_TOKENS))
    if first is not None and ids != list(range(first, size)):
        raise OriginalCheckpointError(
            f"The tokenizer of {original.name} lacks {', '.join(lacking)}, and with them it has {len(tokenizer):,} "
            f"tokens where the model has {size:,}: it is another model's."
        )
    return tokenizer


def _stock_tokenizer(original: Original, own: Mapping[str, Any]) -> LegacySentencePieceTokenizer:
    """As the library loads it, whatever we make of its class's `from_pretrained`."""
    _sentencepiece_file(original)
    load = getattr(LegacySentencePieceTokenizer.from_pretrained, "__wrapped__", None)
    own = {**original.hub, "padding_side": "left", **own}
    if load is None:
        return LegacySentencePieceTokenizer.from_pretrained(original.name, **own)
    return load(LegacySentencePieceTokenizer, original.name, **own)


def _visualcla_tokenizer(original: Original, own: Mapping[str, Any]) -> LegacySentencePieceTokenizer:
    """The four added tokens take white space with them, unless the folder says of them that they don't.

    The transformers of the release (4.30) did so with special tokens that are plain strings in
    `special_tokens_map.json`, which today's neither does nor can be told by that file.
    """
    own, vocab = {"padding_side": "left", "pad_token": "<pad>", **own}, _sentencepiece_file(original)
    config = original.json("tokenizer_config.json")
    if "added_tokens_decoder" in config:  # saved later, with everything said
        return _stock_tokenizer(original, own)
    added = original.json("added_tokens.json")
    missing = [token for token in VisualCLAProcessor.image_tokens if token not in added]
    if missing:
        raise OSError(
            f"added_tokens.json of {original.name} has no {', '.join(missing)}: it is missing, or another model's."
        )
    entries = original.json("special_tokens_map.json").values()
    flat = [item for entry in entries for item in (entry if isinstance(entry, list) else [entry])]
    said = {item["content"]: item for item in flat if isinstance(item, dict)}
    decoder = {}
    for token, index in added.items():
        flags = said.get(token, {"lstrip": True, "rstrip": True})
        decoder[index] = AddedToken(
            token, lstrip=flags["lstrip"], rstrip=flags["rstrip"], normalized=False, special=True
        )
    return LegacySentencePieceTokenizer(
        vocab,
        added_tokens_decoder=decoder,
        extra_special_tokens=[token for token in decoder.values() if str(token) != own["pad_token"]],
        name_or_path=original.name,
        **{"model_max_length": config.get("model_max_length", 2048), **own},
    )


def _sentencepiece_file(original: Original) -> Path:
    vocab = original.file("tokenizer.model")
    if vocab is None:
        raise OSError(f"{original.name} has no tokenizer.model, the vocabulary of the original checkpoint.")
    return vocab


_TOKENIZERS = {
    OmniLMMConfig.model_type: _omnilmm_tokenizer,
    VisualCLAConfig.model_type: _visualcla_tokenizer,
}


# --------------------------------------------------------------------------------------------------- image processors


def load_image_processor(
    original: Original, config: Any, **kwargs: Any
) -> VisCPMImageProcessor | MiniCPMVImageProcessor:
    """The image processor that an original checkpoint's configuration describes.

    Args:
        config: the model's, by our names.
    """
    said = _IMAGES.get(original.kind, _square_images)(original, config)
    image_processor_class = original.family.image_processor_class or VisCPMImageProcessor
    return image_processor_class(**{**said, **without_source(kwargs)})


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _square_images(original: Original, config: Any) -> dict[str, Any]:
    if getattr(config, "vision_config", None) is None:
        raise OSError(f"{original.name} holds a language model alone; it needs no image processor.")
    return {"size": _square(original.json(IMAGE_PROCESSOR_NAME).get("input_size", config.vision_config.image_size))}


def _omnilmm_images(original: Original, config: Any) -> dict[str, Any]:
    side = original.config.get("image_size")
    if side is None:
        raise OriginalCheckpointError(f"config.json of {original.name} lacks image_size.")
    return {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD, "size": _square(side)}


def _visualcla_images(original: Original, config: Any) -> dict[str, Any]:
    side = original.config["vision_config"].get("image_size", 224)
    defaults = {
        "image_mean": OPENAI_CLIP_MEAN,
        "image_std": OPENAI_CLIP_STD,
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "crop_size": _square(side),
    }
    said = original.json(IMAGE_PROCESSOR_NAME)
    names = (*defaults, "do_resize", "do_rescale", "do_normalize", "resample", "rescale_factor")
    return {**defaults, **{key: said[key] for key in names if key in said}}


def _minicpmv_images(original: Original, config: Any) -> dict[str, Any]:
    """1.0's configuration has no `slice_mode`; 2.0's has it true or false."""
    said = original.config
    views: dict[str, Any] = {"size": _square(said.get("image_size", 448)), "slice_mode": "square"}
    if "slice_mode" in said:
        if not isinstance(said["slice_mode"], bool):
            raise OriginalCheckpointError(
                f"slice_mode of the configuration is true or false, got {said['slice_mode']!r}."
            )
        views["slice_mode"] = "adaptive" if said["slice_mode"] else "whole"
        names = ("max_slice_nums", "scale_resolution", "patch_size")
        views |= {name: said[name] for name in names if name in said}
    return views


_IMAGES = {
    OmniLMMConfig.model_type: _omnilmm_images,
    MiniCPMVConfig.model_type: _minicpmv_images,
    VisualCLAConfig.model_type: _visualcla_images,
}


# --------------------------------------------------------------------------------------------------------- processors


def load_processor(original: Original, config: Any, **kwargs: Any) -> VisCPMChatProcessor | VisionResamplerProcessor:
    """The processor of an original checkpoint; see [`load_image_processor`]."""
    own = without_source(kwargs)
    options = {name: own.pop(name) for name in ("chat_template", "max_input_length") if name in own}
    if isinstance(config, MiniCPMVConfig):
        options |= {
            "image_token_id": config.image_token_id,
            "image_start_id": original.config.get("im_start_token_id", 101),
            "image_end_id": original.config.get("im_end_token_id", 102),
        }
    image_processor = load_image_processor(original, config, **own)
    return (original.family.processor_class or VisCPMChatProcessor)(
        image_processor, load_tokenizer(original, **own), num_query_tokens=config.num_query_tokens, **options
    )
