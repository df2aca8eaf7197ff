"""Which weights train: all, an adapter, or an adapter on a 4-bit model; and adapters merged into their model."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checkpoints.adapters import ADAPTER_CONFIG, AdapterFolder
from ..checkpoints.location import hub_arguments_for
from ..families.family import family_of
from .output import check_new_folder, written_whole


if TYPE_CHECKING:
    from peft import PeftModel

    from .chat_config import ChatTrainingConfig


logger = logging.get_logger(__name__)


def select_weights(
    model: PreTrainedModel,
    *,
    freeze_vision: bool,
    freeze_llm: bool,
    train_patches: bool = False,
) -> None:
    """Says what full fine-tuning trains: everything but the patch embedding, and what is frozen.

    `freeze_vision` is the reference's `tune_vision` off: the image experts with their positions; the queries and
    their experts, and the projector, go on training. Of the siblings it is the whole tower. `train_patches`: the
    patch embedding trains too.
    """
    family = family_of(model.config)
    last = model.config.vision_config.num_hidden_layers - 1
    # Processes that train together would wait for the gradients of idle ones.
    idle, image_weights = re.compile(family.idle_weights.format(last=last)), re.compile(family.image_weights)
    for name, parameter in model.named_parameters():
        is_frozen = (not train_patches and "patch_embedding" in name) or idle.search(name)
        is_frozen = is_frozen or (freeze_vision and image_weights.search(name))
        is_frozen = is_frozen or (freeze_llm and ("language_model." in name or name.startswith("lm_head.")))
        parameter.requires_grad_(not is_frozen)


def add_adapter(model: PreTrainedModel, config: ChatTrainingConfig) -> PeftModel:
    """Freezes the model and puts a fresh LoRA adapter on it.

    Raises:
        ValueError: if the model has none of the layers named.
    """
    from peft import LoraConfig, get_peft_model

    targets: Any = config.lora_targets or list(family_of(model.config).lora_targets)
    if len(targets) == 1 and not targets[0].isidentifier():
        targets = targets[0]
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"lora_targets {targets!r} is no regular expression: {error}.") from error
    adapter = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=targets
    )
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if isinstance(targets, str):
        found = any(re.fullmatch(targets, name) for name in linear)
    else:
        missing = [target for target in targets if not any(name.split(".")[-1] == target for name in linear)]
        if missing:
            raise ValueError(f"The model has no linear layer named {', '.join(missing)} (lora_targets).")
        found = True
    if not found:
        raise ValueError(f"No linear layer of the model has a name like {targets!r} (lora_targets).")
    peft_model = get_peft_model(model, adapter)
    # With a name, peft would look for its config.json, on the Hub too; the trainer writes the name. None is no name
    # either, but peft would put one in its place.
    peft_model.peft_config["default"].base_model_name_or_path = ""
    return peft_model


def record_base(folder: Path, model: str | None) -> None:
    """Writes into an adapter's folder which model it belongs to."""
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text("utf-8"))
    config["base_model_name_or_path"] = os.path.abspath(model) if model and os.path.exists(model) else model
    path.write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")


def merge_adapter(
    model: str | os.PathLike,
    adapter: str | os.PathLike,
    output: str | os.PathLike,
    *,
    dtype: str | None = None,
    llm_config: str | None = None,
    vision_config: str | None = None,
    vocab: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Path:
    """Writes a model with an adapter's changes in its weights, as a folder like any converted one.

    Args:
        model: file, folder or Hub id of the model that the adapter was trained on.
        adapter: the folder that training left, or one of its checkpoints.
        output: new folder; complete or not there at all.
        dtype: of the weights; as stored unless given.
        llm_config, vision_config, vocab: what `VisCPMChat` needs for an original file.
        revision, token, cache_dir: of the model's Hub repository.

    Raises:
        FileNotFoundError: if there is no adapter.
        OriginalCheckpointError: if it is another model's.
        ValueError: if output exists.
    """
    from peft import PeftModel

    from ..chat.chat import VisCPMChat

    adapter, output = Path(adapter), Path(output)
    found = AdapterFolder.find(adapter)
    if found is None:
        raise FileNotFoundError(f"{adapter} is no adapter: it has no {ADAPTER_CONFIG}, or is a whole model.")
    check_new_folder(output)
    dtype = dtype or "auto"  # None would be what suits the CPU, on which fp16 is not kept
    files = {"vision_config_path": vision_config, "vocab_path": vocab}
    hub = hub_arguments_for(model, revision=revision, token=token, cache_dir=cache_dir)
    chat = VisCPMChat(model, llm_config, **files, device="cpu", dtype=dtype, **hub)
    processor = found.prepare(chat.model, chat.processor)
    merged = PeftModel.from_pretrained(chat.model, os.fspath(adapter)).merge_and_unload()
    output.mkdir(parents=True, exist_ok=True)
    with written_whole(output) as folder:
        merged.save_pretrained(folder)
        processor.save_pretrained(folder)
    return output
