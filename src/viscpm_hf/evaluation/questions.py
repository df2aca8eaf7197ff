"""Question files of LLaVA-bench and of those made after it, in English or Chinese.

`question_id`, `image` (a file name), the question and its category, under the names that the files of each have
(`QUESTION_NAMES`, `CATEGORY_NAMES`): one JSON object a line (LLaVA, OwlEval) or one JSON list (VisualCLA's
translations).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..batch.rows import InputRow
from ..pipelines.ranking import has_chinese
from .running import Faults, read_identified, text_fault


# LLaVA's, in the order of its table; files may have others.
CATEGORIES = ("conv", "detail", "complex")
# LLaVA, OwlEval, VisualCLA's LLaVA; and OwlEval as mPLUG-Owl has it says nothing of a category.
QUESTION_NAMES = ("text", "question", "instruction")
CATEGORY_NAMES = ("category", "type")
LANGUAGES = ("en", "zh")


def language_of(text: str) -> str:
    return "zh" if has_chinese(text) else "en"


def _present(values: dict[str, Any], names: tuple[str, ...]) -> str:
    """The name that a file uses, or the first of `names`."""
    return next((name for name in names if name in values), names[0])


def _question_fault(values: dict[str, Any]) -> str | None:
    fault = text_fault(values, _present(values, QUESTION_NAMES))
    category = _present(values, CATEGORY_NAMES)
    if fault is None and category in values:
        fault = text_fault(values, category)
    if fault is None and values.get("language") not in (None, *LANGUAGES):
        fault = f'"language" is one of {", ".join(LANGUAGES)}, got {values["language"]!r:.40}'
    return fault or text_fault(values, "image")


def read_questions(path: str | os.PathLike, images: str | os.PathLike | None = None) -> list[InputRow]:
    """The questions of a file, each as `image`, `text`, `category` (`other` where the file has none) and `language`.

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
    return [replace(row, values=_as_llava(row.values)) for row in rows]


def _as_llava(values: dict[str, Any]) -> dict[str, Any]:
    text = values[_present(values, QUESTION_NAMES)]
    category = values.get(_present(values, CATEGORY_NAMES), "other")
    return {
        "image": values["image"],
        "text": text,
        "category": category,
        "language": values.get("language") or language_of(text),
    }


def in_order(categories: Iterable[str]) -> list[str]:
    """LLaVA's categories first, in the order of its table, then others as they come."""
    found = list(dict.fromkeys(categories))
    return [*(name for name in CATEGORIES if name in found), *(name for name in found if name not in CATEGORIES)]
