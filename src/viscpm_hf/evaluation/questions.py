"""Question files of LLaVA-bench, in English or Chinese.

One JSON object a line: `question_id`, `image` (a file name), `text`, and `category` (`conv`, `detail` or `complex`).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..batch.rows import InputRow
from ..pipelines.ranking import has_chinese
from .running import Faults, read_identified, text_fault


CATEGORIES = ("conv", "detail", "complex")
LANGUAGES = ("en", "zh")


def language_of(text: str) -> str:
    return "zh" if has_chinese(text) else "en"


def _question_fault(values: dict[str, Any]) -> str | None:
    fault = text_fault(values, "text")
    if fault is None and values.get("category") not in CATEGORIES:
        fault = f'"category" is one of {", ".join(CATEGORIES)}, got {values.get("category")!r:.40}'
    if fault is None and values.get("language") not in (None, *LANGUAGES):
        fault = f'"language" is one of {", ".join(LANGUAGES)}, got {values["language"]!r:.40}'
    return fault or text_fault(values, "image")


def read_questions(path: str | os.PathLike, images: str | os.PathLike | None = None) -> list[InputRow]:
    """The questions of a file, each with its `language`.

    Args:
        images: folder of their pictures, to see that they are there.

    Raises:
        ValueError: for lines that are no questions or have no picture, naming file and line.
        OSError: if the file can't be read.
    """
    rows = read_identified(path, "question_id", _question_fault)
    if images is not None:
        if not Path(images).is_dir():
            raise FileNotFoundError(f"There is no folder {images} of images.")
        faults = Faults(path)
        for row in rows:
            if not (Path(images) / row.values["image"]).is_file():
                faults.add(row.line, f"there is no image {Path(images) / row.values['image']}")
        faults.check()
    return [replace(row, values={"language": language_of(row.values["text"]), **row.values}) for row in rows]


__all__ = ["CATEGORIES", "LANGUAGES", "language_of", "read_questions"]
