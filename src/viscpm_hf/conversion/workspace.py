"""A folder that appears complete or not at all.

Files are written to `OUT.partial`, beside OUT and so on the same disk, and the folder gets its name when all of them
are on the disk. `OUT.partial.json` says which are finished, with their checksums, so that an interrupted conversion
can go on.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.errors import ConversionError
from ..checkpoints.location import json_object
from ..checkpoints.tensor_files import crc32_of


PARTIAL_SUFFIX = ".partial"
REPLACED_SUFFIX = ".replaced"
STATE_SUFFIX = ".partial.json"

# A folder with one of these is a checkpoint, which --overwrite may replace.
CHECKPOINT_MARKS = ("config.json", "model_index.json")


class Workspace:
    """Where a folder is written until it is complete.

    Args:
        output: the folder to be.
        sources: what must neither contain the output nor lie in it.
        resume: go on with what is there, if it is the same conversion.
        overwrite: replace a checkpoint at `output`, and drop an unfinished conversion.

    Raises:
        ConversionError: if output exists, or lies inside a source.
    """

    def __init__(self, output: str | os.PathLike, sources: list[Path], *, resume: bool, overwrite: bool):
        self.output = Path(output).expanduser()
        if self.output.name in ("", ".."):
            raise ConversionError(f"{os.fspath(output)!r} is no name for a new folder.")
        self.path = self.output.with_name(self.output.name + PARTIAL_SUFFIX)
        self.state_file = self.output.with_name(self.output.name + STATE_SUFFIX)
        self.resume, self.overwrite = resume, overwrite
        self._state: dict[str, Any] = {}
        self._saving = threading.Lock()  # files and the source's checksum are finished in different threads
        self._check(sources)

    def _check(self, sources: list[Path]) -> None:
        output = self.output.resolve()
        for source in sources:
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

    def open(self, fingerprint: Mapping[str, Any]) -> None:
        """Creates the partial folder, or takes up the one that is there.

        Args:
            fingerprint: what the conversion is of; one of something else isn't gone on with.

        Raises:
            ConversionError: if there is an unfinished conversion that wasn't asked for, or of something else.
        """
        if self.path.exists():
            if self.resume:
                self._state = json_object(self.state_file)
                begun = self._state.get("fingerprint")
                if begun == fingerprint:
                    return
                if not self.overwrite:
                    raise ConversionError(
                        f"{self.path} is an unfinished conversion of something else "
                        f"({_difference(begun, fingerprint)}); it can't be resumed. Start again with --overwrite."
                    )
            elif not self.overwrite:
                raise ConversionError(
                    f"{self.path} is an unfinished conversion: go on with --resume, or start again with --overwrite."
                )
            shutil.rmtree(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._state = {"fingerprint": fingerprint, "finished": {}}
        self._save()  # first, so that a folder without its list never comes to be
        self.path.mkdir()

    def discard_unless_begun(self) -> None:
        """Removes a partial folder in which no file is finished."""
        if not self.finished:
            shutil.rmtree(self.path, ignore_errors=True)
            self.state_file.unlink(missing_ok=True)

    @property
    def finished(self) -> dict[str, dict[str, Any]]:
        """Finished files with `size` and `crc32`."""
        return self._state.setdefault("finished", {})

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
        if path.is_file() and path.stat().st_size == known["size"] and crc32_of(path) == known["crc32"]:
            return True
        del self.finished[file]
        self._save()
        return False

    def clear_except(self, files: set[str]) -> None:
        """Removes whatever else an earlier run left."""
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
        _sync(self.path)
        replaced = self.output.with_name(self.output.name + REPLACED_SUFFIX)
        if self.output.is_dir() and any(self.output.iterdir()):
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(self.output, replaced)
        os.rename(self.path, self.output)
        _sync(self.output.parent)
        self.state_file.unlink()
        shutil.rmtree(replaced, ignore_errors=True)

    def _save(self) -> None:
        with self._saving:
            new = self.state_file.with_suffix(".new")
            new.write_text(json.dumps(self._state, indent=1), "ascii")
            _sync(new)
            os.replace(new, self.state_file)


def _difference(begun: Any, fingerprint: Mapping[str, Any]) -> str:
    if not isinstance(begun, Mapping):
        return "its list of files is gone"
    changed = [name for name, value in fingerprint.items() if begun.get(name) != value]
    return ", ".join(f"{name}: {begun.get(name)} then, {fingerprint[name]} now" for name in changed)


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
