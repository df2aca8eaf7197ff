"""Small random pipelines and coloured pictures with captions, for training Paint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import paint_support
import PIL.Image
import torch
from safetensors.torch import load_file

from viscpm_hf import VisCPMPaintPipeline
from viscpm_hf.training import PaintTrainingConfig


CAPTIONS = ("a red picture", "a blue picture", "一张绿色的图", "人闲桂花落，月静春山空")
COLOURS = ((220, 30, 30), (30, 30, 220), (30, 200, 30), (120, 120, 120))


def save_pipeline(folder: Path) -> Path:
    """A random pipeline as `save_pretrained` writes it."""
    parts = paint_support.components()
    # A fresh padding token is zero, and so would be its rows, which the UNet then doesn't see.
    parts["text_encoder"].get_input_embeddings().weight.data[0].normal_()
    VisCPMPaintPipeline(**parts).save_pretrained(folder)
    return folder


def write_captions(folder: Path, count: int = 8, first: int = 0, name: str = "train.jsonl") -> str:
    """`count` plain pictures of slightly different colours, and a file of their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(first, first + count):
        kind = index % len(CAPTIONS)
        rgb = tuple(min(255, value + index) for value in COLOURS[kind])
        PIL.Image.new("RGB", (20 + index % 3, 18), rgb).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "caption": CAPTIONS[kind]})
    return write_rows(folder / name, rows)


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def run_config(model: Path, data: str, output: Path, **options) -> PaintTrainingConfig:
    defaults = {"batch_size": 4, "max_steps": 4, "learning_rate": 2e-3, "log_steps": 1, "tensorboard": False}
    return PaintTrainingConfig(model=str(model), data=[data], output=str(output), **{**defaults, **options})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal_folders(first: Path, second: Path) -> None:
    ours, theirs = tensors_of(first), tensors_of(second)
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
