"""What evaluations of models share: rows through a model, going on where an earlier run ended."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..batch.launching import Share
from ..batch.results import Results
from ..batch.rows import NAMED_FAULTS, InputRow, begins_list, read_rows, row_key
from ..batch.runner import BatchRunner, RowProcessor


class Faults:
    """Collects what is wrong with the lines, or the entries of the list, of a file, to name it all in one error."""

    def __init__(self, path: str | os.PathLike):
        self.path = path
        self.unit = "entry" if Path(path).is_file() and begins_list(path) else "line"
        self.found: list[str] = []

    def add(self, number: int, what: str) -> None:
        self.found.append(f"{self.unit} {number}: {what}")

    def check(self) -> None:
        """Raises `ValueError` if there is any fault."""
        if self.found:
            rest = f"; and {len(self.found) - NAMED_FAULTS} more" if len(self.found) > NAMED_FAULTS else ""
            raise ValueError(f"{self.path}, {'; '.join(self.found[:NAMED_FAULTS])}{rest}.")


def read_identified(path: str | os.PathLike, id_name: str, check: Callable[[dict[str, Any]], str | None]) -> list:
    """The rows of a file whose ids stand under `id_name`: one a line, or one JSON list.

    Args:
        check: says what is wrong with a row's values; None if nothing is.

    Raises:
        ValueError: for lines that are no rows, naming them.
        OSError: if the file can't be read.
    """
    faults, rows, lines = Faults(path), [], {}
    for row in _read_list(path) if begins_list(path) else read_rows(path):
        if row.error is not None:
            faults.add(row.line, row.error.removeprefix(f"Line {row.line} ").rstrip("."))
            continue
        identifier = row.values.get(id_name)
        if isinstance(identifier, bool) or not isinstance(identifier, (str, int)):
            faults.add(row.line, f'"{id_name}" is a text or a whole number, got {identifier!r:.40}')
            continue
        key = row_key(identifier, row.line)
        wrong = check(row.values)
        if key in lines:
            wrong = f"{id_name} {identifier!r} is that of {faults.unit} {lines[key]} too"
        if wrong is not None:
            faults.add(row.line, wrong)
        lines.setdefault(key, row.line)
        rows.append(replace(row, id=identifier, key=key))
    faults.check()
    if not rows:
        raise ValueError(f"{path} holds no row.")
    return rows


def _read_list(path: str | os.PathLike) -> Iterator[InputRow]:
    """The entries of a file that is one JSON list; an entry's number is in place of a line's."""
    try:
        entries = json.loads(Path(path).read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON list: {error}") from error
    for index, values in enumerate(entries):
        is_row = isinstance(values, dict)
        error = None if is_row else f"is a JSON {type(values).__name__}, not an object"
        yield InputRow(index, index + 1, row_key(None, index + 1), None, values if is_row else {}, error)


def text_fault(values: dict[str, Any], name: str) -> str | None:
    """What is wrong with a row's text; None if nothing is."""
    value = values.get(name)
    return None if isinstance(value, str) and value.strip() else f'"{name}" is a text, got {value!r:.40}'


def unfinished(results: Results, rows: Sequence[InputRow]) -> list[InputRow]:
    """The rows without a result; those that failed are tried again."""
    finished = {key for key, place in results.finished().items() if not place.is_error}
    return [row for row in rows if row.key not in finished]


def run_rows(
    results: Results, rows: Sequence[InputRow], load: Callable[[], RowProcessor], batch_size: int, share: Share
) -> None:
    """Runs this process's share of the unfinished rows; the model is loaded only if there are any."""
    todo = unfinished(results, list(share.rows(rows, batch_size)))
    if not todo:
        return
    processor = load()
    with (
        results.writer(share.process) as writer,
        tqdm(total=len(todo), unit="row", disable=None if share.is_first else True) as progress,
    ):
        BatchRunner(processor, batch_size, writer.write).run(todo, progress.update)


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a finished output."""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
