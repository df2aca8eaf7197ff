"""What the tests of Chat's fine-tuning share: rows about the golden pictures, and short runs."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from support import Golden

from viscpm_hf.training import ChatTrainingConfig


# The golden pictures are small; and what a test doesn't look at isn't written.
QUIET = {"tensorboard": False, "log_steps": 1, "min_image_side": 2}

COLOURS = ("红色", "蓝色", "a circle")


def conversation(image: str | None, *turns: tuple[str, str], **extra: Any) -> dict[str, Any]:
    messages = []
    for question, answer in turns:
        messages += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**({"image": image} if image is not None else {}), "conversations": messages, **extra}


def colour_rows(number: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows about the golden pictures whose answers depend on the picture; two turns each."""
    return [
        conversation(
            f"image_{index % 3}.png",
            ("<image>\n图片是什么颜色？", COLOURS[index % 3]),
            (f"what is it ({index})?", "a <x> circle 🙂"),
        )
        for index in range(first, first + number)
    ]


def write_rows(path: Path, rows: Sequence[Any]) -> str:
    """A JSON array, or JSON Lines by the suffix."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else "[" + ",\n".join(lines) + "]", "utf-8")
    return str(path)


def half_a_picture() -> bytes:
    """A JPEG that breaks off: it opens, and fails when it is decoded."""
    file = io.BytesIO()
    PIL.Image.effect_noise((96, 96), 100).save(file, "JPEG")
    return file.getvalue()[: file.tell() // 2]


def run_config(golden: Golden, data: str | list[str], output: Path, **options: Any) -> ChatTrainingConfig:
    data = [data] if isinstance(data, str) else data
    return ChatTrainingConfig(
        **{"model": golden.weights, "data": data, "images": golden.folder, "output": output, **QUIET, **options}
    )
