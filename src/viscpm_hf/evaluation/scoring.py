"""The table of LLaVA-bench: a model's scores relative to those of the reference answers, in percent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..batch.results import Results
from .judging import JUDGEMENT_FIELDS, read_places
from .questions import CATEGORIES, LANGUAGES, in_order
from .statistics import RESAMPLES, Estimate, ratio_of_means


HEADINGS = {"conv": "conversation", "detail": "detail", "complex": "complex", "average": "average"}


def read_judgements(paths: Iterable[Path]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The judgements of files, unfinished ones too, and how many questions of each file failed.

    Raises:
        ValueError: for files without judgements.
        OSError: for files that aren't there.
    """
    judgements, failures = [], {}
    for path in paths:
        results = Results(path, JUDGEMENT_FIELDS)
        if not results.output.is_file() and not results.parts.is_dir():
            raise FileNotFoundError(f"There are no judgements at {path}.")
        lines = list(read_places(results.finished()).values())
        judged = [line for line in lines if "tuple" in line]
        if not judged:
            raise ValueError(f"{path} holds no judgement.")
        lacking = [name for name in ("model_id", "language", "category") if not all(name in line for line in judged)]
        if lacking:
            raise ValueError(f"{path} is not from viscpm-hf eval judge: its judgements lack {', '.join(lacking)}.")
        judgements += judged
        failures[str(path)] = len(lines) - len(judged)
    return judgements, failures


def score(
    judgements: Iterable[dict[str, Any]], seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, dict[str, dict[str, Estimate]]]:
    """`model -> language -> category -> 100 · mean(model's scores) / mean(reference's)`.

    The average is over all questions of a language, whatever their category.
    """
    pairs: dict[str, dict[str, dict[str, list]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for judgement in judgements:
        by_category = pairs[judgement["model_id"]][judgement["language"]]
        for category in (judgement["category"], "average"):
            by_category[category].append(judgement["tuple"])
    return {
        model: {
            language: {
                category: _relative(by_language[language][category], seed, resamples)
                for category in _columns(by_language[language])
            }
            for language in LANGUAGES
            if language in by_language
        }
        for model, by_language in pairs.items()
    }


def _columns(categories: Iterable[str]) -> list[str]:
    """LLaVA's categories, others, and the average last."""
    return [*in_order(name for name in categories if name != "average"), "average"]


def _relative(pairs: list[list[float]], seed: int, resamples: int) -> Estimate:
    references, answers = zip(*pairs, strict=True)
    share = ratio_of_means(answers, references, seed, resamples)
    return Estimate(100 * share.value, 100 * share.low, 100 * share.high, share.count)


def table(scores: dict[str, dict[str, dict[str, Estimate]]]) -> str:
    """The scores as a Markdown table, a row for each model and language."""
    found = [name for by_language in scores.values() for by_category in by_language.values() for name in by_category]
    columns = _columns([*CATEGORIES, *found])
    lines = [
        f"| model | language | {' | '.join(HEADINGS.get(name, name) for name in columns)} | questions |",
        f"|---|---|{'---|' * len(columns)}---|",
    ]
    for model, by_language in scores.items():
        for language, by_category in by_language.items():
            cells = [by_category[category].text() if category in by_category else "–" for category in columns]
            lines.append(f"| {model} | {language} | {' | '.join(cells)} | {by_category['average'].count} |")
    return "\n".join(lines)
