"""One process at a time for a folder that is being written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from pathlib import Path

from ..checkpoints.errors import ConversionError
from ..plain_text import plain


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

# By this a file is known as a lock of ours.
WRITER = "viscpm-hf"

# More than a lock of ours has.
MAX_LOCK_BYTES = 4096

# The byte that Windows locks: behind the content, which others must be able to read.
LOCKED_BYTE = 2**20


class FolderLock:
    """A file that a process locks as long as it writes, and that says who that is.

    The system lifts the lock when its process ends, however it ends: a file that a kill has left locks nothing.

    Args:
        path: of the file, which is removed when the lock is lifted.
        what: what is locked, for errors.
    """

    def __init__(self, path: Path, what: Path):
        self.path, self.what = path, what
        self._file: int | None = None

    def __enter__(self) -> FolderLock:
        """
        Raises:
            ConversionError: if another process has the lock, or the file isn't a lock.
            OSError: if the file can't be written.
        """
        while self._file is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            try:
                content = os.read(file, MAX_LOCK_BYTES)
                holder = _holder(content)
                if content and holder is None:
                    raise ConversionError(f"{self.path} is in the way: it is no lock of a conversion. Move it away.")
                if not _lock(file):
                    raise ConversionError(
                        f"{self.what} is being written by {holder or 'another process'} at this moment: wait until "
                        "that has ended, or choose another place."
                    )
                if self._is(file):  # else whoever had it has ended and taken the file along
                    me = {"writer": WRITER, "pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
                    os.ftruncate(file, 0)
                    os.lseek(file, 0, os.SEEK_SET)
                    os.write(file, json.dumps(me).encode())
                    self._file, file = file, -1
            finally:
                if file >= 0:
                    os.close(file)
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # Windows removes no open file; then it stays, and locks nothing
            self.path.unlink()
        os.close(self._file)
        self._file = None

    def _is(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False


def _holder(content: bytes) -> str | None:
    """Who wrote a lock, in words; None if it is none."""
    try:
        lock = json.loads(content)
        is_ours = lock["writer"] == WRITER
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(lock["since"]))
        return f"process {int(lock['pid'])} on {plain(lock['host'])} (since {since})" if is_ours else None
    except (ValueError, LookupError, TypeError, OverflowError, OSError, RecursionError):
        return None


def _lock(file: int) -> bool:
    """Locks an open file until it is closed; False if another one has locked it."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(file, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        if error.errno in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL):
            raise ConversionError(
                "The file system of the output knows no locks, so two conversions could spoil each other there: write "
                "to another disk, then move the folder."
            ) from error
        raise
    return True
