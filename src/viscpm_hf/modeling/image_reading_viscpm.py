"""From whatever stands for an image to an upright PIL image of 8 bits a channel, and its resizing.

Of what is read, a picture keeps the contrast that a viewer shows: values of 16 bits, whole numbers and floats are
brought to 0..255 where their range says what is white, and refused where it doesn't; `docs/images.md` has the table.
"""

import base64
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import PIL.Image
from huggingface_hub.utils import httpx
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format
from transformers.utils import is_torch_tensor


URL_TIMEOUT_SECONDS = 30.0

# What PIL's decoders raise, besides ValueError, for a file that breaks off or makes no sense: a PNG with a wrong
# checksum is a SyntaxError, for one.
_DECODER_ERRORS = (OSError, SyntaxError, EOFError, LookupError, TypeError, struct.error, zlib.error)

_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF
_UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_ORIENTATION_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # where PIL looks for it

# Floats to 1 are fractions of white. A little above it they may be rounding; up to this they may be highlights of such
# fractions as well as the shadows of 0..255, so they are neither.
_ROUNDING, _LEAST_FLOAT_WHITE = 1e-3, 16.0
# Likewise, whole numbers between 8 bits and this may have 10, 12 or 16 bits.
_LEAST_16_BIT_WHITE = 4096


# ------------------------------------------------------------------------------------------------------------- opening


def open_image(source: "str | bytes | os.PathLike", max_image_pixels: int) -> "PIL.Image.Image":
    """
    The image of a file (its path or its bytes), a URL, a data URI or base64 text, as [`upright`] makes it; its size is
    looked at before its pixels are decoded.

    Raises:
        ValueError: for what is none of these, a truncated or damaged file, and an image with too many pixels.
    """
    described = _describe(source)
    is_text = isinstance(source, str) and not os.path.isfile(source)
    if isinstance(source, os.PathLike) and not os.path.isfile(source):
        raise ValueError(f"There is no image file {described}.")
    data = _bytes_of(source) if is_text else source
    with clear_decoding_errors(described):
        try:
            image = PIL.Image.open(BytesIO(data) if isinstance(data, bytes) else data)
        except PIL.UnidentifiedImageError:
            if is_text:
                raise ValueError(f"{described} is neither an image file, nor a URL, nor an image in base64.") from None
            raise
    result = upright(image, max_image_pixels, described)
    if result is not image:
        image.close()
    return result


def upright(image: "PIL.Image.Image", max_image_pixels: int, described: str | None = None) -> "PIL.Image.Image":
    """
    The image as a viewer shows it: turned by its EXIF orientation, with 8 bits a channel. It is the image itself, if
    that is how it comes, or else another one.

    Raises:
        ValueError: for a damaged file, an image with too many pixels, and values whose white is unknown.
    """
    check_pixels(image.height, image.width, max_image_pixels)
    described = described or f"PIL image of mode {image.mode}, {image.width}x{image.height} pixels"
    with clear_decoding_errors(described):
        image.load()  # which turns a TIFF already
    image = _eight_bits(image)
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF data, for which PIL raises anything: the picture itself is whole
        orientation = None
    if not isinstance(orientation, int) or orientation not in _UPRIGHT:
        return image
    with clear_decoding_errors(described):
        image = image.transpose(_UPRIGHT[orientation])
    for key in _ORIENTATION_KEYS:
        image.info.pop(key, None)
    return image


def check_pixels(height: int, width: int, max_image_pixels: int) -> None:
    if height * width > max_image_pixels:
        raise ValueError(
            f"The image is {height}x{width} = {height * width} pixels, but at most {max_image_pixels} are accepted "
            "(`max_image_pixels`)."
        )


@contextmanager
def clear_decoding_errors(source: str) -> Iterator[None]:
    """One clear ValueError for what goes wrong when PIL reads a file."""
    try:
        yield
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"{source} has too many pixels for PIL: {error}") from error
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"{source} is not an image file that PIL can read.") from error
    except _DECODER_ERRORS as error:
        if getattr(error, "errno", None) is not None:  # the system's own, such as "permission denied"
            raise
        raise ValueError(f"The image file is truncated or damaged ({source}): {error}.") from error


def _describe(source: "str | bytes | os.PathLike") -> str:
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    name = os.fspath(source)
    # A base64 string can be megabytes long.
    return repr(name) if len(name) <= 100 else f"{name[:60]!r}... ({len(name)} characters)"


def _bytes_of(source: str) -> bytes:
    """The file behind a URL, or that a data URI or base64 text holds; no bytes for other texts."""
    if source.startswith(("http://", "https://")):
        try:
            return httpx.get(source, timeout=URL_TIMEOUT_SECONDS, follow_redirects=True).raise_for_status().content
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ValueError(f"The image could not be fetched from {_describe(source)}: {error}.") from error
    text = source.partition(",")[2] if source.startswith("data:") else source
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        return b""


# -------------------------------------------------------------------------------------------------------------- levels


def to_rgb(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """
    PIL's `convert("RGB")` of an image of 8 bits a channel: palettes become their colours, and transparency is dropped,
    as in the 2023 release (transformers would lay the image on white).
    """
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"PIL can't convert an image of mode {image.mode} to RGB: {error}.") from error


def array_to_image(array: np.ndarray) -> "PIL.Image.Image":
    """An array (height, width, 1, 3 or 4 channels) of any numbers -> an image of mode L, RGB or RGBA."""
    levels = _levels(array, f"An image array of {array.dtype}")
    return PIL.Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else np.ascontiguousarray(levels))


def are_fractions(array: np.ndarray) -> bool:
    """Whether an array holds floats from 0 to 1."""
    return array.dtype.kind == "f" and bool((array >= -_ROUNDING).all() and (array <= 1 + _ROUNDING).all())


def to_channels_last(image: Any, input_data_format: str | ChannelDimension | None) -> np.ndarray:
    """numpy array or torch tensor -> (height, width, channels) view."""
    if is_torch_tensor(image):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if input_data_format is None:
        try:
            input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
        except ValueError as error:
            raise ValueError(
                f"An image array must have 1, 3 or 4 channels, first or last, but has the shape {image.shape}."
            ) from error
    return np.moveaxis(image, 0, -1) if input_data_format == ChannelDimension.FIRST else image


def _eight_bits(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """PIL's own conversion cuts whatever is above 255 or, of floats, below 1: a white or a black picture."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image
    described = f"An image of mode {image.mode}"
    tags = getattr(image, "tag_v2", {})
    if tags.get(_PHOTOMETRIC) == 0:
        raise ValueError(f"{described} whose zero is white (a TIFF's WhiteIsZero) isn't supported: invert it first.")
    # Of a file with a depth, white is known.
    bits = 16 if image.mode.startswith("I;16") and image.format is not None else None
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        bits = 16  # as PIL scales them
    stored = tags.get(_BITS_PER_SAMPLE)
    if bits is not None and stored:
        bits = stored[0] if isinstance(stored, tuple) else stored
    eight_bits = PIL.Image.fromarray(_levels(np.asarray(image), described, bits))
    for key in _ORIENTATION_KEYS:
        if key in image.info:
            eight_bits.info[key] = image.info[key]
    return eight_bits


def _levels(values: np.ndarray, described: str, bits: int | None = None) -> np.ndarray:
    """Any numbers as levels from 0 to 255, uint8; `bits`: those of white, if they are known."""
    kind = values.dtype.kind
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if kind not in "iuf":
        raise ValueError(f"{described} isn't supported: the values of an image are booleans, whole numbers or floats.")
    least, most = (values.min(), values.max()) if values.size else (0, 0)
    found = f"{described} has values from {least:g} to {most:g}"
    if kind == "f":
        if are_fractions(values):
            return np.rint(np.clip(values, 0, 1) * np.float32(255)).astype(np.uint8)
        if least >= 0 and _LEAST_FLOAT_WHITE <= most <= 255:
            return values.astype(np.uint8)  # cut, as PIL does
        raise ValueError(f"{found}, but floats are read as 0..1 or as 0..255: bring them to one of these.")
    if bits is None and most <= 255 and (values.dtype.str[1:] != "u2" or most == 0):
        bits = 8
    if bits is None and most >= _LEAST_16_BIT_WHITE:
        bits = 16
    if bits is None or least < 0 or most >= 2**bits:
        raise ValueError(
            f"{found}, from which its white can't be known: whole numbers are read as 0..255, or as 16 bits if they "
            f"reach {_LEAST_16_BIT_WHITE}. Bring them to 0..255, as uint8."
        )
    return (values >> (bits - 8)).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------ resizing


def resize_image(
    image: "PIL.Image.Image", height: int, width: int, resample: "PIL.Image.Resampling"
) -> "PIL.Image.Image":
    """
    PIL's resize as it was up to version 12, which the originals used, with whatever version: horizontally, then
    vertically. Both passes round to 8 bits, so that their order shows; Pillow 13 turns it round for tall images, which
    makes up to 20 of 255 levels.
    """
    return image.resize((width, image.height), resample=resample).resize((width, height), resample=resample)


def image_to_array(image: "PIL.Image.Image") -> np.ndarray:
    """Image -> (channels, height, width) view of uint8."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
