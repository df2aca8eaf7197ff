"""Frames of a video file or a camera, decoded in a process of its own that is bounded as those of images are.

Its program is this file, which therefore needs nothing of the package. The decoder is FFmpeg's, by PyAV.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import PIL.Image


# Of containers that hold pictures themselves; playlists and the like, which name other files, are none.
FORMATS = {"mov", "mp4", "matroska", "webm", "avi", "mpegts", "ogg", "flv", "gif"}
HEADER = struct.Struct(">dII")
CAMERA = "video4linux2"


class BadVideoError(ValueError):
    """A video that can't be used; the message says why."""


@dataclass(frozen=True)
class VideoLimits:
    """What one video may cost."""

    max_pixels: int = 4096 * 2304
    """Width times height of a frame."""
    max_memory_bytes: int = 2**30
    """Memory for decoding. Kept on Linux."""
    max_side: int = 672
    """Larger frames are made smaller before they are handed over."""
    max_seconds_between_frames: float = 10.0


class VideoFrames:
    """The frames of a file as they are due, or of a camera (`/dev/video0`) as they come, for `with` and `for`.

    Who takes longer for a frame than the next one needs gets the newest one then: those between are dropped, and
    counted.

    Raises:
        BadVideoError: while iterating, if the video can't be read.
        ImportError: if PyAV isn't installed.
    """

    def __init__(self, source: str | os.PathLike, limits: VideoLimits | None = None):
        import av  # noqa: F401, what the process will need

        if not Path(source).exists():
            raise FileNotFoundError(f"There is no video {source}.")
        self.source, self.limits = str(source), limits or VideoLimits()
        self.num_dropped = 0
        self._newest: tuple[float, PIL.Image.Image] | None = None
        self._end: Exception | None = None
        self._changed = threading.Condition()
        self._is_camera = Path(source).is_char_device()

    def __enter__(self) -> VideoFrames:
        environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG") if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-X", "utf8", __file__, self.source, json.dumps(asdict(self.limits))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        threading.Thread(target=self._watch, name="viscpm-hf-video", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()

    def __iter__(self) -> Iterator[tuple[float, PIL.Image.Image]]:
        """Seconds since the beginning, and the frame."""
        while True:
            with self._changed:
                waits = self.limits.max_seconds_between_frames
                if not self._changed.wait_for(lambda: self._newest or self._end, timeout=waits):
                    raise BadVideoError(f"{self.source} gave no frame for {waits:g} seconds.")
                if self._newest is None:
                    if isinstance(self._end, StopIteration):
                        return
                    raise self._end
                newest, self._newest = self._newest, None
            yield newest

    def _watch(self) -> None:
        begin = None
        try:
            while head := self._read(HEADER.size):
                moment, width, height = HEADER.unpack(head)
                if not 0 < max(width, height) <= self.limits.max_side or not moment >= 0:
                    raise BadVideoError(f"{self.source} can't be read: its decoder answers nonsense.")
                image = PIL.Image.frombytes("RGB", (width, height), self._read(3 * width * height))
                if begin is None:
                    begin = time.monotonic() - moment
                if not self._is_camera:
                    time.sleep(max(0.0, min(begin + moment - time.monotonic(), 60.0)))
                with self._changed:
                    self.num_dropped += self._newest is not None
                    self._newest = (moment, image)
                    self._changed.notify()
            reason = self._process.stderr.read(2000).decode(errors="replace").strip()
            self._finish(
                BadVideoError(reason or f"{self.source} holds no frames.") if begin is None else StopIteration()
            )
        except (ValueError, OSError) as error:
            self._finish(error if isinstance(error, BadVideoError) else BadVideoError(f"{self.source} ended early."))

    def _finish(self, end: Exception) -> None:
        with self._changed:
            self._end = end
            self._changed.notify()

    def _read(self, count: int) -> bytes:
        data = self._process.stdout.read(count)
        if data and len(data) < count:
            raise BadVideoError(f"{self.source} ended within a frame.")
        return data


# -------------------------------------------------------------------------------------------------- the process itself


def main(source: str, limits: VideoLimits) -> str | None:
    """Writes every frame to the standard output: moment in seconds, width, height, and its RGB pixels; returns what is
    wrong if there is something."""
    import resource

    import av

    os.nice(5)
    size, statm = 0, Path("/proc/self/statm")
    if statm.exists():
        size = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + limits.max_memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        if Path(source).is_char_device():
            container = av.open(source, format=CAMERA)
        else:
            # By the open file, so that nothing in it leads to another one.
            container = av.open(open(source, "rb"))  # noqa: SIM115, open for as long as the process is
            if not FORMATS & set(container.format.name.split(",")):
                return f"{source} is a {container.format.name}, but a video is one of {', '.join(sorted(FORMATS))}."
        if not container.streams.video:
            return f"{source} has no pictures."
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            if frame.width * frame.height > limits.max_pixels:
                return (
                    f"{source} has frames of {frame.width:,} x {frame.height:,} pixels, more than the "
                    f"{limits.max_pixels:,} that are allowed."
                )
            scale = min(1.0, limits.max_side / max(frame.width, frame.height))
            width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
            image = frame.reformat(width, height, "rgb24").to_image()
            sys.stdout.buffer.write(HEADER.pack(frame.time or 0.0, width, height) + image.tobytes())
            sys.stdout.buffer.flush()
    except BrokenPipeError:
        return None
    except MemoryError:
        return f"{source} takes more than the {limits.max_memory_bytes:,} bytes of memory that are allowed."
    except (av.error.FFmpegError, OSError, ValueError) as error:
        return f"{source} can't be read as a video: {str(error)[:200]}."
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], VideoLimits(**json.loads(sys.argv[2]))))
