"""Small replicas of the public repositories, file by file: their real JSON files, with the golden data's sizes in it.

Remote code is in every one that has it, and ends the process if it runs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import reference
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from paint_support import CONFIGS, PAINT, prompt_checker, ranker, safety_checker
from sibling_folders import make_system, write_folder, write_tokenizer
from sibling_tokenizers import OMNILMM_VOCAB_SIZE
from support import HUB_SPELLING, PRUNED_CASE, Golden

from viscpm_hf import convert
from viscpm_hf.loading.paint import load_vae


HUB = Path(__file__).parent / "repositories"
CHAT, PRUNED = Golden("chat_a"), Golden(PRUNED_CASE)
REMOTE_CODE = "import os\nos._exit(66)\n"


def _sizes(config: dict[str, Any], llm: dict[str, Any], **others: Any) -> dict[str, Any]:
    """A repository's `config.json` with other sizes: no key is added."""
    own = {HUB_SPELLING.get(key, key): value for key, value in llm.items()} | others
    return {key: own.get(key, value) for key, value in config.items()}


def _json(folder: Path, name: str, content: Any) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content), "utf-8")


def _real(repository: str, name: str = "config.json") -> dict[str, Any]:
    return json.loads((HUB / repository.replace("/", "__") / name).read_text("utf-8"))


def _code(folder: Path, *names: str) -> None:
    for name in names:
        (folder / f"{name}.py").write_text(REMOTE_CODE, "utf-8")


def chat(folder: Path) -> None:
    """openbmb/VisCPM-Chat: three alternatives, of which the other two give other answers."""
    folder.mkdir(parents=True)
    vision = CHAT.vision_config
    config = _sizes(_real("openbmb/VisCPM-Chat"), CHAT.llm_config, **vision)
    _json(folder, "config.json", config)
    _json(folder, "tokenizer_config.json", _real("openbmb/VisCPM-Chat", "tokenizer_config.json"))
    image = _real("openbmb/VisCPM-Chat", "preprocessor_config.json")
    _json(folder, "preprocessor_config.json", {**image, "input_size": vision["image_size"]})
    # Of other sizes than the tower's of the release, which no file of the repository has.
    _json(folder, "vision.json", vision)
    shutil.copy(CHAT.vocab, folder)
    tensors = CHAT.state_dict()
    torch.save(tensors, folder / "pytorch_model.bin")
    for variant, factor in (("v1", 0.5), ("zhplus", -1.0)):
        other = {**tensors, "mapping.2.weight": factor * tensors["mapping.2.weight"]}
        torch.save(other, folder / f"pytorch_model.{variant}.bin")
    _code(folder, "configuration_viscpmchatbee", "modeling_cpmbee", "processing_viscpmchatbee")
    _code(folder, "tokenization_viscpmchatbee")


def paint(folder: Path) -> None:
    """openbmb/VisCPM-Paint: the UNet lies in `unet/` a second time, with other values here, to see which is read."""
    folder.mkdir(parents=True)
    llm = json.loads((PAINT / "cpm-bee.json").read_text("utf-8"))
    width = CONFIGS["unet"]["cross_attention_dim"]
    _json(folder, "config.json", _sizes(_real("openbmb/VisCPM-Paint"), llm, unet_cross_attention_dim=width))
    name = "tokenization_viscpmbee.VisCpmBeeTokenizer"
    named = {"tokenizer_class": "VisCpmBeeTokenizer", "auto_map": {"AutoTokenizer": [name, None]}}
    _json(folder, "tokenizer_config.json", named)
    shutil.copy(PAINT / "vocab.txt", folder)
    for file in ("pytorch_model.bin", "pytorch_model.balance.bin"):
        shutil.copy(PAINT / "pytorch_model.bin", folder / file)
    unet = UNet2DConditionModel(**CONFIGS["unet"])
    for variant in (None, "balance"):
        unet.save_pretrained(folder / "unet", safe_serialization=False, variant=variant)
    vae: AutoencoderKL = load_vae(PAINT / "vae.bin", CONFIGS["vae"])
    vae.save_pretrained(folder / "vae", safe_serialization=False)
    _json(folder, "scheduler/scheduler_config.json", {**CONFIGS["scheduler"], "steps_offset": 1})
    index = {
        "_class_name": "VisCPMPaintBeePipeline",
        "_diffusers_version": "0.18.0.dev0",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    _json(folder, "model_index.json", index)
    _json(folder, "feature_extractor/preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"})
    _code(folder, "pipeline", "configuration_cpmbee", "modeling_cpmbee", "tokenization_viscpmbee")


def cpm_bee(folder: Path) -> None:
    """openbmb/cpm-bee-10b: bare names."""
    folder.mkdir(parents=True)
    _cpm_bee_files(folder)
    torch.save(_llm(), folder / "pytorch_model.bin")


def cpm_bee_saved(folder: Path) -> None:
    """A copy that the Hub's own class saved: other names, shards, the head tied in one storage."""
    folder.mkdir(parents=True)
    _cpm_bee_files(folder)
    tensors = {f"cpmbee.{name}": tensor for name, tensor in _llm().items()}
    tensors["lm_head.weight"] = tensors["cpmbee.input_embedding.weight"]
    first = {name for name in tensors if ".1." not in name and ".2." not in name}
    weight_map = {}
    for number, names in enumerate((first, tensors.keys() - first), start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensor for name, tensor in tensors.items() if name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    _json(folder, "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})


def cpm_bee_pruned(folder: Path, repository: str) -> None:
    """openbmb/cpm-bee-1b, -2b, -5b: 48 layers with the release's own blocks in them."""
    folder.mkdir(parents=True)
    llm = {key: value for key, value in PRUNED.llm_config.items() if key not in ("num_layers", "mask_modules")}
    config = _sizes(_real(repository), llm)
    _json(folder, "config.json", config)
    for name in ("generation_config.json", "tokenizer_config.json"):
        _json(folder, name, _real("openbmb/cpm-bee-2b", name))
    shutil.copy(PRUNED.vocab, folder)
    recorded = PRUNED.state_dict()
    first = "encoder.layers.0."
    whole = {name.removeprefix(first): tensor for name, tensor in recorded.items() if name.startswith(first)}
    tensors = {name: tensor for name, tensor in recorded.items() if not name.startswith("encoder.layers.")}
    for layer, is_pruned in enumerate(config["mask_modules"]):
        for part, is_missing in zip(("self_att.", "ffn."), is_pruned, strict=True):
            own = {name: tensor.roll(layer, 0) for name, tensor in whole.items() if name.startswith(part)}
            tensors |= {} if is_missing else {f"encoder.layers.{layer}.{name}": tensor for name, tensor in own.items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    _code(folder, "configuration_cpmbee", "modeling_cpmbee", "tokenization_cpmbee")


def omnilmm(folder: Path) -> None:
    """openbmb/OmniLMM-12B: 256 queries, one file, whose tensors carry attributes."""
    folder.mkdir(parents=True)
    system = reference.omnilmm(OMNILMM_VOCAB_SIZE, num_query=256)
    write_tokenizer("omnilmm", folder)
    _sibling_config(folder, "openbmb/OmniLMM-12B", system.config)
    _json(folder, "generation_config.json", _real("openbmb/OmniLMM-12B", "generation_config.json"))
    for tensor in system.tensors.values():
        tensor.tensor_model_parallel = False  # which makes the pickle another one
    torch.save(system.tensors, folder / "pytorch_model.bin")


def minicpmv(folder: Path, repository: str, version: str) -> None:
    """openbmb/MiniCPM-V and MiniCPM-V-2: two safetensors files with their index."""
    folder.mkdir(parents=True)
    write_folder(f"minicpmv-{version}", folder)
    _sibling_config(folder, repository, json.loads((folder / "config.json").read_text("utf-8")))
    _code(folder, "configuration_minicpm", "modeling_minicpmv")


def visualcla(folder: Path) -> None:
    """ziqingyang/visualcla-7b-v0.1, and beside it, as repositories of their own, the two bases that users bring."""
    release = reference.write_visualcla_release(make_system("visualcla"), folder.parent / "parts")
    release.adapter.rename(folder)
    release.text_model.rename(folder.parent / "chinese-alpaca-plus-7b")
    release.vision_model.rename(folder.parent / "clip-vit-large-patch14")
    write_tokenizer("visualcla", folder)
    small = {"r": reference.LORA_RANK, "lora_alpha": reference.LORA_ALPHA}
    _json(folder, "adapter_config.json", _real("ziqingyang/visualcla-7b-v0.1", "adapter_config.json") | small)


def converted_paint(folder: Path) -> None:
    """Somebody's conversion of VisCPM-Paint."""
    convert(folder.parents[1] / "openbmb/VisCPM-Paint/pytorch_model.bin", folder)


def checkers(folder: Path) -> None:
    """Beside one another, a ranker and the checkers of prompts and pictures, which find nothing."""
    folder.mkdir(parents=True)
    for name, parts in (
        ("ranker", ranker(folder)),
        ("prompts", prompt_checker(folder, 0.1)),
        ("images", safety_checker(False)),
    ):
        for part in parts.values():
            part.save_pretrained(folder.parent / name)


def _sibling_config(folder: Path, repository: str, small: dict[str, Any]) -> None:
    _json(folder, "config.json", {key: small.get(key, value) for key, value in _real(repository).items()})


def _llm() -> dict[str, torch.Tensor]:
    return {name.removeprefix("llm."): tensor for name, tensor in CHAT.state_dict().items() if name.startswith("llm.")}


def _cpm_bee_files(folder: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = _real("openbmb/cpm-bee-10b", name)
        _json(folder, name, _sizes(content, CHAT.llm_config) if name == "config.json" else content)
    shutil.copy(CHAT.vocab, folder)
    _code(folder, "configuration_cpmbee", "modeling_cpmbee", "tokenization_cpmbee")


REPLICAS: dict[str, Callable[[Path], None]] = {
    "openbmb/VisCPM-Chat": chat,
    "openbmb/VisCPM-Paint": paint,
    "someone/paint": converted_paint,
    "someone/checkers": checkers,
    "openbmb/cpm-bee-10b": cpm_bee,
    "someone/cpm-bee-10b-shards": cpm_bee_saved,
    **{name: partial(cpm_bee_pruned, repository=name) for name in (f"openbmb/cpm-bee-{size}b" for size in (1, 2, 5))},
    "openbmb/OmniLMM-12B": omnilmm,
    "ziqingyang/visualcla-7b-v0.1": visualcla,
    "openbmb/MiniCPM-V": partial(minicpmv, repository="openbmb/MiniCPM-V", version="1.0"),
    "openbmb/MiniCPM-V-2": partial(minicpmv, repository="openbmb/MiniCPM-V-2", version="2.0"),
}
