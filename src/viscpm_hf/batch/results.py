"""Results of a run: appended to part files as they come, joined in the input's order at the end.

A part file is only ever appended to, a line at a time, one file a process; so a kill costs at most the line that was
being written, and whatever stands in the parts is not done again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..plain_text import plain
from .rows import InputRow, row_key


@dataclass(frozen=True)
class Place:
    """Where a finished row's line is."""

    file: Path
    offset: int
    is_error: bool


@dataclass(frozen=True)
class Joined:
    """What the output holds."""

    rows: int
    errors: int


class Results:
    """The output file of a run, and the parts that become it.

    Args:
        output: JSONL file; its parts lie in a folder beside it until all rows are finished. The settings of its run
            lie in a file beside it and stay, so that nobody takes it for the results of others.
        fields: a line that has none of these, nor an error, is no result.
    """

    def __init__(self, output: str | os.PathLike, fields: tuple[str, ...] = ("answer", "file")):
        self.output = Path(output)
        self.fields = {*fields, "error"}
        self.parts = self.output.with_name(self.output.name + ".parts")
        self.settings = self.output.with_name(self.output.name + ".settings.json")

    def part(self, process: int) -> Path:
        return self.parts / f"part-{process:05d}.jsonl"

    # ------------------------------------------------------------------------------------------------------ before

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Notes the settings of a new run; those of a run that goes on, or is finished, must be the same.

        Raises:
            ValueError: if they aren't.
        """
        if not self.settings.is_file():
            replace_text(self.settings, json.dumps(settings, ensure_ascii=False, indent=1))
            return
        try:
            known = json.loads(self.settings.read_text("utf-8"))
        except (ValueError, RecursionError):
            known = None
        if not isinstance(known, dict):
            raise ValueError(
                f"{self.settings} doesn't hold the settings of a run: it is spoilt, or of another program. Give "
                "another output, or start over with --overwrite."
            )
        changed = [
            f"{plain(name)} was {plain(repr(known.get(name)))} and is {plain(repr(settings.get(name)))}"
            for name in sorted({*known, *settings})
            if known.get(name) != settings.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.output} was begun with other settings: {'; '.join(changed)}. Go on with the same ones, give "
                "another output, or start over with --overwrite."
            )

    def discard(self) -> None:
        """Removes the output, its parts and its settings."""
        self.output.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)
        self.settings.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------------------- reading

    def finished(self) -> dict[str, Place]:
        """Every finished row by its key. Of a row done twice the last line counts, an error only for want of better:
        a later error has the usage of the ones before it.

        Raises:
            ValueError: if the output is of something else than a run like this.
        """
        found: dict[str, Place] = {}
        files = [self.output] if self.output.is_file() else []
        files += sorted(self.parts.glob("part-*.jsonl"))
        for file in files:
            for offset, result in self._lines(file):
                key, is_error = row_key(result["id"], result.get("line")), "error" in result
                if not is_error or key not in found or found[key].is_error:
                    found[key] = Place(file, offset, is_error)
        return found

    def _lines(self, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        offset = 0
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    return  # half-written
                try:
                    result = json.loads(line)
                    is_result = "id" in result and bool(self.fields & result.keys())
                except (ValueError, TypeError, AttributeError):
                    is_result = False
                if not is_result:
                    raise ValueError(
                        f"Line {number} of {file} is no result of a batch run. Give another output, or --overwrite "
                        "to start over."
                    )
                yield offset, result
                offset += len(line)

    # ------------------------------------------------------------------------------------------------------- writing

    def writer(self, process: int) -> PartWriter:
        self.parts.mkdir(parents=True, exist_ok=True)
        return PartWriter(self.part(process))

    def join(self, rows: Iterable[InputRow]) -> Joined:
        """Writes all results in the order of the rows, in place of the parts.

        Raises:
            ValueError: if a row isn't finished, or results are of rows that there are not: nothing is written then.
        """
        found = self.finished()
        temporary = self.output.with_name(self.output.name + ".tmp")
        files = {}
        count = errors = 0
        try:
            with open(temporary, "wb") as out:
                for row in rows:
                    place = found.pop(row.key, None)
                    if place is None:
                        raise ValueError(f"{self.output} lacks the row of line {row.line}: run it again to go on.")
                    if place.file not in files:
                        files[place.file] = open(place.file, "rb")
                    files[place.file].seek(place.offset)
                    out.write(files[place.file].readline())
                    count, errors = count + 1, errors + place.is_error
                check_all_known(self.output, found)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, self.output)
        finally:
            for file in files.values():
                file.close()
            temporary.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)
        return Joined(count, errors)


class PartWriter:
    """Appends results to a part file; a half-written line at its end is cut off first."""

    def __init__(self, path: Path):
        path.touch()
        with open(path, "rb+") as file:
            file.truncate(end_of_last_line(file))
        self._file = open(path, "ab")

    def write(self, results: Iterable[dict[str, Any]]) -> None:
        for result in results:
            self._file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()


def end_of_last_line(file: Any) -> int:
    """Where the last whole line of a file ends."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        begin = max(0, end - 65536)
        file.seek(begin)
        newline = file.read(end - begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


def check_all_known(output: Path, unknown: dict[str, Place]) -> None:
    """Raises `ValueError` if there are results of rows that the input doesn't have."""
    names = [key for key in unknown if not key.startswith("line ")]  # a line may have been mended since
    if names:
        raise ValueError(
            f"{output} has {len(names)} results whose ids the input doesn't have (the first is {names[0]}): it "
            "belongs to another input. Give another output, or start over with --overwrite."
        )


def replace_text(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)
