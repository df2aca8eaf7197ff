"""Tokenizers, image processors and processors of the siblings, from their original folders.

The originals have no processor, and name tokenizer classes that would read their files otherwise than they were read
in training, so transformers' Auto classes ask here first.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from transformers import (
    AddedToken,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    TokenizersBackend,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..modeling.configuration_vision_resampler import (
    MiniCPMVConfig,
    OmniLMMConfig,
    VisualCLAConfig,
    refuse_later_minicpmv,
)
from ..modeling.image_processing_minicpmv import MiniCPMVImageProcessor
from ..modeling.image_processing_viscpm import VisCPMImageProcessor
from ..modeling.processing_minicpmv import MiniCPMVProcessor
from ..modeling.processing_omnilmm import OmniLMMProcessor
from ..modeling.processing_vision_resampler import VisionResamplerProcessor
from ..modeling.processing_visualcla import VisualCLAProcessor
from ..modeling.tokenization_legacy_sentencepiece import LegacySentencePieceTokenizer
from .original import OriginalCheckpointError, find_repository_file, read_json
from .sibling_original import CONFIG_CLASSES, find_original_sibling


PROCESSORS: dict[str, type[VisionResamplerProcessor]] = {
    OmniLMMConfig.model_type: OmniLMMProcessor,
    MiniCPMVConfig.model_type: MiniCPMVProcessor,
    VisualCLAConfig.model_type: VisualCLAProcessor,
}
# Where files come from, as `LegacySentencePieceTokenizer.from_pretrained` takes it; the rest is an object's own.
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
# Arguments of the Auto classes themselves.
_AUTO_ARGUMENTS = (
    "trust_remote_code", "code_revision", "config", "backend", "use_fast", "tokenizer_type", "gguf_file",
    "user_agent", "return_unused_kwargs", "_from_auto", "_from_pipeline", "_commit_hash",
    "_raise_exceptions_for_gated_repo", "_raise_exceptions_for_missing_entries",
    "_raise_exceptions_for_connection_errors",
)  # fmt: skip


def register_sibling_processors() -> None:
    """Tells the Auto classes; a second call changes nothing."""
    for config_class, tokenizer_class, image_processor_class in (
        (OmniLMMConfig, TokenizersBackend, VisCPMImageProcessor),
        (MiniCPMVConfig, LegacySentencePieceTokenizer, MiniCPMVImageProcessor),
        (VisualCLAConfig, LegacySentencePieceTokenizer, VisCPMImageProcessor),
    ):
        AutoTokenizer.register(config_class, tokenizer_class=tokenizer_class, exist_ok=True)
        AutoImageProcessor.register(
            config_class, image_processor_classes={"pil": image_processor_class}, exist_ok=True
        )
        AutoProcessor.register(config_class, PROCESSORS[config_class.model_type], exist_ok=True)
    for own_class in (LegacySentencePieceTokenizer, MiniCPMVImageProcessor, *PROCESSORS.values()):
        own_class.register_for_auto_class()
    _prefer(AutoTokenizer, load_tokenizer)
    _prefer(AutoImageProcessor, load_image_processor)
    for processor_class in (AutoProcessor, *PROCESSORS.values()):
        _prefer(processor_class, load_processor)


def _prefer(auto_class: type, load: Callable[..., Any]) -> None:
    """Makes `auto_class.from_pretrained` use `load` for the siblings' original folders."""
    stock = auto_class.from_pretrained.__func__
    if hasattr(stock, "_knows_siblings"):
        return

    @functools.wraps(stock)
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        sibling = find_original_sibling(pretrained_model_name_or_path, **kwargs)
        if sibling is not None:
            if sibling.model_type == MiniCPMVConfig.model_type:
                refuse_later_minicpmv(sibling.original_config)
            return load(sibling.original_config, pretrained_model_name_or_path, **kwargs)
        if cls is AutoTokenizer and _has_own_tokenizer(pretrained_model_name_or_path, kwargs):
            return LegacySentencePieceTokenizer.from_pretrained(
                pretrained_model_name_or_path, **_own(kwargs, hub=True)
            )
        return stock(cls, pretrained_model_name_or_path, *args, **kwargs)

    from_pretrained._knows_siblings = True
    auto_class.from_pretrained = classmethod(from_pretrained)


def _has_own_tokenizer(path: Any, kwargs: Mapping[str, Any]) -> bool:
    """transformers takes any tokenizer of the model type `minicpmv` for a wrong one, ours too."""
    if not isinstance(path, (str, os.PathLike)):
        return False
    file = find_repository_file(path, "tokenizer_config.json", **kwargs)
    if file is None:
        return False
    return read_json(file, "The configuration").get("tokenizer_class") == LegacySentencePieceTokenizer.__name__


def _own(kwargs: Mapping[str, Any], *, hub: bool = False) -> dict[str, Any]:
    """Arguments of the object that is loaded, `hub`: and where it is loaded from."""
    others = _AUTO_ARGUMENTS if hub else (*_AUTO_ARGUMENTS, *HUB_ARGUMENTS)
    return {name: value for name, value in kwargs.items() if name not in others}


# ---------------------------------------------------------------------------------------------------------- tokenizers


def load_tokenizer(original: Mapping[str, Any], path: str | os.PathLike, /, **kwargs) -> Any:
    """The tokenizer of an original folder, padding on the left, as generation needs it."""
    options = {"padding_side": "left", **_own(kwargs, hub=True)}
    kind = original["model_type"]
    if kind == OmniLMMConfig.model_type and find_repository_file(path, "tokenizer.json", **kwargs) is not None:
        return TokenizersBackend.from_pretrained(path, **options)
    if find_repository_file(path, "tokenizer.model", **kwargs) is None:
        raise OSError(f"{path} has no tokenizer.model, the vocabulary of the original checkpoint.")
    if kind == VisualCLAConfig.model_type:
        return _visualcla_tokenizer(path, options, kwargs)
    return LegacySentencePieceTokenizer.from_pretrained(path, **options)


def _visualcla_tokenizer(
    path: str | os.PathLike, options: dict[str, Any], kwargs: Mapping[str, Any]
) -> LegacySentencePieceTokenizer:
    """The four added tokens take white space with them, unless the folder says of them that they don't.

    The transformers of the release (4.30) did so with special tokens that are plain strings in
    `special_tokens_map.json`, which today's neither does nor can be told by that file.
    """

    def read(name: str) -> dict[str, Any]:
        file = find_repository_file(path, name, **kwargs)
        return {} if file is None else read_json(file, "The tokenizer's file")

    options = {"pad_token": "<pad>", **options}
    config = read("tokenizer_config.json")
    if "added_tokens_decoder" in config:  # saved later, with everything said
        return LegacySentencePieceTokenizer.from_pretrained(path, **options)
    added = read("added_tokens.json")
    missing = [token for token in VisualCLAProcessor.image_tokens if token not in added]
    if missing:
        raise OSError(f"added_tokens.json of {path} has no {', '.join(missing)}: it is missing, or another model's.")
    entries = read("special_tokens_map.json").values()
    flat = [item for entry in entries for item in (entry if isinstance(entry, list) else [entry])]
    said = {item["content"]: item for item in flat if isinstance(item, dict)}
    decoder = {}
    for token, index in added.items():
        flags = said.get(token, {"lstrip": True, "rstrip": True})
        decoder[index] = AddedToken(
            token, lstrip=flags["lstrip"], rstrip=flags["rstrip"], normalized=False, special=True
        )
    own = {name: value for name, value in options.items() if name not in HUB_ARGUMENTS}
    return LegacySentencePieceTokenizer(
        find_repository_file(path, "tokenizer.model", **kwargs),
        added_tokens_decoder=decoder,
        extra_special_tokens=[token for token in decoder.values() if str(token) != options["pad_token"]],
        name_or_path=str(path),
        **{"model_max_length": config.get("model_max_length", 2048), **own},
    )


# --------------------------------------------------------------------------------------------------- image processors


def load_image_processor(
    original: Mapping[str, Any], path: str | os.PathLike, /, **kwargs
) -> VisCPMImageProcessor | MiniCPMVImageProcessor:
    """The image processor that an original folder's configuration describes."""
    options = _own(kwargs)
    kind = original["model_type"]
    if kind == MiniCPMVConfig.model_type:
        return MiniCPMVImageProcessor(**{**_minicpmv_views(original), **options})
    defaults: dict[str, Any] = {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
    if kind == OmniLMMConfig.model_type:
        side = original.get("image_size")
        if side is None:
            raise OriginalCheckpointError(f"config.json of {path} lacks image_size.")
        defaults["size"] = {"height": side, "width": side}
        return VisCPMImageProcessor(**{**defaults, **options})
    side = original["vision_config"].get("image_size", 224)
    defaults |= {
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
    }
    file = find_repository_file(path, "preprocessor_config.json", **kwargs)
    said = {} if file is None else read_json(file, "The image processor's configuration")
    names = (*defaults, "do_resize", "do_rescale", "do_normalize", "resample", "rescale_factor")
    return VisCPMImageProcessor(**{**defaults, **{key: said[key] for key in names if key in said}, **options})


def _minicpmv_views(original: Mapping[str, Any]) -> dict[str, Any]:
    """1.0's configuration has no `slice_mode`; 2.0's has it true or false."""
    side = original.get("image_size", 448)
    views: dict[str, Any] = {"size": {"height": side, "width": side}, "slice_mode": "square"}
    if "slice_mode" in original:
        modes = {True: "adaptive", False: "whole"}
        if not isinstance(original["slice_mode"], bool):
            raise OriginalCheckpointError(
                f"slice_mode of the configuration is true or false, got {original['slice_mode']!r}."
            )
        views["slice_mode"] = modes[original["slice_mode"]]
        names = ("max_slice_nums", "scale_resolution", "patch_size")
        views |= {name: original[name] for name in names if name in original}
    return views


# --------------------------------------------------------------------------------------------------------- processors


def load_processor(original: Mapping[str, Any], path: str | os.PathLike, /, **kwargs) -> VisionResamplerProcessor:
    """The processor of an original folder."""
    config = CONFIG_CLASSES[original["model_type"]].from_dict(dict(original))
    options: dict[str, Any] = {"num_query_tokens": config.num_query_tokens}
    if isinstance(config, MiniCPMVConfig):
        options |= {
            "image_token_id": config.image_token_id,
            "image_start_id": original.get("im_start_token_id", 101),
            "image_end_id": original.get("im_end_token_id", 102),
        }
    own = _own(kwargs)
    options |= {name: own.pop(name) for name in ("chat_template", "max_input_length") if name in own}
    where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    return PROCESSORS[original["model_type"]](
        load_image_processor(original, path, **where), load_tokenizer(original, path, **where), **options
    )
