"""Decoding of one image file, and what it may cost.

A small file can ask for hours of work or gigabytes of memory. What a file's structure tells is checked before a
decoder sees it; the rest is bounded by the process that runs this file as its program (see `workers.py`). It therefore
needs nothing but Pillow and the standard library, and starts in a fraction of a second.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
import re
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import PIL.Image
import PIL.ImageOps


# Formats of photographs and drawings; Pillow knows dozens more, some of them old and rarely looked at.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO")


class BadImageError(ValueError):
    """An image that can't be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """What one image file may cost.

    Raises:
        ValueError: for a limit that isn't greater than 0.
    """

    max_pixels: int = 50_000_000
    """Width times height."""
    max_scans: int = 100
    """Scans of a JPEG. Each of them is a walk over all pixels; progressive files have about ten."""
    max_chunks: int = 16_384
    """Chunks of a PNG or WebP, segments of a JPEG."""
    max_seconds: float = 10.0
    """Time of a processor for decoding (where that can't be seen, time). Kept where a process decodes
    ([`ImageDecoder`])."""
    max_memory_bytes: int = 2**30
    """Memory for decoding, the file and the pixels included. Kept where a process decodes, on Linux."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{field.name} must be a number greater than 0, got {value!r}.")


def decode(data: bytes, limits: ImageLimits) -> PIL.Image.Image:
    """The first frame of an image file, upright by its EXIF orientation, with its pixels in memory.

    Raises:
        BadImageError: if it is none, damaged, or beyond the limits of its structure.
        MemoryError: where there is none.
    """
    try:
        check_structure(data, limits)
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size, limits)
            image.load()
            _turn_upright(image)
            return image
    except (BadImageError, MemoryError):
        raise
    except PIL.Image.DecompressionBombError as error:
        raise BadImageError(f"The image has more than the {limits.max_pixels:,} pixels that are allowed.") from error
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        raise BadImageError(
            f"The image can't be read as {', '.join(FORMATS)}: its {len(data):,} bytes are damaged or something else."
        ) from error


def _turn_upright(image: PIL.Image.Image) -> None:
    try:
        PIL.ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # Pillow raises whatever damaged EXIF data makes it stumble over; the image itself is whole
        return


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels:
        raise BadImageError(
            f"The image has {width:,} x {height:,} pixels, more than the {limits.max_pixels:,} that are allowed."
        )


# ------------------------------------------------------------------------------------------- what the structure tells


def check_structure(data: bytes, limits: ImageLimits) -> None:
    """Looks at sizes and counts in the file before any decoder does.

    Raises:
        BadImageError: beyond the limits.
    """
    if data.startswith(b"\xff\xd8\xff"):
        _check_jpeg(data, limits)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data, limits)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        _check_webp(data, limits)


# A marker: 0xFF bytes and a code. 0xFF 0x00 is a byte of the data, D0 to D7 are restarts within them.
_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
# Without a length: the start of an image, and a code for private use.
_BARE_MARKERS = (0xD8, 0x01)


def _check_jpeg(data: bytes, limits: ImageLimits) -> None:
    place = num_scans = num_segments = 0
    while found := _MARKER.search(data, place):
        code, place = found[1][0], found.end()
        if code == _END_OF_IMAGE:
            return
        num_segments += 1
        num_scans += code == _START_OF_SCAN
        if num_scans > limits.max_scans:
            raise BadImageError(f"The JPEG has more than the {limits.max_scans:,} scans that are allowed.")
        _check_count(num_segments, "JPEG", "segments", limits)
        if code not in _BARE_MARKERS:
            place += int.from_bytes(data[place : place + 2], "big")


def _check_png(data: bytes, limits: ImageLimits) -> None:
    place, num_chunks = 8, 0
    if data[12:16] == b"IHDR" and len(data) >= 24:
        _check_size(*struct.unpack(">II", data[16:24]), limits)
    while place + 8 <= len(data) and data[place + 4 : place + 8] != b"IEND":
        num_chunks += 1
        _check_count(num_chunks, "PNG", "chunks", limits)
        place += 12 + int.from_bytes(data[place : place + 4], "big")


def _check_webp(data: bytes, limits: ImageLimits) -> None:
    """Its decoder takes the memory for the whole canvas before Pillow tells the size."""
    place, num_chunks = 12, 0
    while place + 8 <= len(data):
        num_chunks += 1
        _check_count(num_chunks, "WebP", "chunks", limits)
        kind, body = data[place : place + 4], data[place + 8 : place + 24]
        if kind == b"VP8X" and len(body) >= 10:
            _check_size(1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little"), limits)
        elif kind == b"VP8L" and len(body) >= 5:
            bits = int.from_bytes(body[1:5], "little")
            _check_size(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), limits)
        elif kind == b"VP8 " and len(body) >= 10:
            width, height = struct.unpack("<HH", body[6:10])
            _check_size(width & 0x3FFF, height & 0x3FFF, limits)
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8 + size + size % 2


def _check_count(count: int, kind: str, what: str, limits: ImageLimits) -> None:
    if count > limits.max_chunks:
        raise BadImageError(f"The {kind} has more than the {limits.max_chunks:,} {what} that are allowed.")


# --------------------------------------------------------------------------------------------- between two processes
#
# When it has started, the process says `READY`. To the process: the file's length in 8 bytes, and the file. Back: the
# length of a description in 4 bytes, the description in JSON, and the pixels. Whoever reads it doesn't trust it: the
# process may be in a stranger's hands.

READY = b"R"
MAX_DESCRIPTION = 1 << 16
# "F" and "I" have 4 bytes a pixel, and no mode more.
MAX_PIXEL_BYTES = 4
# Of a TIFF: how many bits a sample has, and whether zero is white.
DEPTH_TAGS = (258, 262)


def describe(image: PIL.Image.Image) -> dict[str, Any]:
    """All of an image but its pixels that its colours depend on."""
    description: dict[str, Any] = {"mode": image.mode, "size": image.size, "format": image.format}
    tags = getattr(image, "tag_v2", {})
    description["tags"] = {tag: tags[tag] for tag in DEPTH_TAGS if isinstance(tags.get(tag), (int, tuple))}
    if image.mode in ("P", "PA"):
        palette = bytes(image.getpalette(None) or b"")
        description["palette"] = [image.palette.mode, base64.b64encode(palette).decode()]
    transparency = image.info.get("transparency")
    if isinstance(transparency, bytes):
        description["transparency"] = {"bytes": base64.b64encode(transparency[:256]).decode()}
    elif transparency is not None:
        description["transparency"] = transparency
    return description


def rebuild(description: dict[str, Any], pixels: Callable[[int], bytes], limits: ImageLimits) -> PIL.Image.Image:
    """The image that was described.

    Args:
        pixels: gives that many bytes of them.
    """
    mode, (width, height) = description["mode"], description["size"]
    num_bytes = description["num_bytes"]
    _check_size(width, height, limits)
    if not 0 < num_bytes <= MAX_PIXEL_BYTES * width * height:
        raise ValueError(f"{num_bytes} bytes are no {width} x {height} pixels")
    image = PIL.Image.frombytes(mode, (width, height), pixels(num_bytes))
    image.format = description["format"] if description["format"] in FORMATS else None
    if description["tags"]:
        image.tag_v2 = {
            int(tag): tuple(value) if isinstance(value, list) else value for tag, value in description["tags"].items()
        }
    if "palette" in description:
        palette_mode, palette = description["palette"]
        image.putpalette(base64.b64decode(palette), palette_mode)
    transparency = description.get("transparency")
    if transparency is not None:
        if isinstance(transparency, dict):
            transparency = base64.b64decode(transparency["bytes"])
        image.info["transparency"] = tuple(transparency) if isinstance(transparency, list) else transparency
    return image


# -------------------------------------------------------------------------------------------------- the process itself


def _bound_process(limits: ImageLimits) -> None:
    """No more memory than what the program takes already and what is allowed; no files, no dumps, and others first."""
    import resource

    os.nice(5)
    statm = "/proc/self/statm"
    size = 0
    if os.path.exists(statm):
        with open(statm) as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + limits.max_memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _bound_time(limits: ImageLimits) -> None:
    """The parent ends a process that takes too long; this is for when there is no parent any more."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(used.ru_utime + used.ru_stime + limits.max_seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _answer(data: bytes, limits: ImageLimits) -> tuple[dict[str, Any], bytes]:
    try:
        image = decode(data, limits)
        pixels = image.tobytes()
        return {**describe(image), "num_bytes": len(pixels)}, pixels
    except BadImageError as error:
        return {"error": str(error)}, b""
    except MemoryError:
        allowed = f"{limits.max_memory_bytes:,} bytes of memory that are allowed for decoding"
        return {"error": f"The image takes more than the {allowed}."}, b""


def main(source: BinaryIO, sink: BinaryIO, limits: ImageLimits) -> None:
    """Decodes one file after the other until there are no more."""
    PIL.Image.MAX_IMAGE_PIXELS = None  # ours is looked at before anything is decoded
    PIL.Image.init()  # the plug-ins, while there is memory
    _bound_process(limits)
    sink.write(READY)
    sink.flush()
    while len(head := source.read(8)) == 8:
        _bound_time(limits)
        description, pixels = _answer(source.read(int.from_bytes(head, "big")), limits)
        text = json.dumps(description).encode()
        sink.write(len(text).to_bytes(4, "big") + text)
        sink.write(pixels)
        sink.flush()


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer, ImageLimits(**json.loads(sys.argv[1])))
