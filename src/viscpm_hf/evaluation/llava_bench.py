"""LLaVA-bench: a model's answers to its questions.

Answers are written as LLaVA writes them (`question_id`, `prompt`, `text`, `model_id`), so that its tools take them
too, with `category`, `language` and `image` of the question.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..batch.processing import ChatRows
from ..batch.rows import InputRow
from ..batch.runner import PreparedRow
from .questions import LANGUAGES, in_order, language_of
from .statistics import mean, proportion


if TYPE_CHECKING:
    from ..chat.chat import VisCPMChat

# What a line of answers has.
ANSWER_FIELDS = ("text",)


@dataclass
class BenchRows:
    """Answers questions; see [`ChatRows`] for the fields."""

    chat: VisCPMChat
    images: Path
    model_id: str
    mode: str = "reference"
    seed: int = 0
    generation: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self._rows = ChatRows(self.chat, self.images, self.mode, self.seed, self.generation)

    def prepare(self, row: InputRow) -> PreparedRow:
        values = {"image": row.values["image"], "question": row.values["text"]}
        prepared = self._rows.prepare(replace(row, values=values))
        return replace(prepared, row=row)

    def process(self, batch: Sequence[PreparedRow]) -> list[dict[str, Any] | Exception]:
        return [
            result if isinstance(result, Exception) else self._answer(item.row, result)
            for item, result in zip(batch, self._rows.process(batch), strict=True)
        ]

    def _answer(self, row: InputRow, result: dict[str, Any]) -> dict[str, Any]:
        return {
            "question_id": row.id,
            "prompt": row.values["text"],
            "text": result["answer"],
            "model_id": self.model_id,
            **{name: row.values[name] for name in ("category", "language", "image")},
            "metadata": {"tokens": result["tokens"], "seed": result["seed"]},
        }


def summarize(answers: Iterable[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Per language and category: how many answers, how long, and how many in the question's language."""
    groups: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        if "error" not in answer:
            groups[answer["language"]][answer["category"]].append(answer)
            groups[answer["language"]]["all"].append(answer)
    return {
        language: {
            category: {
                "answers": len(found),
                "tokens": mean([answer["metadata"]["tokens"] for answer in found], seed).as_dict(),
                "in_language": proportion(
                    sum(bool(answer["text"]) and language_of(answer["text"]) == language for answer in found),
                    len(found),
                ).as_dict(),
            }
            for category in (*in_order(name for name in groups[language] if name != "all"), "all")
            if (found := groups[language][category])
        }
        for language in LANGUAGES
        if language in groups
    }
