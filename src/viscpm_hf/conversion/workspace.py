"""A folder that appears complete or not at all.

Files are written to `OUT.partial`, beside OUT and so on the same disk, and the folder gets its name when all of them
are on the disk. `OUT.partial.json` says which are finished, with their checksums, so that an interrupted conversion
can go on. `OUT.partial.lock` keeps everybody else out meanwhile. What has one of these names and isn't ours, by a mark
that it bears, is neither changed nor removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.errors import ConversionError
from ..checkpoints.tensor_files import crc32_of
from ..plain_text import plain
from .folder_lock import FolderLock


PARTIAL_SUFFIX = ".partial"
REPLACED_SUFFIX = ".replaced"
STATE_SUFFIX = ".partial.json"
LOCK_SUFFIX = ".partial.lock"

# What an unfinished conversion's list says of itself, and the file in its folder that has the same `id`.
STATE_FORMAT = "viscpm-hf unfinished conversion"
MARK_NAME = ".viscpm-hf-conversion"

# The released checkpoints' lists have some thousand bytes.
MAX_STATE_BYTES = 64 * 2**20

# A folder with one of these is a checkpoint, which --overwrite may replace.
CHECKPOINT_MARKS = ("config.json", "model_index.json")


class Workspace:
    """Where a folder is written until it is complete.

    Args:
        output: the folder to be.
        sources: what must neither contain the output nor lie in it.
        resume: go on with what is there, if it is the same conversion; None for one that always begins anew.
        overwrite: replace a checkpoint at `output`, and drop an unfinished conversion.

    Raises:
        ConversionError: if output exists, or lies inside a source.
    """

    def __init__(self, output: str | os.PathLike, sources: list[Path], *, resume: bool | None, overwrite: bool):
        self.output = Path(output).expanduser()
        if self.output.name in ("", ".."):
            raise ConversionError(f"{os.fspath(output)!r} is no name for a new folder.")
        self.path = self._beside(PARTIAL_SUFFIX)
        self.state_file = self._beside(STATE_SUFFIX)
        self.sources, self.resume, self.overwrite = sources, resume, overwrite
        self._state: dict[str, Any] = {}
        self._saving = threading.Lock()  # files and the source's checksum are finished in different threads
        self._check()

    def _beside(self, suffix: str) -> Path:
        return self.output.with_name(self.output.name + suffix)

    def _check(self) -> None:
        output = self.output.resolve()
        for source in self.sources:
            source = source.resolve()
            if source == output or source in output.parents:
                raise ConversionError(f"{self.output} lies inside the source {source}; choose a place outside.")
            if output in source.parents:
                raise ConversionError(f"The source {source} lies inside {self.output}; choose another place.")
        if self.output.is_symlink() or self.output.is_file():
            raise ConversionError(f"{self.output} exists and is no folder.")
        if self.output.is_dir() and any(self.output.iterdir()):
            if not self.overwrite:
                raise ConversionError(f"{self.output} exists and isn't empty: replace it with --overwrite.")
            if not any((self.output / mark).is_file() for mark in CHECKPOINT_MARKS):
                raise ConversionError(f"{self.output} is no checkpoint, so --overwrite doesn't replace it.")

    @contextlib.contextmanager
    def open(self, fingerprint: Mapping[str, Any]) -> Iterator[None]:
        """Creates the partial folder, or takes up the one that is there; nobody else writes here meanwhile.

        If it ends without [`complete`], what is finished stays for `resume`.

        Args:
            fingerprint: what the conversion is of; one of something else isn't gone on with.

        Raises:
            ConversionError: if another process is writing here, if there is an unfinished conversion that wasn't
                asked for, or of something else, or if something that isn't ours is in the way.
        """
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with FolderLock(self._beside(LOCK_SUFFIX), self.output):
            self._check()  # again: it may have been written just now
            self._begin(fingerprint)
            try:
                yield
            except BaseException:
                if not self.finished:
                    self.discard()
                raise

    def _begin(self, fingerprint: Mapping[str, Any]) -> None:
        self._state = self._read_state()
        if os.path.lexists(self.path):
            self._check_ours()
            begun = self._state["fingerprint"]
            if self.resume is not False and begun != fingerprint and not self.overwrite:
                raise ConversionError(
                    f"{self.path} is an unfinished conversion of something else "
                    f"({_difference(begun, fingerprint)}); it can't be resumed. Start again with --overwrite."
                )
            if self.resume:
                if begun == fingerprint:
                    self.clear_unfinished()  # half-written files take room
                    (self.path / MARK_NAME).write_text(self._state["id"], "ascii")
                    return
            elif self.resume is False and not self.overwrite:
                raise ConversionError(
                    f"{self.path} is an unfinished conversion: go on with --resume, or start again with --overwrite."
                )
        self.discard()
        self._state = {
            "format": STATE_FORMAT,
            "id": secrets.token_hex(8),
            "fingerprint": fingerprint,
            "finished": {},
        }
        try:
            self._save()  # first, so that a folder without its list never comes to be
            self.path.mkdir()
            (self.path / MARK_NAME).write_text(self._state["id"], "ascii")
        except BaseException:
            self.discard()
            raise

    def _read_state(self) -> dict[str, Any]:
        """The list of an unfinished conversion; empty if there is none.

        Raises:
            ConversionError: if the file is something else, or spoilt.
        """
        if not os.path.lexists(self.state_file):
            return {}
        state = None
        if self.state_file.is_file() and not self.state_file.is_symlink():
            with self.state_file.open("rb") as file, contextlib.suppress(ValueError, RecursionError):
                content = file.read(MAX_STATE_BYTES + 1)
                state = json.loads(content) if len(content) <= MAX_STATE_BYTES else None
        if not _is_state(state):
            raise ConversionError(
                f"{self.state_file} is in the way: it is not the list of an unfinished conversion, or a spoilt one. "
                f"Look at it and {self.path.name}, then move both away or delete them."
            )
        return state

    def _check_ours(self) -> None:
        """Raises [`ConversionError`] unless the folder is the one that the list is of."""
        if self._state and self.path.is_dir() and not self.path.is_symlink():
            with contextlib.suppress(OSError, ValueError):
                if (self.path / MARK_NAME).read_text("ascii") == self._state["id"]:
                    return
            if not any(self.path.iterdir()):
                return
            # Between the mark's removal and the folder's renaming.
            if self._state.get("is_complete") and all(
                _size(self.path / file) == known["size"] for file, known in self.finished.items()
            ):
                return
        raise ConversionError(
            f"{self.path} is in the way: it is no unfinished conversion"
            + (
                f", or not the one that {self.state_file.name} is of"
                if self._state
                else f" ({STATE_SUFFIX} is missing)"
            )
            + ". Move it away, or choose another output."
        )

    def discard(self) -> None:
        """Removes what was written so far."""
        if self._state:
            shutil.rmtree(self.path, ignore_errors=True)
            if self.output.is_dir():  # else what was replaced is the only copy
                shutil.rmtree(self._replaced(), ignore_errors=True)
            self._new_state_file().unlink(missing_ok=True)
            self.state_file.unlink(missing_ok=True)
            self._state = {}

    @property
    def finished(self) -> dict[str, dict[str, Any]]:
        """Finished files with `size` and `crc32`."""
        return self._state.get("finished", {})

    def remember(self, key: str, value: Any) -> None:
        """Keeps a value for a resumed conversion."""
        self._state[key] = value
        self._save()

    def recall(self, key: str) -> Any:
        return self._state.get(key)

    def file_finished(self, file: str, size: int, digest: str) -> None:
        self.finished[file] = {"size": size, "crc32": digest}
        self._save()

    def still_good(self, file: str) -> bool:
        """Whether a file is finished and what it was then; a spoilt one is forgotten."""
        known = self.finished.get(file)
        path = self.path / file
        if known is None:
            return False
        if _size(path) == known["size"] and crc32_of(path) == known["crc32"]:
            return True
        del self.finished[file]
        self._save()
        return False

    def clear_unfinished(self) -> None:
        """Removes whatever else an earlier run left."""
        files = {*self.finished, MARK_NAME}
        for path in sorted(self.path.rglob("*"), reverse=True):
            relative = path.relative_to(self.path).as_posix()
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif relative not in files:
                path.unlink()

    def complete(self) -> None:
        """Gives the folder its name."""
        for path in self.path.rglob("*"):
            if path.is_file():
                _sync(path)
        replaced = self._replaced()
        self.remember("is_complete", True)
        (self.path / MARK_NAME).unlink()
        _sync(self.path)
        if self.output.is_dir() and any(self.output.iterdir()):
            os.rename(self.output, replaced)
        os.rename(self.path, self.output)
        _sync(self.output.parent)
        self.state_file.unlink()
        shutil.rmtree(replaced, ignore_errors=True)

    def _replaced(self) -> Path:
        """Where what is replaced lies until it is: a name that nothing else has."""
        return self._beside(f"{REPLACED_SUFFIX}-{self._state['id']}")

    def _new_state_file(self) -> Path:
        return self._beside(f"{STATE_SUFFIX}-{self._state['id']}")

    def _save(self) -> None:
        with self._saving:
            new = self._new_state_file()
            new.write_text(json.dumps(self._state, indent=1), "ascii")
            _sync(new)
            os.replace(new, self.state_file)


def _is_state(state: Any) -> bool:
    return (
        isinstance(state, dict)
        and state.get("format") == STATE_FORMAT
        and isinstance(identity := state.get("id"), str)
        and identity.isalnum()  # it becomes part of names
        and isinstance(state.get("fingerprint"), dict)
        and isinstance(finished := state.get("finished"), dict)
        and all(
            isinstance(known, dict) and isinstance(known.get("size"), int) and isinstance(known.get("crc32"), str)
            for known in finished.values()
        )
    )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _difference(begun: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> str:
    changed = [name for name, value in fingerprint.items() if begun.get(name) != value]
    return ", ".join(f"{name}: {plain(begun.get(name))} then, {plain(fingerprint[name])} now" for name in changed)


def _sync(path: Path) -> None:
    """Brings a file, or a folder's list of files, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows doesn't open folders
        return
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():
            raise
        # Not every file system syncs a folder.
    finally:
        os.close(descriptor)
