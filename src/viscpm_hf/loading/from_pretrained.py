"""One hook for each of our own classes: `from_pretrained` of an original's folder or repository.

`register()` runs when transformers is first used after `viscpm_hf` was imported (`registration`), since that library
has no plugins. It fills that library's registries
and replaces none of its functions: other models load as if this package weren't there. What the registries can't say
is said by our classes: `AutoModel` and its kin call `from_pretrained` of a class of ours, which looks whether the
checkpoint is an original one ([`find_original`]) and otherwise does what it always did. The repositories' own names
(`model_type` `viscpmchatbee`, a `VisCpmChatBeeTokenizer`) are registered too: a registered class goes before the
repository's code, with and without `trust_remote_code`.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TokenizersBackend,
)
from transformers.models.auto import modeling_auto, tokenization_auto

from ..checkpoints.composite import converted_shapes
from ..checkpoints.errors import OriginalCheckpointError
from ..checkpoints.headers import check_weight_files
from ..checkpoints.key_matching import name_pattern
from ..checkpoints.location import (
    ADAPTER,
    HUB_ARGUMENTS,
    Original,
    download_repository,
    find_original,
    kind_of,
    model_folder,
    original_from,
)
from ..checkpoints.original import ORIGINAL_WEIGHTS_NAME, load_state_dict
from ..checkpoints.processors import load_image_processor, load_processor, load_tokenizer, without_source
from ..checkpoints.readers import reader_of, with_stored_sizes
from ..checkpoints.visualcla_adapter import adapted_tensors, check_bases, without_revision
from ..checkpoints.weight_transforms import register_key_map
from ..families.family import FAMILIES, PAINT, Family
from ..modeling.configuration_viscpm_paint import VisCPMPaintTextEncoderConfig
from ..modeling.generation_cpm_bee import CpmBeeGenerationMixin
from ..modeling.modeling_viscpm_paint import VisCPMPaintTextEncoder
from .placement import load_with_device_map
from .quantization import load_quantized


# Arguments of a model's `from_pretrained` that say where the files are: an original's are here by then.
_SOURCE = (
    *HUB_ARGUMENTS,
    "trust_remote_code", "code_revision", "name_or_path", "use_safetensors", "variant", "adapter_kwargs",
    "_from_auto", "_from_pipeline", "_commit_hash",
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------- registration


def register() -> None:
    """Registers every family; a second call changes nothing."""
    for family in FAMILIES.values():
        _register_models(family)
        _register_processors(family)


def _register_models(family: Family) -> None:
    config_class = family.config_class
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    # A saved folder carries the code of its classes, so that it also loads where this package isn't installed.
    config_class.register_for_auto_class()
    for auto_class, model_class in reversed(family.models.items()):  # of several, the first one stays
        auto_class.register(config_class, model_class, exist_ok=True)
        if auto_class is not AutoModel or model_class is not family.models.get(AutoModelForImageTextToText):
            model_class.register_for_auto_class(auto_class)
    # `transformers serve` and the test mixins look a model up by these tables of names.
    if AutoModelForImageTextToText in family.models:
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[config_class.model_type] = family.model_class.__name__
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config_class.model_type] = family.model_class.__name__
    if AutoModelForCausalLM in family.models:  # by this one Trainer knows that labels are shifted
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config_class.model_type] = family.model_class.__name__
    if not family.key_maps:
        return
    if family.shares_model_type:
        _hook(config_class, "from_dict", _config_from_dict)
    if reader_of(family.kind).renames_while_loading:
        register_key_map(config_class.model_type, *family.key_maps)
        for model_class in set(family.models.values()):
            model_class._keys_to_ignore_on_load_unexpected = [
                f"^{name_pattern(entry.source)}" for key_map in family.key_maps for entry in key_map.dropped
            ]
    for model_type in family.original_types:
        if model_type not in _ORIGINAL_CONFIGS:
            _ORIGINAL_CONFIGS[model_type] = _original_config_class(model_type)
        AutoConfig.register(model_type, _ORIGINAL_CONFIGS[model_type], exist_ok=True)
    _hook(config_class, "from_pretrained", _config_from_pretrained)
    for model_class in set(family.models.values()):
        _hook(model_class, "from_pretrained", _model_from_pretrained)


def _register_processors(family: Family) -> None:
    config_class, tokenizer_class = family.config_class, family.tokenizer_class
    if family.image_processor_class is not None:
        AutoImageProcessor.register(
            config_class, image_processor_classes={"pil": family.image_processor_class}, exist_ok=True
        )
        _hook(family.image_processor_class, "from_pretrained", _image_processor_from_pretrained)
    if family.image_processor_name is not None:
        renamed = _renamed(family.image_processor_class, family.image_processor_name)
        AutoImageProcessor.register(_Named, image_processor_classes={"pil": renamed}, exist_ok=True)
    if family.processor_class is not None:
        AutoProcessor.register(config_class, family.processor_class, exist_ok=True)
        _hook(family.processor_class, "from_pretrained", _processor_from_pretrained)
    if tokenizer_class is None:
        return
    if tokenizer_class is not TokenizersBackend:
        _hook(tokenizer_class, "from_pretrained", _tokenizer_from_pretrained)
    # By name and never by configuration: AutoTokenizer prefers a folder's code to a class that it knows by the latter.
    names = [_renamed(tokenizer_class, name) for name in family.tokenizer_names]
    if tokenizer_class is TokenizersBackend:
        names.append(_OmniLMMTokenizer)
    for named in (tokenizer_class, *names):
        AutoTokenizer.register(_Named, tokenizer_class=named, exist_ok=True)
    if family.shares_model_type:
        # The originals name a class of the library's that reads their files otherwise than they were read in training.
        tokenization_auto.TOKENIZER_MAPPING_NAMES[config_class.model_type] = (names or [tokenizer_class])[-1].__name__
        tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(config_class.model_type)
    for own_class in (tokenizer_class, family.image_processor_class, family.processor_class):
        if own_class not in (None, TokenizersBackend):
            own_class.register_for_auto_class()


class _Named(PreTrainedConfig):
    """Of no checkpoint: what is registered for it is found by its name alone."""

    model_type = "viscpm_hf_named"


def _renamed(own_class: type, name: str) -> type:
    """A class that loads `own_class`, for repositories that know it by another name."""
    load = classmethod(lambda cls, *args, **kwargs: own_class.from_pretrained(*args, **kwargs))
    return type(name, (own_class,), {"from_pretrained": load, "__module__": __name__})


class _OmniLMMTokenizer(TokenizersBackend):
    """Loads the library's own class; the name is a place for a hook."""

    @classmethod
    def from_pretrained(cls, name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        return _tokenizer_from_pretrained(
            TokenizersBackend.from_pretrained.__func__, TokenizersBackend, name_or_path, *args, **kwargs
        )


_ORIGINAL_CONFIGS: dict[str, type[PreTrainedConfig]] = {}


def _original_config_class(model_type: str) -> type[PreTrainedConfig]:
    """What AutoConfig finds by the model type of an original; what it makes is a configuration of ours."""

    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        original = original_from(config_dict, kwargs.get("name_or_path", ""))
        # Of the Hub: sizes that this file lacks are known when the model's weights are here.
        result = _with_arguments(reader_of(original.kind).config(original, shapes=original.shapes), kwargs)
        return _handed_on(result, original)

    members = {"model_type": model_type, "from_dict": classmethod(from_dict), "__module__": __name__}
    return type(f"Original_{model_type}", (PreTrainedConfig,), members)


def _hook(own_class: type, name: str, function: Callable[..., Any]) -> None:
    """Makes a class method of one of our classes call `function(stock, cls, ...)`; once."""
    stock = getattr(own_class, name).__func__
    if hasattr(stock, "_viscpm_hf"):
        return

    @functools.wraps(stock)
    def hooked(cls, *args, **kwargs):
        return function(stock, cls, *args, **kwargs)

    hooked._viscpm_hf = True
    setattr(own_class, name, classmethod(hooked))


# ----------------------------------------------------------------------------------------------------- configurations


# What an Auto class has opened for a configuration, by that object, until the model's `from_pretrained` asks for it.
_opened: dict[int, Original] = {}


def _handed_on(result: Any, original: Original) -> Any:
    """What a `from_dict` returns, a configuration alone or with unused arguments; the checkpoint stays open for it."""
    config = result[0] if isinstance(result, tuple) else result
    if os.path.isdir(original.name):
        _opened[id(config)] = original
        weakref.finalize(config, _opened.pop, id(config), None)
    return result


def _find(name: Any, config: PreTrainedConfig | None, **kwargs: Any) -> Original | None:
    """As [`find_original`]; if the configuration was read of this very checkpoint, what was opened for it."""
    opened = _opened.pop(id(config), None)
    if opened is not None and isinstance(name, (str, os.PathLike)) and os.fspath(name) == opened.name:
        if not any(kwargs.get(argument) for argument in ("variant", "subfolder")):
            return opened
    return find_original(name, **kwargs)


def _with_arguments(config: PreTrainedConfig, kwargs: dict[str, Any]) -> Any:
    """The configuration with a caller's arguments in place of its own values, as every `from_dict` takes them."""
    stock = PreTrainedConfig.from_dict.__func__
    return stock(type(config), config.to_dict(), **{"name_or_path": config.name_or_path, **kwargs})


def _config_from_pretrained(stock: Callable[..., Any], cls: type, pretrained_model_name_or_path: Any, **kwargs) -> Any:
    original = find_original(pretrained_model_name_or_path, **kwargs)
    if original is None:
        return stock(cls, pretrained_model_name_or_path, **kwargs)
    returns_unused = {key: kwargs[key] for key in ("return_unused_kwargs",) if key in kwargs}
    kwargs = {**without_source(kwargs), **returns_unused}
    return _with_arguments(config_of(original), kwargs)


def _config_from_dict(stock: Callable[..., Any], cls: type, config_dict: dict[str, Any], **kwargs) -> Any:
    """The sizes that an original `config.json` lacks come from the tensors, if they are here."""
    result = stock(cls, config_dict, **kwargs)
    name = kwargs.get("name_or_path", "")
    original = original_from(config_dict, name) if os.path.isdir(name) else None
    if original is None or original.shapes is None:
        return result
    config, *others = result if isinstance(result, tuple) else (result,)
    config = with_stored_sizes(config, converted_shapes(original.kind, original.shapes), original)
    return _handed_on((config, *others) if others else config, original)


def config_of(original: Original) -> PreTrainedConfig:
    """An original's configuration by our names, with the sizes of its tensors if they are here."""
    return reader_of(original.kind).config(original, shapes=original.shapes)


def own_config(name_or_path: str | os.PathLike, *kinds: str, **kwargs: Any) -> PreTrainedConfig:
    """The configuration of a checkpoint of one of these kinds, in an original's layout or in ours.

    AutoConfig would ask whether to run the code of a folder that it doesn't know.

    Args:
        kwargs: `HUB_ARGUMENTS`.

    Raises:
        OriginalCheckpointError: if it is another model's.
        OSError: if there is none.
    """
    content, _ = PreTrainedConfig.get_config_dict(name_or_path, **kwargs)
    if not isinstance(content, dict):
        raise OriginalCheckpointError(
            f"The config.json of {name_or_path} holds a {type(content).__name__}, no object."
        )
    own_types = {family.config_class.model_type: kind for kind, family in FAMILIES.items()}
    found = kind_of(content) or own_types.get(content.get("model_type"))
    if found not in kinds:
        what = content.get("model_type") if found is None else FAMILIES[found].config_class.__name__
        needed = ", ".join(FAMILIES[kind].config_class.model_type for kind in kinds)
        raise OriginalCheckpointError(
            f"{name_or_path} holds a model of the type {what}, but one of the type {needed} is needed here."
        )
    return FAMILIES[found].config_class.from_pretrained(name_or_path, **kwargs)


def _complete(config: PreTrainedConfig, said: PreTrainedConfig, stored: PreTrainedConfig) -> None:
    """Gives a configuration the sizes that its file doesn't say and the tensors do, in place."""
    for name, value in vars(stored).items():
        if isinstance(value, PreTrainedConfig):
            _complete(getattr(config, name), getattr(said, name), value)
        elif not name.startswith("_") and getattr(config, name, None) == getattr(said, name, None) != value:
            setattr(config, name, value)


# ---------------------------------------------------------------------------------------- tokenizers and processors


def _tokenizer_from_pretrained(
    stock: Callable[..., Any], cls: type, pretrained_model_name_or_path: Any, *args, **kwargs
) -> Any:
    original = find_original(pretrained_model_name_or_path, **kwargs)
    if original is None:
        return stock(cls, pretrained_model_name_or_path, *args, **kwargs)
    return load_tokenizer(original, **kwargs)


def _image_processor_from_pretrained(
    stock: Callable[..., Any], cls: type, pretrained_model_name_or_path: Any, *args, **kwargs
) -> Any:
    original = find_original(pretrained_model_name_or_path, **kwargs)
    if original is None:
        return stock(cls, pretrained_model_name_or_path, *args, **kwargs)
    return load_image_processor(original, config_of(original), **kwargs)


def _processor_from_pretrained(
    stock: Callable[..., Any], cls: type, pretrained_model_name_or_path: Any, *args, **kwargs
) -> Any:
    original = find_original(pretrained_model_name_or_path, **kwargs)
    if original is None:
        # Its parts are found by Auto classes, which would ask whether to run the folder's code.
        kwargs.setdefault("trust_remote_code", False)
        return stock(cls, pretrained_model_name_or_path, *args, **kwargs)
    return load_processor(original, config_of(original), **kwargs)


# ------------------------------------------------------------------------------------------------------------- models


def _check_own_weights(path: Any, subfolder: str) -> None:
    """Raises an error of ours for a folder whose weights can't be read, or are a pickle that asks for more."""
    if not isinstance(path, (str, os.PathLike)) or not os.path.isdir(path):
        return
    folder = Path(path, subfolder)
    check_weight_files(folder, "model")
    pickled = folder / ORIGINAL_WEIGHTS_NAME
    if pickled.is_file() and not any(folder.glob("model*.safetensors*")):
        load_state_dict(pickled)  # torch's own words advise to load it nevertheless


def _model_from_pretrained(
    stock: Callable[..., Any],
    cls: type[PreTrainedModel],
    pretrained_model_name_or_path: Any,
    *args: Any,
    config: PreTrainedConfig | None = None,
    text_model: str | os.PathLike | None = None,
    vision_model: str | os.PathLike | None = None,
    **kwargs: Any,
) -> Any:
    """An original's tensors are compared with the model before anything is loaded: transformers only warns of missing
    ones, and fills them with noise. `device_map` and quantisation are ours in any case.

    Args:
        text_model, vision_model: the bases of VisualCLA's adapter.
    """
    path, state_dict = pretrained_model_name_or_path, kwargs.pop("state_dict", None)
    original = _find(path, config, **kwargs) if state_dict is None else None
    bases = {"text_model": text_model, "vision_model": vision_model}
    if original is None:
        if text_model is not None or vision_model is not None:
            raise ValueError(f"text_model and vision_model belong to VisualCLA's adapter, which {path} isn't.")
        if state_dict is None and kwargs.get("variant") is None:
            _check_own_weights(path, kwargs.get("subfolder") or "")
    else:
        is_auto = "adapter_kwargs" in kwargs  # which nobody but an Auto class passes, and every one of them does
        if is_auto and cls is original.family.base_class and cls is not original.family.model_class:
            # The repository's own AutoModel is the model that answers.
            return original.family.model_class.from_pretrained(original, *args, config=config, **kwargs)
        config, state_dict = _read(original, cls, config, is_auto, bases)
        path, kwargs = None, {key: value for key, value in kwargs.items() if key not in _SOURCE}
    source = {key: kwargs[key] for key in _SOURCE if key in kwargs and key != "adapter_kwargs"}
    shape = config or cls.config_class.from_pretrained(path, **source)
    if kwargs.get("device_map") is not None or _is_quantized(shape, kwargs):
        loaded = load_placed(stock, cls, path, config=config, shape=shape, state_dict=state_dict, **kwargs)
    else:
        if state_dict is not None:
            kwargs["state_dict"] = state_dict
        loaded = stock(cls, path, *args, config=config, **kwargs)
    if original is not None:
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.config.name_or_path = model.name_or_path = original.name
        generation = None if original.weights is not None else original.file("generation_config.json")
        if generation is not None and model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(generation.parent)
            if isinstance(model, CpmBeeGenerationMixin):
                model.set_default_generation()
    return loaded


def _read(
    original: Original,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig | None,
    is_auto: bool,
    bases: Mapping[str, Any],
) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
    """The configuration and the tensors that a model needs, of VisualCLA's adapter together with its bases; both are
    checked.

    Args:
        config: as the user, or an Auto class, gave it.
        is_auto: whether an Auto class asks, which has read `config.json` alone.
    """
    if original.layout == ADAPTER:
        check_bases(original.folder, **bases)
        folders = [model_folder(path, without_revision(original.hub)) for path in bases.values()]
        tensors = adapted_tensors(*folders, [download_repository(original.name, original.hub)])
    elif any(base is not None for base in bases.values()):
        raise ValueError(
            f"text_model and vision_model belong to VisualCLA's adapter, but {original.name} is a whole model."
        )
    else:
        tensors = original.tensors
    reader = reader_of(original.kind)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    stored = reader.config(original, model_class.config_class, shapes)
    if config is None:
        config = stored
    elif is_auto and type(config) is type(stored):
        _complete(config, reader.config(original, model_class.config_class), stored)
    files = [] if original.layout == ADAPTER else original.weight_files
    source = files[0] if len(files) == 1 else original.folder
    return config, reader.state_dict(tensors, model_class, config, source)


def load_placed(
    stock: Callable[..., Any],
    model_class: type[PreTrainedModel],
    name_or_path: Any,
    *,
    config: PreTrainedConfig | None,
    shape: PreTrainedConfig,
    state_dict: Mapping[str, torch.Tensor] | None,
    **kwargs,
) -> Any:
    """Loads with a `device_map`, a `quantization_config`, or both.

    Args:
        stock: transformers' own `from_pretrained`, with the class as its first argument.
        config: as the user gave it; `shape` is what the model will be like in any case.
        state_dict: of the mapped original file, if it is one.
        kwargs: further arguments of `from_pretrained`.
    """

    def load(path, *, config, state_dict, **kwargs):
        stock_load = functools.partial(stock, model_class, config=config)
        if kwargs.get("device_map") is not None:
            return load_with_device_map(stock_load, model_class, path, shape, state_dict, **kwargs)
        return stock_load(path, state_dict=state_dict if path is None else None, **kwargs)

    if _is_quantized(shape, kwargs):
        return load_quantized(load, model_class, name_or_path, shape, state_dict=state_dict, **kwargs)
    return load(name_or_path, config=config, state_dict=state_dict, **kwargs)


def _is_quantized(config: PreTrainedConfig, kwargs: Mapping[str, Any]) -> bool:
    return kwargs.get("quantization_config") is not None or hasattr(config, "quantization_config")


def load_original_text_encoder(
    path: str | os.PathLike, config: VisCPMPaintTextEncoderConfig, state_dict: dict[str, torch.Tensor], **kwargs
) -> VisCPMPaintTextEncoder:
    """Loads the text encoder of a mapped original Paint file; `kwargs` go to `from_pretrained`."""
    own = reader_of(PAINT).state_dict(state_dict, VisCPMPaintTextEncoder, config, path)
    return VisCPMPaintTextEncoder.from_pretrained(None, config=config, state_dict=own, **kwargs)
