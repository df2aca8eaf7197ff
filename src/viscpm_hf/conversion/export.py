"""What lies beside the weights: configurations, tokenizer, remote code, the model card, the list of what was done."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import GENERATION_CONFIG_NAME

from ..checkpoints.location import MANIFEST_NAME, json_object
from ..checkpoints.original import (
    CHAT,
    CPM_BEE,
    LLM_SPELLINGS,
    PAINT,
    VISION_CONFIG_NAME,
    VISION_SPELLINGS,
    VOCAB_NAME,
)
from ..checkpoints.processors import load_processor
from ..checkpoints.tensor_files import dtype_name
from .folder_files import write_index, write_json
from .model_card import card
from .paint import copy_diffusion_parts
from .verify import empty_model


if TYPE_CHECKING:
    from .plan import Checkpoint, ConversionPlan


VISION_LANGUAGE = (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM)
AUTO_CLASSES = {CPM_BEE: (AutoModel, AutoModelForCausalLM)}
# Files of an original tokenizer that a converted folder has as they were.
KEPT_FILES = ("tokenizer.model",)
ORIGINAL_MODEL_TYPE = {CHAT: "viscpmchatbee", CPM_BEE: "cpmbee", PAINT: "cpmbee"}


def export_transformers_folder(
    folder: Path, checkpoint: Checkpoint, plan: ConversionPlan, manifest: Mapping[str, Any]
) -> None:
    """Completes a folder of weights to one that `from_pretrained` loads, with and without this package."""
    model = empty_model(checkpoint.config)
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = dtype_name(plan.stored_dtype())
    for part in (getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        if part is not None:
            part.dtype = config.dtype
    config.name_or_path = ""
    config.auto_map = auto_map(config, AUTO_CLASSES.get(checkpoint.kind, VISION_LANGUAGE))
    custom_object_save(model, folder)
    config.save_pretrained(folder)
    checkpoint.set_generation(model)
    model.generation_config.save_pretrained(folder)
    save_processor(folder, checkpoint)
    write_index(folder, plan, "model")
    write_json(folder / MANIFEST_NAME, manifest)
    (folder / "README.md").write_text(card(checkpoint, plan.num_parameters, manifest), "utf-8")


def auto_map(config: Any, auto_classes: tuple[type, ...]) -> dict[str, str]:
    """Which class of the remote code every Auto class takes."""
    classes = {"AutoConfig": type(config)}
    classes |= {auto_class.__name__: auto_class._model_mapping[type(config)] for auto_class in auto_classes}
    return {name: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for name, cls in classes.items()}


def save_processor(folder: Path, checkpoint: Checkpoint) -> None:
    if checkpoint.vocab is None:
        load_processor(checkpoint.location.original, checkpoint.config).save_pretrained(folder)
        return
    from ..modeling.image_processing_viscpm import VisCPMImageProcessor
    from ..modeling.processing_viscpm_chat import VisCPMChatProcessor
    from ..modeling.tokenization_cpm_bee import CpmBeeTokenizer

    tokenizer = CpmBeeTokenizer(str(checkpoint.vocab))
    if checkpoint.kind == CHAT:
        config = checkpoint.config
        side = config.vision_config.image_size
        image_processor = VisCPMImageProcessor(size={"height": side, "width": side})
        VisCPMChatProcessor(image_processor, tokenizer, num_query_tokens=config.num_query_tokens).save_pretrained(
            folder
        )
    else:
        tokenizer.save_pretrained(folder)
    shutil.copyfile(checkpoint.vocab, folder / VOCAB_NAME)  # to the byte, the line ends included


# -------------------------------------------------------------------------------------------------- the way back


def export_original_folder(folder: Path, checkpoint: Checkpoint, manifest: Mapping[str, Any]) -> None:
    """Completes an original file to a folder in the layout of its Hub repository."""
    before = _original_configs(checkpoint)
    if checkpoint.vocab is None:
        for name, content in before.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_json(folder / name, content)
        for name in KEPT_FILES:
            if (checkpoint.location.path / name).is_file():
                shutil.copyfile(checkpoint.location.path / name, folder / name)
        write_json(folder / MANIFEST_NAME, manifest)
        return
    config = {"model_type": ORIGINAL_MODEL_TYPE[checkpoint.kind], **_original_sizes(checkpoint)}
    write_json(folder / "config.json", {**config, **before.get("config.json", {})})
    for name in (VISION_CONFIG_NAME, GENERATION_CONFIG_NAME):
        if name in before:
            write_json(folder / name, before[name])
    shutil.copyfile(checkpoint.vocab, folder / VOCAB_NAME)
    write_json(folder / MANIFEST_NAME, manifest)
    if checkpoint.kind == PAINT:
        copy_diffusion_parts(checkpoint, folder)


def _original_configs(checkpoint: Checkpoint) -> dict[str, Any]:
    configs = json_object(checkpoint.location.path / MANIFEST_NAME).get("original_configs")
    return configs if isinstance(configs, dict) else {}


def _original_sizes(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration in the original's words."""
    config = checkpoint.config
    text = config.get_text_config(decoder=True)
    sizes = {spellings[0]: getattr(text, name) for name, spellings in LLM_SPELLINGS.items()}
    sizes["vocab_size"] = text.num_words
    sizes = {name: value for name, value in sizes.items() if value is not None}  # nothing was pruned
    if checkpoint.kind == CHAT:
        sizes |= {spellings[0]: getattr(config.vision_config, name) for name, spellings in VISION_SPELLINGS.items()}
    if checkpoint.kind == PAINT:
        sizes["unet_cross_attention_dim"] = config.projection_dim
    return sizes
