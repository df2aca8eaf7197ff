"""What the tests share: the golden data, and folders in the original's layout."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from viscpm_hf import VisCPMChat


GOLDEN = Path(__file__).parent / "golden"
CHAT_CASES = ("chat_a", "chat_b")
# CPM-Bee alone, with blocks that pruning removed.
PRUNED_CASE = "pruned_1"

# The GitHub spelling of the language model's sizes -> the Hub's.
HUB_SPELLING = {"dim_model": "hidden_size", "num_heads": "num_attention_heads", "num_layers": "num_hidden_layers"}


@dataclass(frozen=True)
class Golden:
    """Inputs and outputs of the reference implementation on one small VisCPM-Chat (see golden/README.md)."""

    name: str

    @property
    def folder(self) -> Path:
        return GOLDEN / self.name

    @property
    def weights(self) -> Path:
        return self.folder / "pytorch_model.bin"

    @property
    def vocab(self) -> Path:
        return self.folder / "vocab.txt"

    def image(self, index: int) -> Path:
        return self.folder / f"image_{index}.png"

    @cached_property
    def expected(self) -> dict[str, Any]:
        return json.loads((self.folder / "expected.json").read_text("utf-8"))

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "expected.safetensors")

    @cached_property
    def llm_config(self) -> dict[str, Any]:
        return json.loads((self.folder / "cpm-bee.json").read_text("utf-8"))

    @cached_property
    def vision_config(self) -> dict[str, Any]:
        return json.loads((self.folder / "vision.json").read_text("utf-8"))

    @property
    def num_queries(self) -> int:
        return self.vision_config["query_num"]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The original file's tensors; a new dict each time."""
        return torch.load(self.weights, weights_only=True)

    def load_chat(self, **kwargs) -> VisCPMChat:
        """A fresh model from the original file, as a user of the original's files loads it."""
        return VisCPMChat(self.weights, device="cpu", **kwargs)

    def write_layout(self, folder: Path, way: str = "chat") -> Path:
        """Writes a folder in the original's layout; `way` is one of `CHAT_LAYOUTS` or `CPM_BEE_LAYOUTS`."""
        llm, vision = self.llm_config, self.vision_config if way.startswith("chat") else {}
        in_hub_spelling = {HUB_SPELLING.get(key, key): value for key, value in llm.items()}
        config = {
            "chat": {"model_type": "viscpmchatbee", **llm, **vision},
            "chat without model_type": {**llm, **vision},
            "chat in Hub spelling": {"model_type": "viscpmchatbee", **in_hub_spelling, **vision},
            "chat with vision.json": {"model_type": "viscpmchatbee", **llm},
            "cpm-bee": {"model_type": "cpmbee", **llm},
            "cpm-bee without model_type": llm,
            "cpm-bee in Hub spelling": {"model_type": "cpmbee", **in_hub_spelling},
            "cpm-bee with bare names": {"model_type": "cpmbee", **llm},
        }[way]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        shutil.copy(self.vocab, folder)
        if way == "chat with vision.json":
            shutil.copy(self.folder / "vision.json", folder)
        if way.startswith("chat"):
            shutil.copy(self.weights, folder)
            named = {
                "image_processor_type": "VisCpmChatBeeImageProcessor",
                "input_size": vision["image_size"],
                "auto_map": {"AutoImageProcessor": "processing_viscpmchatbee.VisCpmChatBeeImageProcessor"},
            }
            (folder / "preprocessor_config.json").write_text(json.dumps(named), "utf-8")
        else:
            tensors = self.state_dict()
            llm_tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("llm.")} or tensors
            if way == "cpm-bee with bare names":
                llm_tensors = {name.removeprefix("llm."): tensor for name, tensor in llm_tensors.items()}
            torch.save(llm_tensors, folder / "pytorch_model.bin")
        return folder


CHAT_LAYOUTS = ("chat", "chat without model_type", "chat in Hub spelling", "chat with vision.json")
CPM_BEE_LAYOUTS = ("cpm-bee", "cpm-bee without model_type", "cpm-bee in Hub spelling", "cpm-bee with bare names")


def reference_options(generate: dict[str, Any]) -> dict[str, Any]:
    """The reference's generation arguments by our names."""
    names = {"beam_size": "num_beams", "max_length": "max_new_tokens"}
    return {names.get(name, name): value for name, value in generate.items() if name != "max_inp_length"}


def unescape(text: str) -> str:
    return text.replace("<<", "<")


def message(role: str, text: str, *images: Any) -> dict[str, Any]:
    """One message of a conversation as the chat template takes it."""
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}
