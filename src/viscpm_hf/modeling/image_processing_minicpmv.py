"""Image processor of MiniCPM-V: a square for 1.0; views of the picture's own shape for 2.0.

2.0 looks at a picture as a whole and, if it is larger than 448 x 448 pixels, at the tiles of a grid that fits its
shape, at most nine (the slicing of LLaVA-UHD). All sizes here follow the 2024 release to the pixel, Python's rounding
of halves to even included.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
from transformers import BatchFeature
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack

from .image_processing_viscpm import VisCPMImageProcessor, VisCPMImageProcessorKwargs


SLICE_MODES = ("square", "adaptive", "whole")


@dataclass(frozen=True)
class SlicePlan:
    """How one picture becomes views; all sizes are (height, width) in pixels."""

    overview: tuple[int, int]
    grid: tuple[int, int] | None = None
    """Rows and columns of tiles; None if the overview is all there is."""
    tile: tuple[int, int] | None = None

    @property
    def num_views(self) -> int:
        return 1 + (self.grid[0] * self.grid[1] if self.grid else 0)


def plan_slices(
    height: int, width: int, scale_resolution: int = 448, patch_size: int = 14, max_slice_nums: int = 9
) -> SlicePlan:
    """The views of a picture of this size.

    Args:
        scale_resolution: side, in pixels, of a square with the area of one view.
        patch_size: sides of views are multiples of it.
        max_slice_nums: the most tiles.
    """
    area = scale_resolution**2
    num_slices = min(math.ceil(width * height / area), max_slice_nums)
    if num_slices <= 1:
        return SlicePlan(_fitting_size(height, width, scale_resolution, patch_size, enlarge=True))
    grid = _best_grid(height, width, num_slices, max_slice_nums)
    rows, columns = grid
    tile = _fitting_size(
        _multiple(height, rows) / rows, _multiple(width, columns) / columns, scale_resolution, patch_size, enlarge=True
    )
    return SlicePlan(_fitting_size(height, width, scale_resolution, patch_size, enlarge=False), grid, tile)


def _multiple(value: float, divisor: int) -> int:
    return max(round(value / divisor) * divisor, divisor)


def _fitting_size(
    height: float, width: float, scale_resolution: int, patch_size: int, *, enlarge: bool
) -> tuple[int, int]:
    """The size with the area of one view (smaller pictures keep theirs unless `enlarge`), in whole patches."""
    if width * height > scale_resolution**2 or enlarge:
        ratio = width / height
        height = int(scale_resolution / math.sqrt(ratio))
        width = int(height * ratio)
    return _multiple(height, patch_size), _multiple(width, patch_size)


def _best_grid(height: int, width: int, num_slices: int, max_slice_nums: int) -> tuple[int, int]:
    """Rows and columns: of the grids with about `num_slices` tiles the one whose shape is nearest the picture's."""
    log_ratio = math.log(width / height)
    best, least = (1, 1), math.inf
    for number in (num_slices - 1, num_slices, num_slices + 1):
        if number <= 1 or number > max_slice_nums:
            continue
        for columns in range(1, number + 1):
            rows = number // columns
            distance = abs(log_ratio - math.log(columns / rows))
            if number % columns == 0 and distance < least:
                best, least = (rows, columns), distance
    return best


class MiniCPMVImageProcessorKwargs(VisCPMImageProcessorKwargs, total=False):
    r"""
    slice_mode (`str`, *optional*, defaults to `"adaptive"`):
        `"adaptive"`: an overview and tiles (MiniCPM-V 2.0); `"square"`: one view of `size`, whatever the aspect ratio
        (1.0); `"whole"`: one view, the picture as it is.
    max_slice_nums (`int`, *optional*, defaults to 9):
        The most tiles of one picture.
    scale_resolution (`int`, *optional*, defaults to 448):
        Side, in pixels, of a square with the area of one view.
    patch_size (`int`, *optional*, defaults to 14):
        Patches of the vision tower; views are whole numbers of them.
    """

    slice_mode: str
    max_slice_nums: int
    scale_resolution: int
    patch_size: int


class MiniCPMVImageProcessor(VisCPMImageProcessor):
    r"""
    Makes the views of pictures. Takes what [`VisCPMImageProcessor`] takes, and raises what it raises.

    Returns:
        - `pixel_values` `(views, 3, height, width)`: of all pictures one after the other, an overview before its tiles
          and these row by row, with zeros on the right and below where a view is smaller than the largest;
        - `image_sizes` `(views, 2)`: (height, width) of each view without these zeros;
        - `num_views` `(pictures,)`;
        - `grids` `(pictures, 2)`: rows and columns of tiles, (0, 0) without tiles.

    Raises:
        ValueError: also for an unknown `slice_mode`.
    """

    size = {"height": 448, "width": 448}
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    slice_mode = "adaptive"
    max_slice_nums = 9
    scale_resolution = 448
    patch_size = 14
    resample = PILImageResampling.BICUBIC
    valid_kwargs = MiniCPMVImageProcessorKwargs
    model_input_names = ["pixel_values", "image_sizes", "num_views"]

    def __init__(self, **kwargs: Unpack[MiniCPMVImageProcessorKwargs]):
        super().__init__(**kwargs)
        check_slicing(self.slice_mode, self.max_slice_nums, self.scale_resolution, self.patch_size)

    def _validate_preprocess_kwargs(
        self, slice_mode: str, max_slice_nums: int, scale_resolution: int, patch_size: int, **kwargs
    ) -> None:
        check_slicing(slice_mode, max_slice_nums, scale_resolution, patch_size)
        super()._validate_preprocess_kwargs(**kwargs)

    def plan(self, height: int, width: int, **kwargs: Unpack[MiniCPMVImageProcessorKwargs]) -> SlicePlan:
        """The views of a picture of this size; `kwargs` come before the processor's own values."""

        def value(name: str) -> Any:
            given = kwargs.get(name)
            return getattr(self, name) if given is None else given

        mode = value("slice_mode")
        if mode == "square":
            size = value("size")
            return SlicePlan((size["height"], size["width"]))
        if mode == "whole":
            return SlicePlan((height, width))
        return plan_slices(height, width, value("scale_resolution"), value("patch_size"), value("max_slice_nums"))

    def _preprocess(
        self,
        images: list["PIL.Image.Image | np.ndarray"],
        do_resize: bool,
        resample: "PILImageResampling | None",
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
        return_tensors: str | None,
        **kwargs: Unpack[ImagesKwargs],
    ) -> BatchFeature:
        views, plans = [], []
        for image in images:
            is_picture = isinstance(image, PIL.Image.Image)
            height, width = (image.height, image.width) if is_picture else image.shape[-2:]
            plan = self.plan(height, width, **kwargs) if do_resize else SlicePlan((height, width))
            plans.append(plan)
            views += self._cut(image, plan, resample)
        arrays = []
        for view in views:
            if do_rescale:
                view = self.rescale(view, rescale_factor)
            if do_normalize:
                view = self.normalize(view, image_mean, image_std)
            arrays.append(view)
        data = {
            "pixel_values": np.stack(self.pad(arrays)),
            "image_sizes": np.array([view.shape[-2:] for view in arrays]),
            "num_views": np.array([plan.num_views for plan in plans]),
            "grids": np.array([plan.grid or (0, 0) for plan in plans]),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _cut(self, image: "PIL.Image.Image | np.ndarray", plan: SlicePlan, resample: Any) -> list[np.ndarray]:
        """The views of one picture, each `(3, height, width)`."""
        views = [self._resized(image, plan.overview, resample)]
        if plan.grid is None:
            return views
        (rows, columns), (height, width) = plan.grid, plan.tile
        refined = self._resized(image, (rows * height, columns * width), resample)
        return views + [
            refined[:, row * height : (row + 1) * height, column * width : (column + 1) * width]
            for row in range(rows)
            for column in range(columns)
        ]

    def _resized(self, image: "PIL.Image.Image | np.ndarray", size: Sequence[int], resample: Any) -> np.ndarray:
        if not isinstance(image, PIL.Image.Image) and image.shape[-2:] == tuple(size):
            return image
        return self.resize(image, SizeDict(height=size[0], width=size[1]), resample)


def check_slicing(slice_mode: str, max_slice_nums: int, scale_resolution: int, patch_size: int) -> None:
    """Raises `ValueError` for values that no picture can be sliced with."""
    if slice_mode not in SLICE_MODES:
        raise ValueError(f"slice_mode is one of {', '.join(SLICE_MODES)}, got {slice_mode!r}.")
    for name, value in (
        ("max_slice_nums", max_slice_nums),
        ("scale_resolution", scale_resolution),
        ("patch_size", patch_size),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")


__all__ = ["MiniCPMVImageProcessor"]
