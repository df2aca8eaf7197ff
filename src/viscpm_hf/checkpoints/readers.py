"""How the files of an original checkpoint become a configuration and tensors that our classes take.

Two forms: CPM-Bee's and VisCPM's tensors are renamed and scaled by transformers while it loads them, since a scaled
tensor is a new one; those of towers, resamplers and stock language models become ours by views. The rest of the house
asks `READERS` for the one that a family's row names.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..families.family import CHAT, COMPOSITE_FORM, CPM_BEE, CPM_BEE_FORM, FAMILIES, PAINT
from ..modeling.configuration_cpm_bee import CpmBeeConfig
from ..modeling.configuration_viscpm_paint import VisCPMPaintTextEncoderConfig
from ..modeling.configuration_vision_resampler import VisionResamplerConfig
from ..modeling.modeling_cpm_bee import CpmBeeModel
from ..modeling.modeling_viscpm_chat import VisCPMChatForConditionalGeneration, VisCPMChatModel
from ..modeling.modeling_viscpm_paint import VisCPMPaintTextEncoder
from .composite import added_token_id, check_converted, converted, converted_shapes, vision_sizes
from .errors import OriginalCheckpointError
from .key_matching import KeyMatcher
from .location import Original
from .original import (
    VISION_CONFIG_NAME,
    VISION_HEAD_DIM,
    CheckpointProblems,
    chat_config,
    check_state_dict,
    checkpoint_kind,
    key_map_of,
    text_config,
    text_encoder_config,
)
from .weight_transforms import apply_operation


class Reader:
    """What is asked of an original checkpoint, whatever its form."""

    renames_while_loading: bool
    """Whether `from_pretrained` takes the tensors by their original names."""

    def config(
        self,
        original: Original,
        config_class: type | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> PreTrainedConfig:
        """The configuration by our names.

        Args:
            config_class: what a model needs, which may be a part of the checkpoint; the checkpoint's own if None.
            shapes: of the tensors by their original names: sizes that the files lack come from them, and otherwise
                are those of the released model.
        """
        raise NotImplementedError

    def state_dict(
        self,
        tensors: Mapping[str, torch.Tensor],
        model_class: type[PreTrainedModel],
        config: PreTrainedConfig,
        source: str | os.PathLike,
    ) -> dict[str, torch.Tensor]:
        """Original tensors as `model_class.from_pretrained` takes them, without what it has no use for.

        Raises:
            OriginalCheckpointError: unless they are what the model of this configuration needs.
        """
        raise NotImplementedError


# -------------------------------------------------------------------------------------------------- CPM-Bee and VisCPM


class CpmBeeReader(Reader):
    renames_while_loading = True

    def config(self, original, config_class=None, shapes=None):
        kind = (checkpoint_kind(shapes) if shapes else None) or original.kind
        if config_class is None:
            config_class = FAMILIES[kind].config_class
        if config_class is VisCPMPaintTextEncoderConfig:
            config = text_encoder_config(original.config, shapes)
        elif config_class is CpmBeeConfig or kind != CHAT:
            config = text_config(original.config, shapes)
        else:
            # The released repository has no such file, and its tower's width needs none.
            is_said = original.config.get("vision_dim", 1) % VISION_HEAD_DIM == 0 and not os.path.isdir(original.name)
            vision = {} if is_said else original.json(VISION_CONFIG_NAME)
            config = chat_config(original.config, vision, shapes)
        config.name_or_path, config.tokenizer_class = original.name, FAMILIES[CHAT].tokenizer_class.__name__
        return config

    def state_dict(self, tensors, model_class, config, source):
        check_original_weights(tensors, model_class, config, source)
        matcher = KeyMatcher(key_map_of(_wanted_kind(model_class), tensors))
        return {name: tensor for name, tensor in tensors.items() if matcher.dropped_reason(name) is None}


def check_original_weights(
    state_dict: dict[str, torch.Tensor], model_class: type, config: Any, path: str | os.PathLike
) -> None:
    """Raises [`OriginalCheckpointError`] unless the state dict is what `model_class` of `config` needs."""
    kind, wants = checkpoint_kind(state_dict), _wanted_kind(model_class)
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
    _check_tied(state_dict, path)
    problems = check_state_dict(state_dict, key_map_of(kind, state_dict), expected)
    if problems:
        raise OriginalCheckpointError(
            f"{path} doesn't fit its configuration: {problems}. Check that the file is complete, and that the "
            "configuration is this checkpoint's."
        )


def _check_tied(state_dict: Mapping[str, torch.Tensor], path: str | os.PathLike) -> None:
    """Raises [`OriginalCheckpointError`] if there is a head of its own, which CPM-Bee doesn't have."""
    head, embedding = state_dict.get("lm_head.weight"), state_dict.get("cpmbee.input_embedding.weight")
    if head is None or embedding is None or head.data_ptr() == embedding.data_ptr() or torch.equal(head, embedding):
        return
    raise OriginalCheckpointError(
        f"{path} has lm_head.weight besides the embedding, and its values are others: CPM-Bee's head is the embedding."
    )


def _wanted_kind(model_class: type[PreTrainedModel]) -> str:
    if issubclass(model_class, (VisCPMChatForConditionalGeneration, VisCPMChatModel)):
        return CHAT
    return PAINT if issubclass(model_class, VisCPMPaintTextEncoder) else CPM_BEE


# ------------------------------------------------------------------------------ tower, resampler, stock language model


class CompositeReader(Reader):
    renames_while_loading = False

    def config(self, original, config_class=None, shapes=None):
        config = original.family.config_class.from_dict(dict(original.config))
        if shapes is None:
            return config
        return with_stored_sizes(config, converted_shapes(original.kind, shapes), original)

    def state_dict(self, tensors, model_class, config, source):
        converted = converted_tensors(model_class.config_class.model_type, tensors)
        problems = problems_of(converted, model_class, config)
        if problems:
            raise OriginalCheckpointError(
                f"{source} doesn't fit its configuration: {problems}. Check that all files are complete, and that the "
                "configuration is this checkpoint's."
            )
        return converted


def converted_tensors(model_type: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Original tensors -> ours; nearly all are views of them. Names that the map doesn't have are kept."""
    return converted(model_type, tensors, apply_operation)


def with_stored_sizes(
    config: VisionResamplerConfig, shapes: Mapping[str, tuple[int, ...]], original: Original
) -> VisionResamplerConfig:
    """The configuration with what the tensors, by our names, and the tokenizer's files know better.

    No original `config.json` has the vision tower's sizes, and the vocabulary's size is often the base model's.
    """
    config = copy.deepcopy(config)
    embedding = shapes.get("language_model.model.embed_tokens.weight")
    if embedding is not None:
        config.text_config.vocab_size = embedding[0]
    for name, size in vision_sizes(shapes).items():
        setattr(config.vision_config, name, size)
    placeholder = FAMILIES[config.model_type].placeholder
    if placeholder is not None:
        token, distance = placeholder
        known = added_token_id(original, token)
        config.image_token_id = config.text_config.vocab_size - distance if known is None else known
    return config


def problems_of(
    tensors: Mapping[str, torch.Tensor], model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> CheckpointProblems:
    """Compares tensors, by our names, with what the model needs."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in model_class(config).state_dict().items()}
    return check_converted(tensors, expected)


READERS: dict[str, Reader] = {CPM_BEE_FORM: CpmBeeReader(), COMPOSITE_FORM: CompositeReader()}


def reader_of(kind: str) -> Reader:
    return READERS[FAMILIES[kind].form]
