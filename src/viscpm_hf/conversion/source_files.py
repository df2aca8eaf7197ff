"""Files of a source, which must stay what they are as long as they are read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.errors import ConversionError
from ..checkpoints.location import ORIGINAL_FILE
from ..checkpoints.tensor_files import sha256_of


if TYPE_CHECKING:
    from .plan import Checkpoint

# Beside the weights and the vocabulary; a folder may have files that change and don't matter, such as logs.
SMALL_FILES = ("*.json", "tokenizer.model")


class SourceChangedError(ConversionError):
    """A source isn't what it was when its conversion began."""


class SourceFiles:
    """What files are at this moment.

    Args:
        paths: of the files; those that aren't there don't count.
    """

    def __init__(self, paths: Iterable[Path]):
        self._before = {path: os.stat(path) for path in paths if path.is_file()}

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> SourceFiles:
        small = [checkpoint.vocab] if checkpoint.vocab is not None else []
        if checkpoint.location.layout != ORIGINAL_FILE:
            small += [path for pattern in SMALL_FILES for path in checkpoint.location.path.glob(pattern)]
        return cls([*checkpoint.weight_files, *small])

    def is_untouched(self, path: Path) -> bool:
        """Whether nothing at all happened to a file, not even to its mode."""
        return path.is_file() and os.stat(path).st_ctime_ns == self._before[path].st_ctime_ns

    def check(self, checksums: Mapping[Path, str | None]) -> None:
        """
        Args:
            checksums: SHA-256 of files as they were read; None for one that was touched before its was known. A file
                whose times alone tell of something (its mode, its links, or contents with the old time set again) is
                read again and compared with its own.

        Raises:
            SourceChangedError: if a file isn't what it was.
        """
        for path, before in self._before.items():
            try:
                now = os.stat(path)
            except OSError as error:
                raise _changed(path, f"it can't be read any more ({error.strerror})") from error
            if now.st_size != before.st_size:
                raise _changed(path, f"it had {before.st_size:,} bytes and has {now.st_size:,}")
            if now.st_mtime_ns != before.st_mtime_ns or not os.path.samestat(now, before):
                raise _changed(path, "it was written anew")
            is_touched = now.st_ctime_ns != before.st_ctime_ns
            if is_touched and path in checksums and sha256_of(path) != checksums[path]:
                raise _changed(path, "its contents differ from what was read")


def _changed(path: Path, how: str) -> SourceChangedError:
    return SourceChangedError(
        f"The source {path} changed while it was converted: {how}. Nothing was written; wait until it is complete, "
        "then convert again."
    )
