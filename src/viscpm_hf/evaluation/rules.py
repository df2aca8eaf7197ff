"""How a judge is asked about a pair of answers, and how its verdict is read.

The prompt has the form that LLaVA's evaluation made common: what the picture shows in words, the question, both
answers, and the rule of the question's category. The rules themselves are the user's file.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .questions import CATEGORIES as CATEGORIES  # it was found here before
from .questions import LANGUAGES
from .running import Faults, read_identified


MAX_SCORE = 10


@dataclass(frozen=True)
class Rule:
    prompt: str
    role: str
    system: str | None = None


class Rules:
    """`{category: {"prompt", "role"}}` as LLaVA's rule.json, or one of these per language: `{"en": {...}, "zh": ...}`.

    `"system"` beside the categories is the system message, if there is to be one.

    Raises:
        ValueError: if the file holds anything else.
        OSError: if it can't be read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        try:
            table = json.loads(Path(path).read_text("utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        if not isinstance(table, dict):
            raise ValueError(f"{path} holds a JSON {type(table).__name__}, not an object of rules.")
        is_bilingual = any(language in table for language in LANGUAGES)
        self._tables = table if is_bilingual else dict.fromkeys(LANGUAGES, table)

    def rule(self, language: str, category: str) -> Rule:
        """Raises `ValueError` if the file has no such rule."""
        table = self._tables.get(language)
        rule = table.get(category) if isinstance(table, dict) else None
        if not isinstance(rule, dict) or not all(isinstance(rule.get(name), str) for name in ("prompt", "role")):
            raise ValueError(f'{self.path} has no rule {{"prompt", "role"}} for {category!r} in {language!r}.')
        return Rule(rule["prompt"], rule["role"], table.get("system"))


def read_contexts(path: str | os.PathLike) -> dict[str, str]:
    """What pictures show in words, by their names: `{"image", "captions" or "caption": text or list, optionally
    "instances": [{"category", "bbox"}]}`, one a line.

    Raises:
        ValueError: for other lines, naming file and line.
    """

    def fault(values: dict[str, Any]) -> str | None:
        try:
            return None if context_of(values) else "there is no caption"
        except (TypeError, KeyError, AttributeError):
            return 'not as {"image", "captions": [text], "instances": [{"category", "bbox"}]}'

    return {row.id: context_of(row.values) for row in read_identified(path, "image", fault)}


def context_of(values: Mapping[str, Any]) -> str:
    captions = values.get("captions", values.get("caption")) or []
    lines = [captions] if isinstance(captions, str) else list(captions)
    boxes = [f"{instance['category']}: {instance['bbox']}" for instance in values.get("instances") or []]
    return "\n".join(lines) + ("\n\n" + "\n".join(boxes) if boxes else "")


def read_answers(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Answers by the keys of their questions, each with its `text` (in VisualCLA's published answers `output`).

    Raises:
        ValueError: for lines that are no answers, naming file and line.
    """

    def fault(values: dict[str, Any]) -> str | None:
        if "error" in values:
            return "the question wasn't answered, run its evaluation again"
        # An empty answer is one too: a poor one.
        text = values.get("text", values.get("output"))
        return None if isinstance(text, str) else f'"text" is a text, got {text!r:.40}'

    return {
        row.key: {"text": row.values.get("output"), **row.values}
        for row in read_identified(path, "question_id", fault)
    }


@dataclass(frozen=True)
class Comparison:
    """One question to the judge."""

    question: Mapping[str, Any]
    context: str
    reference: str
    answer: str
    rule: Rule

    def messages(self) -> list[dict[str, str]]:
        role = self.rule.role
        parts = [("Context", self.context), ("Question", self.question["text"])]
        blocks = [f"[{name}]\n{text}\n\n" for name, text in parts]
        for number, text in ((1, self.reference), (2, self.answer)):
            blocks.append(f"[{role} {number}]\n{text}\n\n[End of {role} {number}]\n\n")
        blocks.append(f"[System]\n{self.rule.prompt}\n\n")
        system = [{"role": "system", "content": self.rule.system}] if self.rule.system else []
        return [*system, {"role": "user", "content": "".join(blocks)}]


def make_comparisons(questions, contexts, references, answers, rules: Rules, paths: Mapping[str, Any]) -> list:
    """A comparison for every question, in order.

    Args:
        paths: of questions, contexts, references and answers, for errors.

    Raises:
        ValueError: for questions that lack something, naming file and line.
    """
    faults = Faults(paths["questions"])
    comparisons = []
    for row in questions:
        for name, table in (("references", references), ("answers", answers)):
            if row.key not in table:
                faults.add(row.line, f"question {row.id!r} has no line in {paths[name]}")
        if row.values["image"] not in contexts:
            faults.add(row.line, f"the image {row.values['image']} has no line in {paths['contexts']}")
        rule = rules.rule(row.values["language"], row.values["category"])
        if not faults.found:
            comparisons.append(
                Comparison(
                    row.values,
                    contexts[row.values["image"]],
                    references[row.key]["text"],
                    answers[row.key]["text"],
                    rule,
                )
            )
    faults.check()
    return comparisons


# -------------------------------------------------------------------------------------------------------------- scores

# A number that is no part of a word, a range or a percentage; Chinese characters may touch it.
SCORE = re.compile(r"(?<![\w.-])\d+(?:\.\d+)?(?![\d.]*[A-Za-z%\d])", re.ASCII)
# "/10", "/10分", "out of 10", "（满分10分）"
OUT_OF = re.compile(rf"/\s*{MAX_SCORE}(?!\d)|out of {MAX_SCORE}(?!\d)|满分\s*{MAX_SCORE}(?!\d)", re.IGNORECASE)
# "Assistant 1", "助手2", "AI助理 1", "回答二": a number that names an answer.
NAMES = "assistants?|answers?|models?|responses?|助手|助理|回答|答案|模型"
LABEL = re.compile(rf"(?:{NAMES})\s*[#号]?\s*[12一二](?!\d|\.\d)", re.IGNORECASE)
ORDINAL = re.compile(r"第\s*[12一二]\s*[个位]?")


def parse_scores(review: str) -> tuple[float, float] | None:
    """The two scores that a review begins with; None if it doesn't.

    They stand in the first line (`8 9`, `8, 9`, `8/10 9/10`, `8分 9分`, `助手1：8分，助手2：9分`), or in the first
    two, one each. Scores are from 0 to 10.
    """
    lines = [line for line in unicodedata.normalize("NFKC", review).splitlines() if line.strip(" *#`|-")]
    for count in (1, 2):
        text = " ".join(lines[:count])
        for pattern in (OUT_OF, LABEL, ORDINAL):
            text = pattern.sub(" ", text)
        numbers = [float(number) for number in SCORE.findall(text)]
        if len(numbers) == 2:
            return (numbers[0], numbers[1]) if all(number <= MAX_SCORE for number in numbers) else None
        if len(numbers) != 1:
            return None
    return None
