"""Image files of strangers: the same pixels as Pillow's, within limits, and nobody else pays."""

import concurrent.futures
import dataclasses
import io
import os
import threading
import time

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from file_bombs import (
    encoded,
    gif_with_comments,
    jpeg_scans,
    png,
    png_chunk,
    webp,
    webp_canvas,
    webp_lossless,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from viscpm_hf import VisCPMImageProcessor
from viscpm_hf.images import (
    BadImageError,
    DecoderBusyError,
    DecodingCancelledError,
    ImageDecoder,
    ImageLimits,
    decode_image,
)
from viscpm_hf.images.decoding import decode, rebuild


LIMITS = ImageLimits(max_pixels=1_000_000)
NOISE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 4), dtype=np.uint8), "RGBA")
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def decoder():
    decoder = ImageDecoder(LIMITS, num_workers=1)
    yield decoder
    decoder.close()


def exif(orientation: int) -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


GREY16 = PIL.Image.fromarray(np.arange(37 * 53, dtype=np.uint16).reshape(37, 53) * 31)
PALETTE = NOISE.convert("RGB").quantize(64)


@pytest.mark.parametrize(
    "data",
    [
        *(encoded(NOISE.convert("RGB"), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO")),
        *(encoded(NOISE.convert(mode), "PNG") for mode in ("1", "L", "LA", "RGBA")),
        *(encoded(NOISE.convert(mode), "TIFF") for mode in ("CMYK", "F", "LAB")),
        encoded(NOISE.convert("RGB"), "JPEG", progressive=True),
        encoded(NOISE, "WEBP", lossless=True),
        encoded(PALETTE, "PNG"),
        encoded(PALETTE, "PNG", transparency=3),
        encoded(PALETTE, "PNG", transparency=bytes(range(64))),
        encoded(NOISE.convert("RGB"), "PNG", transparency=(1, 2, 3)),
        encoded(GREY16, "PNG"),
        encoded(GREY16, "TIFF"),
        encoded(NOISE, "PNG", save_all=True, append_images=[PIL.Image.new("RGBA", NOISE.size)] * 3),
        encoded(PALETTE, "GIF", save_all=True, append_images=[PIL.Image.new("P", NOISE.size)] * 3),
        *(encoded(NOISE.convert("RGB"), "JPEG", exif=exif(orientation)) for orientation in (1, 3, 6, 8, 200)),
    ],
)
def test_the_pixels_are_pillows(decoder, data):
    with PIL.Image.open(io.BytesIO(data)) as image:
        expected = PIL.ImageOps.exif_transpose(image)
    got = decoder.decode(data)
    assert (got.mode, got.size) == (expected.mode, expected.size)
    for mode in ("RGB", "RGBA"):
        assert got.convert(mode).tobytes() == expected.convert(mode).tobytes() or got.mode in ("F", "LAB")
    assert got.tobytes() == expected.tobytes()
    assert got.format == PIL.Image.open(io.BytesIO(data)).format
    if expected.mode != "F":  # whose white is unknown
        seen = [VisCPMImageProcessor()(image)["pixel_values"] for image in (data, got)]
        assert np.array_equal(*seen)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (jpeg_scans(64, 60_000), "more than the 100 scans"),
        (b"\xff\xd8" + b"\xff\xe1\x00\x02" * 20_000 + jpeg_scans(8, 1)[2:], "more than the 16,384 segments"),
        (png(8, 8, png_chunk(b"tEXt") * 20_000), "more than the 16,384 chunks"),
        (png(8, 8, png_chunk(b"IDAT") * 20_000), "more than the 16,384 chunks"),
        (webp(webp_canvas(64, 64), *[(b"junk", b"")] * 20_000), "more than the 16,384 chunks"),
        (png(60_000, 60_000, pixels=bytes(1000)), "60,000 x 60,000 pixels"),
        (webp(webp_lossless(16_384, 16_384)), "16,384 x 16,384 pixels"),
        (webp(webp_canvas(16_000, 2**24)), "16,000 x 16,777,216 pixels"),
        (encoded(PIL.Image.new("1", (2000, 1000)), "TIFF"), "2,000 x 1,000 pixels"),
        (encoded(PIL.Image.new("P", (2000, 1000)), "GIF"), "2,000 x 1,000 pixels"),
        (encoded(PIL.Image.new("1", (2000, 1000)), "BMP"), "2,000 x 1,000 pixels"),
        (encoded(NOISE, "PNG")[:500], "can't be read as JPEG"),
        (encoded(NOISE.convert("RGB"), "PPM"), "can't be read as JPEG"),
        (b"", "can't be read as JPEG"),
    ],
)
def test_what_costs_too_much_or_is_no_image_is_refused_at_once(decoder, data, message):
    begin = time.monotonic()
    with pytest.raises(BadImageError, match=message):
        decoder.decode(data)
    assert time.monotonic() - begin < 3
    assert decoder.decode(encoded(NOISE, "PNG")).size == NOISE.size


def test_scans_hidden_in_a_file_are_counted():
    thumbnail = b"\xff\xe1" + (2 + 200 * 2).to_bytes(2, "big") + b"\xff\xda" * 200
    data = encoded(NOISE.convert("RGB"), "JPEG")
    assert decode(data[:2] + thumbnail + data[2:], LIMITS).size == NOISE.size  # none of its own scans
    scans = jpeg_scans(64, 150)
    with pytest.raises(BadImageError, match="scans"):
        decode(scans[:2] + b"\xff\xe1\x00\x02junk" + scans[2:], LIMITS)


def test_time_memory_and_a_dead_process_cost_only_the_image_itself():
    good = encoded(NOISE, "PNG")
    for limits, data, message in (
        (ImageLimits(max_seconds=0.5), gif_with_comments(5_000_000), r"more than the 0\.5 s"),
        (ImageLimits(max_memory_bytes=64 * 2**20), png(5000, 5000, pixels=bytes(15_001 * 5000)), "67,108,864 bytes"),
    ):
        decoder = ImageDecoder(limits, num_workers=2)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            bad = pool.submit(decoder.decode, data)
            assert decoder.decode(good).size == NOISE.size
            with pytest.raises(BadImageError, match=message):
                bad.result()
        for worker in decoder._idle:
            worker.process.kill()
            worker.process.wait()
        assert decoder.decode(good).size == NOISE.size
        decoder.close()


def test_slow_images_make_room():
    decoder = ImageDecoder(ImageLimits(max_seconds=60, max_scans=10**6, max_chunks=10**6), num_workers=1, num_slow=1)
    gone, slow = threading.Event(), jpeg_scans(3000, 60_000)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(decoder.decode, slow, gone)
        second = pool.submit(decoder.decode, slow, gone)
        with pytest.raises(DecoderBusyError, match="1 images that take more than 1 s"):
            second.result()
        assert decoder.decode(encoded(NOISE, "PNG")).size == NOISE.size
        assert not first.done()
        gone.set()
        with pytest.raises(DecodingCancelledError):
            first.result()
    with pytest.raises(DecodingCancelledError):
        decoder.decode(slow, gone)
    decoder.close()


def test_memory_for_pixels_is_asked_for_first(decoder):
    asked = []
    decoder.decode(encoded(NOISE, "PNG"), on_size=asked.append)
    assert asked == [4 * NOISE.width * NOISE.height]


def test_processes_end_with_their_decoder():
    decoder = ImageDecoder(num_workers=1)
    decoder.start()
    (worker,) = decoder._idle
    del decoder
    assert worker.process.returncode is not None
    assert os.path.basename(decode_image.__code__.co_filename) == "workers.py"
    assert decode_image(encoded(NOISE, "PNG")).size == NOISE.size


@pytest.mark.parametrize(
    "change",
    [{"num_bytes": 10**12}, {"size": [10**6, 10**6]}, {"mode": "XYZ"}, {"num_bytes": 3}, {"palette": ["RGB", "AA"]}],
)
def test_what_a_process_says_is_not_trusted(change):
    description = {"mode": "RGB", "size": [4, 4], "num_bytes": 48, "format": "PNG", "tags": {}} | change
    with pytest.raises(ValueError):
        rebuild(description, bytes, LIMITS)


def test_limits_are_checked():
    for field in dataclasses.fields(ImageLimits):
        with pytest.raises(ValueError, match=f"{field.name} must be a number greater than 0"):
            ImageLimits(**{field.name: 0})
    with pytest.raises(ValueError, match="num_workers must be at least 1"):
        ImageDecoder(num_workers=0)


SEEDS = [encoded(NOISE.convert("RGB"), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_comes_is_an_image_or_refused(data):
    file = bytearray(data.draw(st.sampled_from([*SEEDS, jpeg_scans(16, 3), webp(webp_canvas(64, 64))])))
    for _ in range(data.draw(st.integers(0, 6))):
        place = data.draw(st.integers(0, min(len(file) - 1, 400)))
        file[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=8))
    try:
        image = decode(bytes(file), LIMITS)
    except BadImageError as error:
        assert len(str(error)) < 300
    else:
        assert image.width * image.height <= LIMITS.max_pixels
