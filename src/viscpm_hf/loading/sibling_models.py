"""The siblings' models from their original folders: `from_pretrained` on what was released, with today's names."""

from __future__ import annotations

import functools
import os
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.models.auto import modeling_auto

from ..checkpoints.sibling_original import (
    ADAPTER,
    CONFIG_CLASSES,
    OriginalSibling,
    check_tensors,
    completed_config,
    converted_tensors,
    download_repository,
    find_original_sibling,
    original_tensors,
    with_stored_sizes,
)
from ..checkpoints.visualcla_adapter import adapted_tensors, check_bases
from ..modeling.configuration_vision_resampler import VisionResamplerConfig
from ..modeling.modeling_vision_resampler import (
    MiniCPMVForConditionalGeneration,
    OmniLMMForConditionalGeneration,
    VisionResamplerForConditionalGeneration,
    VisualCLAForConditionalGeneration,
)
from .model_loading import load_placed, needs_placement


MODEL_CLASSES: dict[str, type[VisionResamplerForConditionalGeneration]] = {
    "omnilmm": OmniLMMForConditionalGeneration,
    "minicpmv": MiniCPMVForConditionalGeneration,
    "visualcla": VisualCLAForConditionalGeneration,
}
# The originals are loaded by the first or the last of these.
AUTO_CLASSES = (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM)
# What an original folder's files are loaded without: they are here, and have no code that is wanted.
_HUB_ARGUMENTS = (
    "cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder",
    "trust_remote_code", "code_revision", "name_or_path", "use_safetensors", "variant",
    "_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs",
)  # fmt: skip


def register_sibling_models() -> None:
    """Tells the Auto classes; a second call changes nothing."""
    for model_type, model_class in MODEL_CLASSES.items():
        config_class = CONFIG_CLASSES[model_type]
        AutoConfig.register(model_type, config_class, exist_ok=True)
        config_class.register_for_auto_class()
        for auto_class in AUTO_CLASSES:
            auto_class.register(config_class, model_class, exist_ok=True)
        model_class.register_for_auto_class(AutoModelForImageTextToText)
        # `transformers serve` and the test mixins look a model up by these tables of names.
        for names in (
            modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,  # its labels are shifted
        ):
            names[model_type] = model_class.__name__
        _complete_configuration(config_class)
        _load_original(model_class)
    _complete_configuration(AutoConfig)
    for auto_class in AUTO_CLASSES:
        _take_adapter(auto_class)


def _wrap(cls: type, make: Any) -> None:
    """Replaces `cls.from_pretrained` by `make(stock)`, once."""
    stock = cls.from_pretrained.__func__
    if hasattr(stock, "_knows_sibling_models"):
        return
    wrapped = functools.wraps(stock)(make(stock))
    wrapped._knows_sibling_models = True
    cls.from_pretrained = classmethod(wrapped)


def _complete_configuration(config_class: type) -> None:
    """The sizes that an original `config.json` lacks come from the tensors."""

    def make(stock):
        def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
            result = stock(cls, pretrained_model_name_or_path, *args, **kwargs)
            config = result[0] if isinstance(result, tuple) else result
            if not isinstance(config, VisionResamplerConfig):
                return result
            sibling = find_original_sibling(pretrained_model_name_or_path, **kwargs)
            if sibling is None:
                return result
            config = completed_config(config, sibling)
            return (config, *result[1:]) if isinstance(result, tuple) else config

        return from_pretrained

    _wrap(config_class, make)


def _take_adapter(auto_class: type) -> None:
    """An Auto class takes any adapter for PEFT's, and looks for the one base that it names."""

    def make(stock):
        def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
            path = pretrained_model_name_or_path
            # Only what may be one is looked at: every model of every kind is loaded through here.
            if isinstance(path, (str, os.PathLike)) and (
                os.path.isfile(os.path.join(path, "adapter_config.json")) or "visualcla" in os.fspath(path).lower()
            ):
                sibling = find_original_sibling(path, **kwargs)
                if sibling is not None and (sibling.layout == ADAPTER or not os.path.isdir(path)):
                    return MODEL_CLASSES[sibling.model_type].from_pretrained(path, *args, **kwargs)
            return stock(cls, path, *args, **kwargs)

        return from_pretrained

    _wrap(auto_class, make)


def _load_original(model_class: type[VisionResamplerForConditionalGeneration]) -> None:
    """Makes `model_class.from_pretrained` read original folders; of VisualCLA's adapter together with its bases."""

    def make(stock):
        def from_pretrained(
            cls,
            pretrained_model_name_or_path,
            *args,
            config: PreTrainedConfig | None = None,
            text_model: str | os.PathLike | None = None,
            vision_model: str | os.PathLike | None = None,
            **kwargs,
        ):
            path, state_dict = pretrained_model_name_or_path, kwargs.get("state_dict")
            sibling = None
            if state_dict is None:
                sibling = find_original_sibling(path, with_weights=True, **kwargs)
            if sibling is None and (text_model is not None or vision_model is not None):
                raise ValueError(f"text_model and vision_model belong to VisualCLA's adapter, which {path} isn't.")
            if sibling is not None:
                config, state_dict = _read(sibling, cls, config, text_model, vision_model, kwargs)
                kwargs = {key: value for key, value in kwargs.items() if key not in _HUB_ARGUMENTS}
                kwargs["state_dict"], path = state_dict, None
            shape = config or cls.config_class.from_pretrained(path, **_hub_arguments(kwargs))
            if needs_placement(shape, kwargs):
                kwargs.pop("state_dict", None)
                loaded = load_placed(stock, cls, path, config=config, shape=shape, state_dict=state_dict, **kwargs)
            else:
                loaded = stock(cls, path, *args, config=config, **kwargs)
            if sibling is not None:
                _complete(loaded[0] if isinstance(loaded, tuple) else loaded, sibling, pretrained_model_name_or_path)
            return loaded

        return from_pretrained

    _wrap(model_class, make)


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}


def _read(
    sibling: OriginalSibling,
    model_class: type[VisionResamplerForConditionalGeneration],
    config: PreTrainedConfig | None,
    text_model: str | os.PathLike | None,
    vision_model: str | os.PathLike | None,
    kwargs: dict[str, Any],
) -> tuple[VisionResamplerConfig, dict[str, Any]]:
    """The configuration and the tensors, by our names, of an original checkpoint; both are checked."""
    if sibling.layout == ADAPTER:
        check_bases(sibling.folder, text_model, vision_model)
        text_folder, vision_folder = (download_repository(path, kwargs) for path in (text_model, vision_model))
        tensors = adapted_tensors(text_folder, vision_folder, [sibling.folder])
    elif text_model is not None or vision_model is not None:
        raise ValueError(
            f"text_model and vision_model belong to VisualCLA's adapter, but {sibling.folder} is a whole model."
        )
    else:
        tensors = original_tensors(sibling)
    tensors = converted_tensors(sibling.model_type, tensors)
    if config is None:
        original = CONFIG_CLASSES[sibling.model_type].from_dict(dict(sibling.original_config))
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        config = with_stored_sizes(original, shapes, sibling.folder)
    check_tensors(tensors, model_class, config, sibling.folder)
    return config, tensors


def _complete(
    model: VisionResamplerForConditionalGeneration, sibling: OriginalSibling, name_or_path: str | os.PathLike
) -> None:
    """What loading from a folder does besides the weights."""
    model.config.name_or_path = model.name_or_path = os.fspath(name_or_path)
    if (sibling.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(sibling.folder)
