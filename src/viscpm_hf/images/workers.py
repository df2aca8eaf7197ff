"""Processes that decode image files: what takes too long or too much there costs nothing else."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable

import PIL.Image

from . import decoding
from .decoding import MAX_DESCRIPTION, READY, BadImageError, ImageLimits, rebuild


# What a process gets of our environment: enough to start, and no secrets.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "LANG")
_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_TO_START = 60.0
SECONDS_UNTIL_SLOW = 1.0
PATIENCE = 6


class DecodingCancelledError(RuntimeError):
    """Nobody waits for the image any more."""


class DecoderBusyError(RuntimeError):
    """As many images as are allowed take long already; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class _TooLateError(Exception):
    pass


def _processor_seconds(pid: int) -> float | None:
    """What a process has taken of a processor; None where that can't be seen."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            user, system = file.read().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None


class _Clock:
    """Seconds until something has to be looked at again; raises when the time is over or nobody waits any more.

    Of a process, the time that it gets counts, so that a busy machine refuses no image; in all it may take
    `PATIENCE` times as long.
    """

    def __init__(
        self, seconds: float, cancelled: threading.Event | None, place: _Place | None = None, pid: int | None = None
    ):
        self._seconds, self._cancelled, self._place, self._pid = seconds, cancelled, place, pid
        self._begin = time.monotonic()
        self._used = None if pid is None else _processor_seconds(pid)

    def __call__(self) -> float:
        if self._cancelled is not None and self._cancelled.is_set():
            raise DecodingCancelledError
        passed = time.monotonic() - self._begin
        used = None if self._used is None else _processor_seconds(self._pid)
        seconds = passed if used is None else used - self._used
        if seconds >= self._seconds or passed >= PATIENCE * self._seconds:
            raise _TooLateError
        if self._place is not None and seconds >= SECONDS_UNTIL_SLOW:
            self._place.becomes_slow()
        return min(self._seconds - seconds, _SECONDS_BETWEEN_LOOKS)


class _Worker:
    """One process; not for several threads at once."""

    def __init__(self, limits: ImageLimits):
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        self.limits = limits
        self.process = subprocess.Popen(
            # By its file: imported by its name, it would bring torch and transformers with it.
            [sys.executable, "-P", "-X", "utf8", decoding.__file__, json.dumps(dataclasses.asdict(limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self._is_ready = False

    def decode(
        self, data: bytes, place: _Place, cancelled: threading.Event | None, on_size: Callable[[int], None] | None
    ) -> PIL.Image.Image:
        """Raises `OSError`, `ValueError` and the like if the process ended or answers nonsense."""
        if not self._is_ready:
            self._is_ready = self._read(1, _Clock(_SECONDS_TO_START, cancelled)) == READY
        self.process.stdin.write(len(data).to_bytes(8, "big"))
        self.process.stdin.write(data)
        self.process.stdin.flush()
        look = _Clock(self.limits.max_seconds, cancelled, place, self.process.pid)
        size = int.from_bytes(self._read(4, look), "big")
        if size > MAX_DESCRIPTION:
            raise ValueError(f"a description of {size} bytes")
        description = json.loads(bytes(self._read(size, look)))
        if "error" in description:
            raise BadImageError(str(description["error"])[:500])

        def pixels(num_bytes: int) -> bytearray:
            if on_size is not None:
                on_size(num_bytes)
            return self._read(num_bytes, look)

        return rebuild(description, pixels, self.limits)

    def _read(self, count: int, look: Callable[[], float]) -> bytearray:
        descriptor, data = self.process.stdout.fileno(), bytearray(count)
        view, place = memoryview(data), 0
        while place < count:
            if _has_data(descriptor, look()):
                got = os.readv(descriptor, [view[place:]])
                if not got:
                    raise EOFError("the process ended")
                place += got
        return data

    def end(self) -> None:
        """At once; the process is gone afterwards."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()
            except OSError:  # what it had not read is lost
                pass
        self.process.wait()


def _has_data(descriptor: int, seconds: float) -> bool:
    poll = select.poll()  # `select` knows no descriptors beyond 1,023
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


class _Place:
    """One of the places for images that are decoded at once; what takes long goes on in another."""

    def __init__(self, decoder: ImageDecoder):
        self._decoder = decoder
        self._held = decoder._places

    def __enter__(self) -> _Place:
        self._held.acquire()
        return self

    def __exit__(self, *_) -> None:
        self._held.release()

    def becomes_slow(self) -> None:
        slow = self._decoder._slow_places
        if slow is None or self._held is slow:
            return
        if not slow.acquire(blocking=False):
            raise DecoderBusyError(
                f"{self._decoder.num_slow} images that take more than {SECONDS_UNTIL_SLOW:g} s are being decoded "
                "already: try again later, or send a smaller image.",
                retry_after=self._decoder.limits.max_seconds,
            )
        self._held.release()
        self._held = slow


class ImageDecoder:
    """Decodes the image files of many threads in processes of their own.

    ```python
    >>> decoder = ImageDecoder(ImageLimits(max_seconds=5), num_workers=2)
    >>> image = decoder.decode(Path("photograph.jpg").read_bytes())
    >>> decoder.close()
    ```

    Args:
        limits: of one file.
        num_workers: files that are decoded at once; others wait.
        num_slow: if given, a file that has taken a second makes room for others and goes on beside them, as long as no
            more than `num_slow` do; beyond that it is given up. So nobody waits long for the files of others.

    All processes together take `num_workers + num_slow` times the limit of memory at most, and the pixels that are
    handed over as much again here.

    Raises:
        ValueError: for less than one worker.
    """

    def __init__(self, limits: ImageLimits | None = None, num_workers: int = 4, num_slow: int | None = None):
        for name, value in (("num_workers", num_workers), ("num_slow", 1 if num_slow is None else num_slow)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.limits = limits or ImageLimits()
        self.num_workers = num_workers
        self.num_slow = num_slow
        self._begin()
        # Also without `close`, no process outlives its decoder.
        self._finalizer = weakref.finalize(self, _end_all, self._idle, os.getpid())

    def _begin(self) -> None:
        self._owner = os.getpid()
        self._places = threading.BoundedSemaphore(self.num_workers)
        self._slow_places = None if self.num_slow is None else threading.BoundedSemaphore(self.num_slow)
        self._idle: list[_Worker] = []

    def decode(
        self,
        data: bytes,
        cancelled: threading.Event | None = None,
        on_size: Callable[[int], None] | None = None,
    ) -> PIL.Image.Image:
        """The first frame of an image file, upright by its EXIF orientation.

        Args:
            data: the file.
            cancelled: once set, the work ends and nothing is returned.
            on_size: called with the number of bytes of the pixels before there is memory for them here; it may wait.

        Raises:
            BadImageError: if it is no image, damaged, or beyond the limits.
            DecoderBusyError: if it takes long, and so do `num_slow` others.
            DecodingCancelledError: if `cancelled` was set.
        """
        if self._owner != os.getpid():  # a fork: the processes are the parent's
            self._begin()
        with _Place(self) as place:
            if cancelled is not None and cancelled.is_set():
                raise DecodingCancelledError
            worker = self._take()
            is_whole = False
            try:
                image = worker.decode(data, place, cancelled, on_size)
                is_whole = True
                return image
            except BadImageError:
                is_whole = True
                raise
            except (DecoderBusyError, DecodingCancelledError):
                raise
            except _TooLateError:
                raise BadImageError(
                    f"The image takes more than the {self.limits.max_seconds:g} s that are allowed for decoding."
                ) from None
            except Exception as error:
                # Where memory ends within a decoder, some of them end the process.
                raise BadImageError(
                    f"The image of {len(data):,} bytes can't be decoded: it is damaged, or takes more than the "
                    f"{self.limits.max_memory_bytes:,} bytes of memory that are allowed."
                ) from error
            finally:
                if is_whole:
                    self._idle.append(worker)
                else:
                    worker.end()

    def start(self) -> None:
        """Starts a process ahead of the first image."""
        self._idle.append(_Worker(self.limits))

    def close(self) -> None:
        """Ends the idle processes; those at work end when they are done."""
        _end_all(self._idle, self._owner)

    def _take(self) -> _Worker:
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                return _Worker(self.limits)
            if worker.process.poll() is None:
                return worker
            worker.end()


def _end_all(idle: list[_Worker], owner: int) -> None:
    while idle and owner == os.getpid():
        idle.pop().end()


@functools.lru_cache(maxsize=4)
def _shared_decoder(limits: ImageLimits) -> ImageDecoder:
    return ImageDecoder(limits, num_workers=min(4, os.cpu_count() or 1))


def decode_image(data: bytes, limits: ImageLimits | None = None) -> PIL.Image.Image:
    """The first frame of a stranger's image file, upright by its EXIF orientation, within the limits.

    The processes are shared by all who decode with the same limits.

    Raises:
        BadImageError: if it is no image, damaged, or beyond the limits.
    """
    return _shared_decoder(limits or ImageLimits()).decode(data)
