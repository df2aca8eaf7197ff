"""Files of training rows, read lazily: JSON and JSONL by position, parquet and Hub datasets through `datasets`."""

from __future__ import annotations

import codecs
import json
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .records import BadRowError


JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
CHUNK = 1 << 20
HEAD = 4096  # what tells an array from lines
DEFAULT_SPLIT = "train"


class RowSource(Protocol):
    """Rows by number. `scan` goes through all of them once, and may be what makes the others work."""

    folder: Path | None
    """What relative paths of images start from."""

    def scan(self) -> Iterator[tuple[int, Any]]:
        """`(row number, row)`, or in the place of a row that can't be read a [`BadRowError`]."""

    def row(self, index: int) -> Any: ...

    def where(self, index: int) -> str:
        """File and line of a row, for messages."""


@dataclass(frozen=True)
class DataPart:
    """One of the datasets that training mixes."""

    name: str
    source: RowSource
    weight: float = 1.0
    """How often its rows are seen in an epoch."""

    @classmethod
    def open(cls, text: str) -> DataPart:
        """`data.json:2` -> what `data.json` holds, of weight 2; see [`open_source`]."""
        name, weight = split_weight(text)
        return cls(name, open_source(name), weight)


def split_weight(text: str) -> tuple[str, float]:
    name, separator, weight = text.rpartition(":")
    if not separator or Path(text).exists():
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        return text, 1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"The weight of {name} must be a number above 0, got {weight}.")
    return name, value


def open_source(name: str) -> RowSource:
    """A JSON or JSONL file, a parquet file or a folder of them, or a Hub dataset (`owner/name`, `owner/name#split`).

    Raises:
        FileNotFoundError: if a path leads nowhere.
        ValueError: for a file of another kind.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix in JSON_SUFFIXES:
        return JsonSource(path)
    if path.is_file() and path.suffix == ".parquet":
        return TableSource(name, [path])
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
        if not files:
            raise ValueError(f"The folder {name} has no .parquet file. Name a JSON or JSONL file in it instead.")
        return TableSource(name, files)
    if path.is_file():
        raise ValueError(f"{name} is none of {', '.join((*JSON_SUFFIXES, '.parquet'))}.")
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+(#\w+)?", name) and path.suffix not in (*JSON_SUFFIXES, ".parquet")
    if not is_hub_id or name.startswith("."):
        raise FileNotFoundError(f"There is no training data at {name}.")
    return TableSource(name)


class JsonSource:
    """A JSON array of rows, or JSON Lines. Only the position of each row is kept."""

    def __init__(self, path: Path):
        self.path = path
        self.folder = path.parent
        self._offsets, self._sizes, self._lines = array("q"), array("q"), array("q")
        self._line_of_array: int | None = None

    def scan(self) -> Iterator[tuple[int, Any]]:
        with open(self.path, "rb") as file:
            head = file.read(HEAD).removeprefix(codecs.BOM_UTF8).lstrip()
        rows = self._scan_array() if head.startswith(b"[") else self._scan_lines()
        for index, (offset, size, line, row) in enumerate(rows):
            self._offsets.append(offset)
            self._sizes.append(size)
            self._lines.append(line)
            yield index, row

    def row(self, index: int) -> Any:
        # Opened anew each time: worker processes would move a common file's position.
        with open(self.path, "rb") as file:
            file.seek(self._offsets[index])
            return json.loads(file.read(self._sizes[index]))

    def where(self, index: int) -> str:
        line = self._lines[index]
        before = self._lines[index - 1] if index else self._line_of_array
        # Of several rows of an array in one line, the line says too little.
        number = f" row {index + 1} (index {index})," if line == before else ""
        return f"{self.path}{number} line {line}"

    def _scan_lines(self) -> Iterator[tuple[int, int, int, Any]]:
        with open(self.path, "rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                begin = offset + len(line) - len(text)
                offset += len(line)
                if text.strip():
                    yield begin, len(text), number, self._parse_line(text, number)

    def _parse_line(self, text: bytes, number: int) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one of the first
            return BadRowError(f"{self.path} line {number}: no JSON ({_reason(error)}).")

    def _scan_array(self) -> Iterator[tuple[int, int, int, Any]]:
        """Rows of an array one after the other, without the whole file in memory."""
        decoder, text = json.JSONDecoder(), _Text(self.path)
        text.next_character()
        self._line_of_array = text.line
        text.skip("[")
        is_first = True
        while text.next_character() != "]":
            if not is_first:
                text.skip(",")
            is_first = False
            text.next_character()  # past the space before the row
            while True:
                try:
                    row, end = decoder.raw_decode(text.buffer, text.position)
                    if end < len(text.buffer) or not text.read_more():
                        break
                except RecursionError:
                    text.fail("no JSON (nested too deeply)")
                except ValueError as error:
                    if not text.read_more():
                        text.fail(f"no JSON ({_reason(error)})")
            yield text.advance(end) + (row,)
        text.skip("]")
        if text.has_more():
            text.fail("something follows the end of its array")


class _Text:
    """A window on a UTF-8 file that knows its byte offset and its line."""

    def __init__(self, path: Path):
        self.path, self.buffer, self.position = path, "", 0
        self._file = open(path, "rb")
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        with open(path, "rb") as file:
            self._offset = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        self.line, self._chunk = 1, CHUNK

    def read_more(self) -> bool:
        """Lengthens the window, by more each time for the same row; False at the end of the file."""
        data = self._file.read(self._chunk)
        self._chunk *= 2
        try:
            self.buffer += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            self.fail(f"not UTF-8 ({error.reason})")
        if not data:
            self._file.close()
            self._file = open(os.devnull, "rb")
        return bool(data)

    def advance(self, end: int) -> tuple[int, int, int]:
        """Moves on to `end` of the window: byte offset, size and line of what is passed."""
        passed = self.buffer[self.position : end]
        size, offset, line = len(passed.encode()), self._offset, self.line
        self._offset += size
        self.line += passed.count("\n")
        self.position = end
        if self.position > CHUNK:
            self.buffer, self.position, self._chunk = self.buffer[end:], 0, CHUNK
        return offset, size, line

    def has_more(self) -> bool:
        """Passes space; whether anything else follows."""
        while True:
            end = self.position
            while end < len(self.buffer) and self.buffer[end] in " \t\r\n":
                end += 1
            self.advance(end)
            if self.position < len(self.buffer):
                return True
            if not self.read_more():
                return False

    def next_character(self) -> str:
        """The next one that is no space, not passed."""
        if not self.has_more():
            self.fail("the file ends before its array does")
        return self.buffer[self.position]

    def skip(self, character: str) -> None:
        if self.next_character() != character:
            self.fail(f"no JSON (expected {character!r}, found {self.buffer[self.position]!r})")
        self.advance(self.position + 1)

    def fail(self, what: str) -> None:
        # Where the next row begins is unknown, so the rest of the file can't be saved.
        raise ValueError(f"{self.path} line {self.line}: {what}. The rows after it can't be read.")


class TableSource:
    """Parquet files, or a dataset of the Hub; memory-mapped, pictures stay encoded."""

    def __init__(self, name: str, files: list[Path] | None = None):
        self.name = name
        self.folder = files[0].parent if files else None
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f'Reading {name} needs the library `datasets`: pip install -c constraints.txt ".[train]".'
            ) from error
        if files:
            self.table = datasets.load_dataset(
                "parquet", data_files=[os.fspath(file) for file in files], split=DEFAULT_SPLIT
            )
        else:
            identifier, _, split = name.partition("#")
            self.table = datasets.load_dataset(identifier, split=split or DEFAULT_SPLIT)
        for column, feature in self.table.features.items():
            if isinstance(feature, datasets.Image):
                self.table = self.table.cast_column(column, datasets.Image(decode=False))
            elif isinstance(getattr(feature, "feature", None), datasets.Image):  # a list of them
                self.table = self.table.cast_column(column, type(feature)(datasets.Image(decode=False)))

    def scan(self) -> Iterator[tuple[int, Any]]:
        yield from enumerate(self.table)  # a few rows at a time are in memory

    def row(self, index: int) -> Any:
        return self.table[index]

    def where(self, index: int) -> str:
        return f"{self.name} row {index + 1}"


def _reason(error: Exception) -> str:
    return getattr(error, "msg", None) or str(error).partition(":")[0]
