"""Image files of strangers: read within limits of pixels, time and memory."""

from .decoding import FORMATS, BadImageError, ImageLimits
from .workers import DecoderBusyError, DecodingCancelledError, ImageDecoder, decode_image


__all__ = [
    "FORMATS",
    "BadImageError",
    "DecoderBusyError",
    "DecodingCancelledError",
    "ImageDecoder",
    "ImageLimits",
    "decode_image",
]
