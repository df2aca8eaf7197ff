"""The rows of an input file: one JSON object a line, each with an id of its own. They are read one by one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


# So many faults of a file are named before "and 5 more".
NAMED_FAULTS = 5


@dataclass(frozen=True)
class InputRow:
    """One line of an input file."""

    index: int
    """Counted from 0, blank lines aside."""
    line: int
    """Counted from 1, as editors do."""
    key: str
    """What tells the row from others: its id, or its line if that is no JSON object."""
    id: str | int | None
    values: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    """Why the line is no row."""


def row_key(identifier: str | int | None, line: int | None) -> str:
    """See [`InputRow.key`]; `1` and `"1"` are the same id."""
    return f"line {line}" if identifier is None else json.dumps(str(identifier), ensure_ascii=False)


def read_rows(path: str | os.PathLike) -> Iterator[InputRow]:
    """Yields the rows of a file. A line that is no JSON object is a row with an error."""
    index = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _parse(line, number, index)
                index += 1


def _parse(line: bytes, number: int, index: int) -> InputRow:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are a ValueError too
        return InputRow(index, number, row_key(None, number), None, error=f"Line {number} is no JSON: {error}")
    if not isinstance(values, dict):
        error = f"Line {number} is a JSON {type(values).__name__}, not an object."
        return InputRow(index, number, row_key(None, number), None, error=error)
    identifier = values.get("id")
    return InputRow(index, number, row_key(identifier, number), identifier, values)


def check_rows(path: str | os.PathLike) -> int:
    """The number of rows of a file in which every object has an id of its own.

    Raises:
        ValueError: if objects lack one, or share one: a result could not be told from another. Names the lines.
        OSError: if the file can't be read.
    """
    lines: dict[str, int] = {}
    faults: list[str] = []
    count = 0
    for row in read_rows(path):
        count += 1
        if row.error is not None:
            if count == 1 and row.error.startswith("Line 1 is") and begins_list(path):
                raise ValueError(
                    f"{path} begins with '[': it is one JSON list, but rows stand one JSON object a line (JSONL)."
                )
            continue
        if row.id is None or row.id == "":
            faults.append(f'line {row.line} has no "id"')
        elif isinstance(row.id, bool) or not isinstance(row.id, (str, int)):
            faults.append(f'line {row.line} has an "id" that is neither a string nor a whole number')
        elif row.key in lines:
            faults.append(f"line {row.line} has the id {row.key} of line {lines[row.key]}")
        lines.setdefault(row.key, row.line)
    if faults:
        rest = f" and {len(faults) - NAMED_FAULTS} more" if len(faults) > NAMED_FAULTS else ""
        raise ValueError(f"{path}: {'; '.join(faults[:NAMED_FAULTS])}{rest}. Every row needs an id of its own.")
    if count == 0:
        raise ValueError(f"{path} holds no row.")
    return count


def begins_list(path: str | os.PathLike) -> bool:
    """Whether a file looks like one JSON list, not like one object a line."""
    with open(path, "rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def resolve_image(value: Any, folder: Path) -> Path | None:
    """The picture that a row names, relative to `folder`; None if it names none.

    Raises:
        ValueError: for anything but a path.
    """
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise ValueError(f'"image" is the path of one picture, got {value!r:.80}.')
    if "\0" in value:
        raise ValueError('"image" is no path: it has a NUL character.')
    return folder / value


def text_of(values: dict[str, Any], name: str, default: str | None = None) -> str:
    """A row's text.

    Raises:
        ValueError: if it is missing, or no text.
    """
    value = values.get(name, default)
    if value is None:
        raise ValueError(f'The row has no "{name}".')
    if not isinstance(value, str):
        raise ValueError(f'"{name}" is a text, got {type(value).__name__}.')
    return value


def seed_of(values: dict[str, Any], default: int | None) -> int | None:
    """A row's seed, or else the default.

    Raises:
        ValueError: for anything but a whole number from 0 on that torch takes.
    """
    value = values.get("seed", default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f'"seed" is a whole number from 0 to 2^63 - 1, got {value!r:.40}.')
    return value
