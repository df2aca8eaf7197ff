"""Image processor of VisCPM-Chat: any image -> RGB, 224 × 224, values in -1..1.

As the 2023 release did: PIL's `convert("RGB")` (transparency is dropped; transformers would lay the image on white)
and PIL's bicubic filter straight to the target size, whatever the aspect ratio. Images stay PIL images until they are
small, so that a large photograph is neither copied nor transposed at full size.
"""

import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    is_pil_image,
    is_valid_image,
    load_image,
    make_flat_list_of_images,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import is_torch_tensor


# What PIL's decoders raise, besides ValueError, for a file that breaks off or makes no sense: a PNG with a wrong
# checksum is a SyntaxError, for one.
_DECODER_ERRORS = (OSError, SyntaxError, EOFError, LookupError, TypeError, struct.error, zlib.error)


class VisCPMImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    min_image_side (`int`, *optional*, defaults to 2):
        Shortest side, in pixels, of an image that is accepted.
    max_image_pixels (`int`, *optional*, defaults to 178956970):
        Largest number of pixels of an image that is accepted, looked at before the image is decoded. PIL itself
        refuses a file above the default as a decompression bomb.
    """

    min_image_side: int
    max_image_pixels: int


class VisCPMImageProcessor(PilBackend):
    r"""
    Makes `pixel_values` of shape `(batch_size, 3, height, width)`, float32, for [`Beit3Model`].

    Takes PIL images, numpy arrays and torch tensors (`(height, width)`, or 1, 3 or 4 channels, first or last), and
    file paths, URLs, base64 strings and bytes of an image file, alone or in (nested) lists; sizes may differ.

    Args:
        size (`dict[str, int]`, defaults to `{"height": 224, "width": 224}`): size after resizing.
        resample (`PILImageResampling`, defaults to `BICUBIC`): filter.
        rescale_factor (`float`, defaults to 1/255), image_mean, image_std (`list[float]`, default to 0.5):
            `pixel_values = (pixels * rescale_factor - image_mean) / image_std`.
        min_image_side (`int`, defaults to 2), max_image_pixels (`int`, defaults to 178956970):
            limits of what is accepted, see `VisCPMImageProcessorKwargs`.

    Raises:
        ValueError: for something that is not an image, a truncated or damaged file, and an image outside the limits.
    """

    resample = PILImageResampling.BICUBIC
    size = {"height": 224, "width": 224}
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    min_image_side = 2
    max_image_pixels = 178_956_970
    valid_kwargs = VisCPMImageProcessorKwargs
    model_input_names = ["pixel_values"]

    def __init__(self, **kwargs: Unpack[VisCPMImageProcessorKwargs]):
        super().__init__(**kwargs)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens what is not an image yet (path, URL, base64, bytes), keeping the nesting."""
        image = image_url_or_urls
        if isinstance(image, (list, tuple)):
            return [self.fetch_images(item) for item in image]
        if isinstance(image, (str, bytes, os.PathLike)):
            return _open_image(image, self.max_image_pixels)
        if not is_valid_image(image):
            raise ValueError(
                "Expected an image (PIL image, numpy array, torch tensor, file path, URL, base64 string or bytes), "
                f"but got {type(image).__name__}."
            )
        if is_pil_image(image):
            return image
        if image.ndim not in (2, 3, 4):
            raise ValueError(
                f"An image array must have 2 or 3 dimensions (4 for a batch), but has the shape {tuple(image.shape)}."
            )
        return image[None] if image.ndim == 2 else image

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list[Any]:
        images = _flatten(self.fetch_images(images))
        if not images:
            raise ValueError("Expected at least one image, but got 0.")
        return images

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        min_image_side: int | None = None,
        max_image_pixels: int | None = None,
        **kwargs: Unpack[ImagesKwargs],
    ) -> "PIL.Image.Image | np.ndarray":
        """
        Checks one image and makes it RGB: a PIL image for anything with 8-bit values, a (C, H, W) array for the rest
        (floats, which transformers reads as 0..1 or as 0..255, or an image that is to keep its channels).
        """
        if is_pil_image(image):
            width, height = image.size
        else:
            image = _to_channels_last_array(image, input_data_format)
            height, width = image.shape[:2]
        min_image_side = self.min_image_side if min_image_side is None else min_image_side
        if min(height, width) < min_image_side:
            raise ValueError(
                f"The image is {height}x{width} pixels, but its sides must be at least {min_image_side} pixels "
                "(`min_image_side`)."
            )
        # Before the pixels of a file are decoded.
        _check_pixels(height, width, self.max_image_pixels if max_image_pixels is None else max_image_pixels)

        if is_pil_image(image):
            with _clear_decoding_errors(f"PIL image of mode {image.mode}, {width}x{height} pixels"):
                image.load()
            if do_convert_rgb:
                return _to_rgb(image)
            image = np.asarray(image)
            image = image[..., None] if image.ndim == 2 else image
        elif do_convert_rgb:
            image = self.convert_to_rgb(image, input_data_format=ChannelDimension.LAST)
            if image.dtype == np.uint8:
                return PIL.Image.fromarray(np.ascontiguousarray(image))
        return np.moveaxis(image, -1, 0)

    def convert_to_rgb(
        self, image: "PIL.Image.Image | np.ndarray", input_data_format: str | ChannelDimension | None = None
    ) -> np.ndarray:
        """Grey becomes three equal channels, alpha is dropped. Arrays keep their layout, PIL images give (H, W, 3)."""
        if is_pil_image(image):
            return np.asarray(_to_rgb(image))
        if input_data_format is None:
            input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
        axis = -1 if input_data_format == ChannelDimension.LAST else 0
        if image.shape[axis] == 1:
            return np.repeat(image, 3, axis=axis)
        return image[..., :3] if axis == -1 else image[:3]

    def resize(
        self,
        image: "PIL.Image.Image | np.ndarray",
        size: SizeDict,
        resample: "PILImageResampling | None" = None,
        **kwargs,
    ) -> np.ndarray:
        """Resizes to `size`, a (C, H, W) array. A PIL image goes straight to an exact height and width."""
        if is_pil_image(image):
            if size.height and size.width:
                return _to_array(_resize(image, size.width, size.height, resample))
            image = _to_array(image)
        return super().resize(image, size, resample=resample, **kwargs)

    def rescale(self, image: np.ndarray, scale: float, **kwargs) -> np.ndarray:
        # A division in float32: with 1/255 that is the original's arithmetic, to the last bit.
        return np.divide(image, np.float32(1 / scale), dtype=np.float32, order="C", casting="unsafe")

    def _preprocess(self, images: list[Any], do_resize: bool, **kwargs):
        if not do_resize:
            images = [_to_array(image) if is_pil_image(image) else image for image in images]
        return super()._preprocess(images, do_resize=do_resize, **kwargs)


def images_in_order(
    images: Any, wanted: Sequence[int], image_processor: VisCPMImageProcessor, image_token: str
) -> list[Any]:
    """All images of a batch in the order of their placeholders.

    Args:
        images: one image, a list for all texts in order, or a list of lists, one for each text.
        wanted: each text's number of placeholders.
        image_token: what a placeholder is called in a message.

    Raises:
        ValueError: if there are more or fewer of them than placeholders, for the whole batch or a single text.
    """
    if images is None:
        images = []
    is_nested = isinstance(images, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in images)
    if is_nested:
        given = [len(entry) if isinstance(entry, (list, tuple)) else int(entry is not None) for entry in images]
        if len(given) != len(wanted):
            raise ValueError(f"Got {len(wanted)} texts, but images for {len(given)}.")
        for index, (have, want) in enumerate(zip(given, wanted, strict=True)):
            if have != want:
                raise ValueError(f"Text {index} has {want} image placeholders, but {have} images were given for it.")
        nested = [entry if isinstance(entry, (list, tuple)) else [entry] for entry in images if entry is not None]
        images = [image for entry in nested for image in entry]
    is_empty = isinstance(images, (list, tuple)) and not images
    flat = [] if is_empty else make_flat_list_of_images(image_processor.fetch_images(images))
    if len(flat) != sum(wanted):
        raise ValueError(
            f"The text has {sum(wanted)} image placeholders ({image_token}), but {len(flat)} images were given."
        )
    return flat


def _flatten(images: Any) -> list[Any]:
    """One image, a batch array or nested lists of them -> a flat list of images."""
    if isinstance(images, list):
        return [image for item in images for image in _flatten(item)]
    return list(images) if not is_pil_image(images) and images.ndim == 4 else [images]


def _describe(source: "str | bytes | os.PathLike") -> str:
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    name = os.fspath(source)
    # A base64 string can be megabytes long.
    return repr(name) if len(name) <= 100 else f"{name[:60]!r}... ({len(name)} characters)"


@contextmanager
def _clear_decoding_errors(source: str):
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


def _open_image(source: "str | bytes | os.PathLike", max_image_pixels: int) -> "PIL.Image.Image":
    """
    Opens an image file, upright by its EXIF orientation. A local file is checked before its pixels are decoded; URLs
    and base64 strings go through transformers' `load_image`, within PIL's own limit.
    """
    described = _describe(source)
    if isinstance(source, os.PathLike) and not os.path.isfile(source):
        raise ValueError(f"There is no image file {described}.")
    with _clear_decoding_errors(described):
        if isinstance(source, str) and not os.path.isfile(source):
            try:
                return load_image(source)
            except ValueError:
                # Its message repeats the whole string.
                raise ValueError(f"{described} is neither an image file, nor a URL, nor an image in base64.") from None
        image = PIL.Image.open(BytesIO(source) if isinstance(source, bytes) else source)
        _check_pixels(image.height, image.width, max_image_pixels)
        PIL.ImageOps.exif_transpose(image, in_place=True)
        return image


def _to_rgb(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """PIL's `convert("RGB")`, except that 16-bit images keep their contrast."""
    if image.mode.startswith("I;16"):
        # PIL's conversion clips at 255, which turns nearly every 16-bit image white: take the high byte.
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"PIL can't convert an image of mode {image.mode} to RGB: {error}.") from error


def _check_pixels(height: int, width: int, max_image_pixels: int):
    if height * width > max_image_pixels:
        raise ValueError(
            f"The image is {height}x{width} = {height * width} pixels, but at most {max_image_pixels} are accepted "
            "(`max_image_pixels`)."
        )


def _to_channels_last_array(image: Any, input_data_format: str | ChannelDimension | None) -> np.ndarray:
    """numpy array or torch tensor -> (H, W, C) view."""
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


def _resize(image: "PIL.Image.Image", width: int, height: int, resample: "PILImageResampling") -> "PIL.Image.Image":
    """
    PIL's resize, with the same pixels in every version of it. Its two passes round to 8 bits in between, so their
    order shows, by a few of 255 levels in a tall image: up to Pillow 12 the horizontal one always comes first, Pillow
    13 begins with the vertical one if that takes away more than twice as many pixels of a side. The reference's data
    was made with the latter.
    """
    vertical_first = image.height - height > max(0, 2 * (image.width - width))
    first = (image.width, height) if vertical_first else (width, image.height)
    return image.resize(first, resample=resample).resize((width, height), resample=resample)


def _to_array(image: "PIL.Image.Image") -> np.ndarray:
    """RGB image -> (3, H, W) view of uint8."""
    return np.moveaxis(np.asarray(image), -1, 0)


__all__ = ["VisCPMImageProcessor"]
