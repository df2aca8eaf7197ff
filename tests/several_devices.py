"""What `test_placement.py` wants to know of models on several devices; prints one JSON object.

`python several_devices.py ORIGINAL_FOLDER SAVED_FOLDER`, in a process of its own: see `pretend_devices`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pretend_devices
import torch
from accelerate import dispatch_model
from paint_support import PAINT
from support import Golden

from viscpm_hf import CpmBeeConfig, CpmBeeModel, VisCPMChat, VisCPMPaint


LANGUAGE_MODEL = "model.language_model"
REST = {"model.vision_tower": "pretend:0", "model.multi_modal_projector": "pretend:0", "lm_head": "pretend:0"}
CHAT_MAPS: dict[str, dict[str, Any]] = {
    "two devices": {
        **REST,
        LANGUAGE_MODEL: "pretend:0",
        f"{LANGUAGE_MODEL}.layers": "pretend:1",
        f"{LANGUAGE_MODEL}.layers.0": "pretend:0",
        f"{LANGUAGE_MODEL}.norm": "pretend:1",
    },
    "embedding and head on the second, bias on the first": {
        "": "pretend:0",
        f"{LANGUAGE_MODEL}.embed_tokens": "pretend:1",
        "lm_head": "pretend:1",
    },
    "vision on the second": {"": "pretend:0", "model.vision_tower": "pretend:1"},
    "a device, RAM and disk": {
        "": "pretend:0",
        "model.vision_tower": "disk",
        f"{LANGUAGE_MODEL}.layers.0": "cpu",
        f"{LANGUAGE_MODEL}.layers.1": "disk",
        f"{LANGUAGE_MODEL}.embed_tokens": "cpu",
        "lm_head": "cpu",
    },
}


def answers(chat: VisCPMChat, golden: Golden) -> list[Any]:
    chat.model.set_attn_implementation("eager")  # other devices than CPUs have another fused attention
    turn = chat.ask(golden.image(0), "这是什么？", max_new_tokens=6)
    generate = {"mode": "generate", "max_new_tokens": 6}
    again = chat.ask(None, "a㊣c?", turn.context, turn.vision_hidden_states, num_beams=2, **generate)
    documents = [{"input": "a㊣c", "<ans>": ""}, {"input": "abc", "<ans>": {"a": "", "b": ""}}]
    return [
        turn.answer,
        turn.vision_hidden_states.cpu().tolist(),
        again.answer,
        chat.ask(golden.image(1), "What?", cache_implementation="static", **generate).answer,
        chat.fill(documents, max_new_tokens=4),
        chat.fill(documents, mode="generate", max_new_tokens=4),
    ]


def chat_on_devices(golden: Golden, saved: str) -> dict[str, bool]:
    expected = answers(golden.load_chat(), golden)
    equal = {}
    for name, device_map in CHAT_MAPS.items():
        for source in (golden.weights, saved) if name == "two devices" else (golden.weights,):
            chat = VisCPMChat(source, device_map=device_map)
            equal[f"{name}, {Path(source).name}"] = answers(chat, golden) == expected
    return equal


def paint_on_devices() -> bool:
    def painter(**placement: Any) -> VisCPMPaint:
        painter = VisCPMPaint(
            PAINT / "pytorch_model.bin", False, False, False, config_path=PAINT / "cpm-bee.json", **placement
        )
        painter.pipeline.text_encoder.set_attn_implementation("eager")
        return painter

    def embeds(painter: VisCPMPaint) -> list[Any]:
        return [tensor.cpu().tolist() for tensor in painter.pipeline.encode_prompt("一只猫㊣", negative_prompt="狗")]

    spread = painter(device_map={"": "pretend:0", "model.layers.1": "pretend:1", "model.layers.2": "disk"})
    image = spread.generate("一只猫", generator=0, num_inference_steps=2)
    return embeds(spread) == embeds(painter(device="cpu")) and image.size[0] > 0


def bias_moves(devices: pretend_devices.PretendDevices) -> int:
    """How often the merged bias goes to the second device, which has four layers."""
    config = CpmBeeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=6, num_attention_heads=2, head_dim=8
    )
    model = CpmBeeModel(config).eval()
    first = dict.fromkeys(("embed_tokens", "position_bias", "layers.0", "layers.1"), "pretend:0")
    second = dict.fromkeys(("layers.2", "layers.3", "layers.4", "layers.5", "norm"), "pretend:1")
    dispatch_model(model, device_map=first | second, skip_keys=model._skip_keys_device_placement)
    devices.moves.clear()
    with torch.no_grad():
        model(torch.arange(7)[None].to("pretend:0"))
    return devices.moves[(1, 2, 7, 7), "pretend:1"]


def main(golden_name: str, saved: str) -> dict[str, Any]:
    pretend_devices.register()
    with pretend_devices.PretendDevices() as devices:
        return {
            "chat": chat_on_devices(Golden(golden_name), saved),
            "paint": paint_on_devices(),
            "bias moves": bias_moves(devices),
        }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
