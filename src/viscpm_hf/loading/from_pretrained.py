"""The one table: configuration <-> model <-> tokenizer <-> processor <-> map of the original weights.

`register()` tells transformers' Auto classes of it. transformers has no plugins, so it runs when `viscpm_hf` is
imported. Folders and Hub ids in the original's layout need more than a registration (their `config.json` may lack a
model type, they have no image processor, their remote code no longer imports), so the classes below look for that
layout first and otherwise do what they always did.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto import modeling_auto

from ..checkpoints.original import (
    CHAT,
    CPM_BEE,
    ORIGINAL_WEIGHTS_NAME,
    PAINT,
    OriginalCheckpointError,
    check_state_dict,
    checkpoint_kind,
    find_original_config,
    find_repository_file,
    key_map_of,
    load_state_dict,
    read_json,
)
from ..checkpoints.processors import register_sibling_processors
from ..checkpoints.weight_transforms import register_key_map
from ..families import key_maps
from ..modeling.configuration_beit3 import Beit3Config
from ..modeling.configuration_cpm_bee import CpmBeeConfig
from ..modeling.configuration_viscpm_chat import VisCPMChatConfig
from ..modeling.configuration_viscpm_paint import VisCPMPaintTextEncoderConfig
from ..modeling.image_processing_viscpm import VisCPMImageProcessor
from ..modeling.modeling_beit3 import Beit3Model
from ..modeling.modeling_cpm_bee import CpmBeeForCausalLM, CpmBeeModel
from ..modeling.modeling_viscpm_chat import VisCPMChatForConditionalGeneration, VisCPMChatModel
from ..modeling.modeling_viscpm_paint import VisCPMPaintTextEncoder
from ..modeling.processing_viscpm_chat import VisCPMChatProcessor
from ..modeling.tokenization_cpm_bee import CpmBeeTokenizer
from .model_loading import load_placed, needs_placement
from .sibling_models import register_sibling_models


# Keyword arguments that say where files come from; the rest belongs to the object that is loaded.
SOURCE_ARGUMENTS = (
    "cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder",
    "trust_remote_code", "code_revision", "name_or_path", "gguf_file", "config", "backend", "use_fast",
    "tokenizer_type", "user_agent", "_from_auto", "_from_pipeline", "_commit_hash",
    "_raise_exceptions_for_gated_repo", "_raise_exceptions_for_missing_entries",
    "_raise_exceptions_for_connection_errors",
)  # fmt: skip

# A configuration, its models by Auto class, and the maps that load original files into them.
MODELS: tuple[tuple[type, dict[type, type], tuple[key_maps.KeyMap, ...]], ...] = (
    (
        VisCPMChatConfig,
        {
            AutoModel: VisCPMChatModel,
            AutoModelForImageTextToText: VisCPMChatForConditionalGeneration,
            AutoModelForMultimodalLM: VisCPMChatForConditionalGeneration,
            AutoModelForCausalLM: VisCPMChatForConditionalGeneration,
        },
        (key_maps.CHAT,),
    ),
    (
        CpmBeeConfig,
        {AutoModel: CpmBeeModel, AutoModelForCausalLM: CpmBeeForCausalLM},
        (key_maps.CPM_BEE, key_maps.CPM_BEE_WITHIN),
    ),
    (Beit3Config, {AutoModel: Beit3Model}, ()),
    (VisCPMPaintTextEncoderConfig, {AutoModel: VisCPMPaintTextEncoder}, (key_maps.PAINT_TEXT_ENCODER,)),
)


def register() -> None:
    """Registers everything; a second call changes nothing."""
    for config_class, models, maps in MODELS:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class, model_class in models.items():
            auto_class.register(config_class, model_class, exist_ok=True)
        if maps:
            register_key_map(config_class.model_type, *maps)
        for model_class in set(models.values()):
            model_class._keys_to_ignore_on_load_unexpected = [
                f"^{re.escape(entry.source)}" for key_map in maps for entry in key_map.dropped
            ]
    for config_class in (VisCPMChatConfig, CpmBeeConfig, VisCPMPaintTextEncoderConfig):
        AutoTokenizer.register(config_class, tokenizer_class=CpmBeeTokenizer, exist_ok=True)
    AutoImageProcessor.register(VisCPMChatConfig, image_processor_classes={"pil": VisCPMImageProcessor}, exist_ok=True)
    AutoProcessor.register(VisCPMChatConfig, VisCPMChatProcessor, exist_ok=True)
    # A saved folder carries the code of its classes, so that it also loads where this package isn't installed.
    for config_class, models, _ in MODELS:
        config_class.register_for_auto_class()
        for auto_class, model_class in reversed(models.items()):  # of several, the first one stays
            model_class.register_for_auto_class(auto_class)
    for processor_class in (CpmBeeTokenizer, VisCPMImageProcessor, VisCPMChatProcessor):
        processor_class.register_for_auto_class()
    # `transformers serve` and the test mixins look a model up by these tables of names.
    for names in (
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,  # its labels are shifted
    ):
        names[VisCPMChatConfig.model_type] = VisCPMChatForConditionalGeneration.__name__
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[CpmBeeConfig.model_type] = CpmBeeForCausalLM.__name__

    for config_class in (AutoConfig, VisCPMChatConfig, CpmBeeConfig):
        _prefer_original(config_class, _original_config)
    _prefer_original(AutoTokenizer, _original_tokenizer)
    for processor_class in (AutoImageProcessor, VisCPMImageProcessor):
        _prefer_original(processor_class, _original_image_processor)
    for processor_class in (AutoProcessor, VisCPMChatProcessor):
        _prefer_original(processor_class, _original_processor)
    for model_class in (
        VisCPMChatForConditionalGeneration,
        VisCPMChatModel,
        CpmBeeForCausalLM,
        CpmBeeModel,
        VisCPMPaintTextEncoder,
    ):
        _check_original(model_class)
    register_sibling_models()
    register_sibling_processors()


# ------------------------------------------------------------------------------------------- the original's layout


def _prefer_original(auto_class: type, load: Callable[..., Any]) -> None:
    """Makes `auto_class.from_pretrained` use `load` for the original's layout."""
    stock = auto_class.__dict__.get("from_pretrained", auto_class.from_pretrained)
    stock = getattr(stock, "__func__", stock)
    if hasattr(stock, "_viscpm_hf"):
        return

    @functools.wraps(stock)
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        config = find_original_config(pretrained_model_name_or_path, **kwargs)
        if config is None:
            if cls is AutoTokenizer and kwargs.get("trust_remote_code"):
                kwargs["trust_remote_code"] = not _has_our_tokenizer(pretrained_model_name_or_path, kwargs)
            return stock(cls, pretrained_model_name_or_path, *args, **kwargs)
        return load(config, pretrained_model_name_or_path, **kwargs)

    from_pretrained._viscpm_hf = True
    auto_class.from_pretrained = classmethod(from_pretrained)


def _has_our_tokenizer(path: Any, kwargs: dict[str, Any]) -> bool:
    """Other Auto classes prefer a registered class to a folder's own code; AutoTokenizer has to be told."""
    if not isinstance(path, (str, os.PathLike)):
        return False
    config_file = find_repository_file(path, "tokenizer_config.json", **kwargs)
    if config_file is None:
        return False
    return read_json(config_file, "The configuration").get("tokenizer_class") == CpmBeeTokenizer.__name__


def _without_source(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key not in SOURCE_ARGUMENTS}


def _original_config(config, path, /, **kwargs):
    return type(config).from_dict(config.to_dict(), name_or_path=str(path), **_without_source(kwargs))


def _original_tokenizer(config, path, /, **kwargs) -> CpmBeeTokenizer:
    vocab_file = find_repository_file(path, "vocab.txt", **kwargs)
    if vocab_file is None:
        raise OSError(f"{path} has no vocab.txt, the vocabulary of the original checkpoint.")
    return CpmBeeTokenizer(vocab_file, name_or_path=str(path), **_without_source(kwargs))


def _original_image_processor(config, path, /, **kwargs) -> VisCPMImageProcessor:
    if not isinstance(config, VisCPMChatConfig):
        raise OSError(f"{path} holds a language model alone; it needs no image processor.")
    side = config.vision_config.image_size
    options = {key: value for key, value in _without_source(kwargs).items() if key != "return_unused_kwargs"}
    return VisCPMImageProcessor(**{"size": {"height": side, "width": side}, **options})


def _original_processor(config, path, /, **kwargs) -> VisCPMChatProcessor | CpmBeeTokenizer:
    tokenizer = _original_tokenizer(config, path, **kwargs)
    if not isinstance(config, VisCPMChatConfig):
        return tokenizer
    return VisCPMChatProcessor(
        _original_image_processor(config, path, **kwargs), tokenizer, num_query_tokens=config.num_query_tokens
    )


def _check_original(model_class: type) -> None:
    """Makes `model_class.from_pretrained` compare an original file with the model before anything is loaded.

    transformers only warns of missing weights, and fills them with noise. What concerns `device_map` and quantisation
    is checked likewise.
    """
    stock = model_class.from_pretrained.__func__
    if hasattr(stock, "_viscpm_hf"):
        return

    @functools.wraps(stock)
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        is_text_encoder = issubclass(cls, VisCPMPaintTextEncoder)
        found = find_original_config(pretrained_model_name_or_path, as_text_encoder=is_text_encoder, **kwargs)
        state_dict = kwargs.get("state_dict")
        if found is not None:
            if config is None:
                config = found if isinstance(found, cls.config_class) else found.get_text_config()
            weights = find_repository_file(pretrained_model_name_or_path, ORIGINAL_WEIGHTS_NAME, **kwargs)
            if weights is not None:
                state_dict = load_state_dict(weights)
                check_original_weights(state_dict, cls, config, weights)
        if args:
            return stock(cls, pretrained_model_name_or_path, *args, config=config, **kwargs)
        source = {key: kwargs[key] for key in SOURCE_ARGUMENTS if key in kwargs}
        shape = config or cls.config_class.from_pretrained(pretrained_model_name_or_path, **source)
        if not needs_placement(shape, kwargs):
            return stock(cls, pretrained_model_name_or_path, config=config, **kwargs)
        kwargs.pop("state_dict", None)
        return load_placed(
            stock,
            cls,
            pretrained_model_name_or_path,
            config=config,
            shape=shape,
            state_dict=state_dict,
            **kwargs,
        )

    from_pretrained._viscpm_hf = True
    model_class.from_pretrained = classmethod(from_pretrained)


def check_original_weights(
    state_dict: dict[str, torch.Tensor], model_class: type, config: Any, path: str | os.PathLike
) -> None:
    """Raises [`OriginalCheckpointError`] unless the state dict is what `model_class` of `config` needs."""
    kind = checkpoint_kind(state_dict)
    wants = CHAT if issubclass(model_class, (VisCPMChatForConditionalGeneration, VisCPMChatModel)) else CPM_BEE
    if isinstance(config, VisCPMPaintTextEncoderConfig):
        wants = PAINT
    if wants == CPM_BEE and kind in (CHAT, PAINT):  # both files hold a language model
        kind = CPM_BEE
    if kind is None:
        raise OriginalCheckpointError(
            f"{path} is no VisCPM or CPM-Bee checkpoint: its {len(state_dict)} tensors have other names "
            f"({', '.join(list(state_dict)[:3])})."
        )
    if kind == CHAT and wants == PAINT:
        raise OriginalCheckpointError(
            f"{path} is a VisCPM-Chat checkpoint (it has vpm.* tensors) and can't paint: VisCPM-Paint needs the file "
            "of openbmb/VisCPM-Paint."
        )
    if kind == PAINT and wants != PAINT:
        raise OriginalCheckpointError(
            f"{path} is a VisCPM-Paint checkpoint (it has unet.* tensors), not a {wants.replace('_', '-')} one: "
            "VisCPM-Chat needs the file of openbmb/VisCPM-Chat."
        )
    if kind != wants:
        raise OriginalCheckpointError(
            f"{path} is a {kind.replace('_', '-')} checkpoint, but {model_class.__name__} with a "
            f"{type(config).__name__} was asked for."
        )
    with torch.device("meta"):
        model = model_class(config)
    # The maps know the language model's parts by their names within `...ForCausalLM`, and so on.
    prefix = "model." if isinstance(model, (CpmBeeModel, VisCPMChatModel)) else ""
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    expected = {prefix + name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    problems = check_state_dict(state_dict, key_map_of(kind, state_dict), expected)
    if problems:
        raise OriginalCheckpointError(
            f"{path} doesn't fit its configuration: {problems}. Check that the file is complete, and that the "
            "configuration is this checkpoint's."
        )


def load_original_chat(
    path: str | os.PathLike, config: VisCPMChatConfig, state_dict: dict[str, torch.Tensor], **kwargs
) -> VisCPMChatForConditionalGeneration:
    """Loads a mapped original Chat file (`load_state_dict`) into a model; `kwargs` go to `from_pretrained`."""
    check_original_weights(state_dict, VisCPMChatForConditionalGeneration, config, Path(path))
    return VisCPMChatForConditionalGeneration.from_pretrained(None, config=config, state_dict=state_dict, **kwargs)


def load_original_text_encoder(
    path: str | os.PathLike, config: VisCPMPaintTextEncoderConfig, state_dict: dict[str, torch.Tensor], **kwargs
) -> VisCPMPaintTextEncoder:
    """As [`load_original_chat`], for the text encoder of an original Paint file."""
    check_original_weights(state_dict, VisCPMPaintTextEncoder, config, Path(path))
    own = {name: tensor for name, tensor in state_dict.items() if not name.startswith("unet.")}
    return VisCPMPaintTextEncoder.from_pretrained(None, config=config, state_dict=own, **kwargs)
