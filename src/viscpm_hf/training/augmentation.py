"""Random changes of training pictures as in the original (crop, flip, RandAugment), with PIL and a seed for each."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps


CROP_SCALE, CROP_RATIO, CROP_ATTEMPTS = (0.5, 1.0), (3 / 4, 4 / 3), 10

# RandAugment(2, 7): two operations, each done half of the time, at 7 of 10.
NUM_OPERATIONS, PROBABILITY, LEVEL = 2, 0.5, 0.7
MAX_DEGREES, MAX_SHEAR = 30.0, 0.3
MAX_SHIFT = 10 / 224  # of the side
MIN_FACTOR, MAX_FACTOR = 0.1, 1.9
FILL = (128, 128, 128)


def augment(picture: PIL.Image.Image, seed: str) -> PIL.Image.Image:
    """A crop of 50 to 100 % of the RGB picture, mirrored or not, with two operations of RandAugment; the size of the
    result is the crop's."""
    rng = random.Random(seed)
    picture = picture.crop(_crop_box(picture.size, rng))
    if rng.random() < 0.5:
        picture = PIL.ImageOps.mirror(picture)
    for operation in rng.choices(OPERATIONS, k=NUM_OPERATIONS):
        if rng.random() < PROBABILITY:
            picture = operation(picture, rng.choice((-1, 1)))
    return picture


def _crop_box(size: tuple[int, int], rng: random.Random) -> tuple[int, int, int, int]:
    width, height = size
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(*CROP_SCALE)
        ratio = math.exp(rng.uniform(*map(math.log, CROP_RATIO)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = rng.randint(0, width - crop_width), rng.randint(0, height - crop_height)
            return left, top, left + crop_width, top + crop_height
    return 0, 0, width, height  # too long and narrow for any crop


def _affine(picture: PIL.Image.Image, *coefficients: float) -> PIL.Image.Image:
    return picture.transform(
        picture.size, PIL.Image.Transform.AFFINE, coefficients, PIL.Image.Resampling.BILINEAR, fillcolor=FILL
    )


def _shift(sign: int, side: int) -> float:
    return sign * LEVEL * MAX_SHIFT * side


def _enhance(enhancer: type) -> Callable[[PIL.Image.Image, int], PIL.Image.Image]:
    factor = MIN_FACTOR + LEVEL * (MAX_FACTOR - MIN_FACTOR)
    return lambda picture, sign: enhancer(picture).enhance(factor)


OPERATIONS: tuple[Callable[[PIL.Image.Image, int], PIL.Image.Image], ...] = (
    lambda picture, sign: picture,
    lambda picture, sign: PIL.ImageOps.autocontrast(picture),
    lambda picture, sign: PIL.ImageOps.equalize(picture),
    _enhance(PIL.ImageEnhance.Brightness),
    _enhance(PIL.ImageEnhance.Sharpness),
    lambda picture, sign: _affine(picture, 1, sign * LEVEL * MAX_SHEAR, 0, 0, 1, 0),
    lambda picture, sign: _affine(picture, 1, 0, 0, sign * LEVEL * MAX_SHEAR, 1, 0),
    lambda picture, sign: _affine(picture, 1, 0, _shift(sign, picture.width), 0, 1, 0),
    lambda picture, sign: _affine(picture, 1, 0, 0, 0, 1, _shift(sign, picture.height)),
    lambda picture, sign: picture.rotate(
        sign * LEVEL * MAX_DEGREES, resample=PIL.Image.Resampling.BILINEAR, fillcolor=FILL
    ),
)
