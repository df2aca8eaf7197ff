"""The demo world's test sets: questions about pictures of flat shapes, and prompts to paint them.

Nothing is read: pictures, questions, prompts and checks are those of `viscpm_hf.shapes`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from ..batch.processing import PaintRows
from ..batch.rows import InputRow, row_key
from ..batch.runner import PreparedRow
from ..chat.answering import ChatRequest
from ..shapes import (
    LANGUAGES,
    QUESTION_TYPES,
    check_answer,
    check_painting,
    draw,
    judged_prompts,
    make_question,
    make_scene,
    scene_rng,
)
from .statistics import proportion


if TYPE_CHECKING:
    from ..chat.chat import VisCPMChat

SPLIT = "test"
IMAGE_SIZE = 128

# What is right about an answer, and about a painting.
CHAT_PARTS = ("right", "right_content", "right_language")
PAINT_PARTS = ("right", "right_colour", "right_kind", "right_place")


def _row(index: int, identifier: str, values: dict[str, Any]) -> InputRow:
    return InputRow(index, index + 1, row_key(identifier, None), identifier, values)


def chat_rows(count: int) -> list[InputRow]:
    """`count` questions of every type and language, each about a picture of its own among those of its type."""
    rows: list[InputRow] = []
    for type in QUESTION_TYPES:
        for language in LANGUAGES:
            found = picture = 0
            while found < count:
                if _question(type, language, picture) is not None:  # not every picture is clear enough for it
                    values = {"type": type, "language": language, "picture": picture}
                    rows.append(_row(len(rows), f"{type}/{language}/{picture}", values))
                    found += 1
                picture += 1
    return rows


def _question(type: str, language: str, picture: int):
    rng = scene_rng(SPLIT, picture, f"{type}/{language}")
    return make_question(make_scene(SPLIT, picture), type, language, rng)


@dataclass
class ShapesChatRows:
    """Answers and checks questions of [`chat_rows`]."""

    chat: VisCPMChat
    mode: str = "reference"
    seed: int = 0
    generation: Mapping[str, Any] = field(default_factory=dict)

    def prepare(self, row: InputRow) -> PreparedRow:
        question = _question(row.values["type"], row.values["language"], row.values["picture"])
        context = self.chat.context_of(question.turns_before)
        image = draw(make_scene(SPLIT, row.values["picture"]), IMAGE_SIZE)
        request = ChatRequest(image, question.text, context)
        return PreparedRow(row, (request, question), self.chat.prompt_length(request))

    def process(self, batch: Sequence[PreparedRow]) -> list[dict[str, Any] | Exception]:
        turns = self.chat.ask_batch(
            [item.request[0] for item in batch],
            mode=self.mode,
            seed=[self.seed + item.row.index for item in batch],
            return_exceptions=True,
            **self.generation,
        )
        results: list[dict[str, Any] | Exception] = []
        for item, turn in zip(batch, turns, strict=True):
            if isinstance(turn, Exception):
                results.append(turn)
                continue
            question = item.request[1]
            verdict = check_answer(question, turn.answer)
            results.append(
                {
                    **item.row.values,
                    "question": question.text,
                    "expected": question.answer,
                    "answer": turn.answer,
                    "right_content": verdict.is_right_content,
                    "right_language": verdict.is_right_language,
                    "right": verdict.is_right,
                }
            )
        return results


def paint_rows(count: int, seed: int = 0) -> list[InputRow]:
    """`count` prompts of every language."""
    rows: list[InputRow] = []
    for language in LANGUAGES:
        for index, prompt in enumerate(judged_prompts(language, count, seed)):
            values = {"language": language, "prompt": prompt.text, "judged": prompt}
            rows.append(_row(len(rows), f"{language}-{index}", values))
    return rows


class ShapesPaintRows(PaintRows):
    """Paints and checks prompts of [`paint_rows`]."""

    def process(self, batch: Sequence[PreparedRow]) -> list[dict[str, Any] | Exception]:
        results = super().process(batch)
        return [
            result if isinstance(result, Exception) else {**result, **self._checked(item.row, result["file"])}
            for item, result in zip(batch, results, strict=True)
        ]

    def _checked(self, row: InputRow, file: str) -> dict[str, Any]:
        with PIL.Image.open(Path(self.output) / file) as image:
            verdict = check_painting(row.values["judged"], image)
        return {
            "language": row.values["language"],
            "colour": verdict.colour,
            "kind": verdict.kind,
            "right_colour": verdict.is_right_colour,
            "right_kind": verdict.is_right_kind,
            "right_place": verdict.is_right_place,
            "right": verdict.is_right,
        }


def summarize(rows: Sequence[InputRow], lines: Mapping[str, dict[str, Any]], parts: Sequence[str]) -> dict[str, Any]:
    """The shares of right answers or paintings, per language and, for answers, type of question.

    Args:
        lines: the rows' results by their keys. A row that failed counts as wrong: it has no answer.
        parts: what is counted, `CHAT_PARTS` or `PAINT_PARTS`.
    """
    groups: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for name in dict.fromkeys((row.values.get("type", "all"), "all")):
            groups[row.values["language"]][name].append(lines[row.key])
    return {
        language: {
            name: {
                part: proportion(sum(bool(line.get(part)) for line in found), len(found)).as_dict() for part in parts
            }
            for name, found in sorted(by_name.items(), key=lambda item: item[0] == "all")
        }
        for language, by_name in groups.items()
    }
