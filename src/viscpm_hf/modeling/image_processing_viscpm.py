"""Image processor of VisCPM-Chat: any image -> RGB, 224 × 224, values in -1..1.

As the 2023 release did: PIL's `convert("RGB")` and PIL's bicubic filter straight to the target size, whatever the
aspect ratio. Images stay PIL images until they are small, so that a large photograph is neither copied nor transposed
at full size.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    get_image_size_for_max_height_width,
    is_pil_image,
    is_valid_image,
    make_flat_list_of_images,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .image_reading_viscpm import (
    are_fractions,
    array_to_image,
    check_pixels,
    image_to_array,
    open_image,
    resize_image,
    to_channels_last,
    to_rgb,
    upright,
)


# Modes that keep their channels without `do_convert_rgb`.
_PLAIN_MODES = ("L", "RGB", "RGBA")


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

    def fetch_images(self, image_url_or_urls: Any, max_image_pixels: int | None = None) -> Any:
        """Opens what is not an image yet (path, URL, base64, bytes), keeping the nesting. PIL images are upright then
        and have 8 bits a channel; the given ones are left as they are."""
        image = image_url_or_urls
        if isinstance(image, (list, tuple)):
            return [self.fetch_images(item, max_image_pixels) for item in image]
        limit = self.max_image_pixels if max_image_pixels is None else max_image_pixels
        if isinstance(image, (str, bytes, os.PathLike)):
            return open_image(image, limit)
        if not is_valid_image(image):
            raise ValueError(
                "Expected an image (PIL image, numpy array, torch tensor, file path, URL, base64 string or bytes), "
                f"but got {type(image).__name__}."
            )
        if is_pil_image(image):
            return upright(image, limit)
        if image.ndim not in (2, 3, 4):
            raise ValueError(
                f"An image array must have 2 or 3 dimensions (4 for a batch), but has the shape {tuple(image.shape)}."
            )
        return image[None] if image.ndim == 2 else image

    def preprocess(self, images: ImageInput, *args, **kwargs: Unpack[ImagesKwargs]):
        images = _flatten(self.fetch_images(images, kwargs.get("max_image_pixels")))
        if not images:
            raise ValueError("Expected at least one image, but got 0.")
        return super().preprocess(images, *args, **kwargs)

    def _prepare_images_structure(self, images: list[Any], expected_ndims: int = 3) -> list[Any]:
        return images  # `preprocess` has done it

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        min_image_side: int | None = None,
        max_image_pixels: int | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        **kwargs: Unpack[ImagesKwargs],
    ) -> "PIL.Image.Image | np.ndarray":
        """
        Checks one image and makes it a PIL image: RGB, or without `do_convert_rgb` of the channels that it has. Floats
        from 0 to 1 that are not to be rescaled by 1/255 stay such floats, `(channels, height, width)`.
        """
        if is_pil_image(image):
            width, height = image.size
        else:
            image = to_channels_last(image, input_data_format)
            height, width = image.shape[:2]
        min_image_side = self.min_image_side if min_image_side is None else min_image_side
        if min(height, width) < min_image_side:
            raise ValueError(
                f"The image is {height}x{width} pixels, but its sides must be at least {min_image_side} pixels "
                "(`min_image_side`)."
            )
        # Before the pixels of a file are decoded.
        limit = self.max_image_pixels if max_image_pixels is None else max_image_pixels
        check_pixels(height, width, limit)

        keeps_scale = False
        if is_pil_image(image):
            image = upright(image, limit)
        else:
            is_usual = do_rescale is not False and rescale_factor in (None, type(self).rescale_factor)
            keeps_scale = not is_usual and are_fractions(image)
            image = array_to_image(image)
        if do_convert_rgb:
            image = to_rgb(image)
        elif image.mode not in _PLAIN_MODES:
            raise ValueError(
                f"Without do_convert_rgb an image has one of the modes {', '.join(_PLAIN_MODES)}, got {image.mode}."
            )
        return image_to_array(image) / np.float32(255) if keeps_scale else image

    def resize(
        self,
        image: "PIL.Image.Image | np.ndarray",
        size: SizeDict,
        resample: "PILImageResampling | None" = None,
        **kwargs,
    ) -> np.ndarray:
        """Resizes to `size`, a (C, H, W) array: levels as uint8, or floats from 0 to 1 for such floats."""
        is_fraction = not is_pil_image(image) and are_fractions(image)
        if not is_pil_image(image):
            image = array_to_image(np.moveaxis(image, 0, -1))
        resample = PILImageResampling.BILINEAR if resample is None else resample
        array = image_to_array(resize_image(image, *_target_size(image, size), resample))
        return array / np.float32(255) if is_fraction else array

    def rescale(self, image: np.ndarray, scale: float, **kwargs) -> np.ndarray:
        # A division in float32: with 1/255 that is the original's arithmetic, to the last bit.
        return np.divide(image, np.float32(1 / scale), dtype=np.float32, order="C", casting="unsafe")

    def values_of_levels(self, num_channels: int) -> np.ndarray:
        """What each level becomes: `(channels, 256)`, to the last bit as in `pixel_values`."""
        values = np.tile(np.arange(256, dtype=np.uint8), (num_channels, 1, 1))
        if self.do_rescale:
            values = self.rescale(values, self.rescale_factor)
        if self.do_normalize:
            values = self.normalize(values, self.image_mean, self.image_std)
        return values[:, 0]

    def _preprocess(self, images: list[Any], do_resize: bool, **kwargs):
        if not do_resize:
            images = [image_to_array(image) if is_pil_image(image) else image for image in images]
        return super()._preprocess(images, do_resize=do_resize, **kwargs)


def images_in_order(
    images: Any,
    wanted: Sequence[int],
    image_processor: VisCPMImageProcessor,
    image_token: str,
    max_image_pixels: int | None = None,
) -> list[Any]:
    """All images of a batch in the order of their placeholders.

    Args:
        images: one image, a list for all texts in order, or a list of lists, one for each text.
        wanted: each text's number of placeholders.
        image_token: what a placeholder is called in a message.
        max_image_pixels: in place of the image processor's.

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
    flat = [] if is_empty else make_flat_list_of_images(image_processor.fetch_images(images, max_image_pixels))
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


def _target_size(image: "PIL.Image.Image", size: SizeDict) -> tuple[int, int]:
    """Height and width that `size` means for an image."""
    shape = (image.height, image.width)
    if size.shortest_edge:
        return get_size_with_aspect_ratio(shape, size.shortest_edge, size.longest_edge)
    if size.max_height and size.max_width:
        return get_image_size_for_max_height_width(shape, size.max_height, size.max_width)
    if size.height and size.width:
        return size.height, size.width
    raise ValueError(f"A size has height and width, shortest_edge, or max_height and max_width, but got {size}.")


__all__ = ["VisCPMImageProcessor"]
