"""Files that cost more to decode than to send."""

from __future__ import annotations

import io
import struct
import zlib

import PIL.Image


def encoded(image: PIL.Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, more: bytes = b"", pixels: bytes | None = None) -> bytes:
    """Black, with further chunks before its pixels."""
    pixels = bytes((1 + 3 * width) * height) if pixels is None else pixels
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    end = png_chunk(b"IDAT", zlib.compress(pixels)) + png_chunk(b"IEND")
    return b"\x89PNG\r\n\x1a\n" + head + more + end


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_canvas(width: int, height: int) -> tuple[bytes, bytes]:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"VP8X", bytes([2, 0, 0, 0]) + sides


def webp_lossless(width: int, height: int) -> tuple[bytes, bytes]:
    return b"VP8L", b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(4)


def gif_with_comments(count: int) -> bytes:
    """An image behind so many blocks of a comment."""
    comment = b"\x21\xfe" + b"\x01a" * count + b"\0"
    image = encoded(PIL.Image.new("P", (8, 8)), "GIF")
    return image[:13] + image[13:-1].replace(b"\x2c", comment + b"\x2c", 1) + b";"


def jpeg_scans(side: int, num_scans: int) -> bytes:
    """A progressive JPEG; each scan is a walk over all blocks, in some 30 bytes."""
    num_blocks = (-(-side // 8)) ** 2

    def segment(mark: int, data: bytes) -> bytes:
        return b"\xff" + bytes([mark]) + struct.pack(">H", len(data) + 2) + data

    def bits(text: str) -> bytes:
        text += "1" * (-len(text) % 8)
        return int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")

    head = b"\xff\xd8" + segment(0xDB, b"\0" + b"\x01" * 64)
    head += segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\x01\x11\x00")
    head += segment(0xC4, b"\x00" + bytes([1] + [0] * 15) + b"\x00")
    head += segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\xe0")
    head += segment(0xDA, b"\x01\x01\x00\x00\x00\x00") + bits("0" * num_blocks)
    runs, left = "", num_blocks
    while left > 0:
        run = max(min(left, 32767), 16384)
        runs += "0" + format(run - 16384, "014b")
        left -= run
    return head + (segment(0xDA, b"\x01\x01\x00\x01\x3f\x00") + bits(runs)) * num_scans + b"\xff\xd9"
