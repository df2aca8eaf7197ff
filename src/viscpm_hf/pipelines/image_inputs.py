"""Images and masks as users of diffusers have them -> tensors: PIL images of every mode, arrays, tensors, latents."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch


# Modes of PIL that carry transparency, with the mode that lays it open.
ALPHA_MODES = {"RGBA": "RGBA", "RGBa": "RGBA", "LA": "RGBA", "La": "LA", "PA": "RGBA"}
WHITE = (255, 255, 255, 255)
# How far beyond its range a float may lie: resampling filters overshoot, and halves round.
TOLERANCE = 0.01


def read_images(
    images: Any, latent_channels: int | None = None, name: str = "image"
) -> "list[PIL.Image.Image | np.ndarray] | torch.Tensor":
    """Images of any kind, one or several.

    Args:
        images: PIL images, arrays and tensors (`(H, W)`, `(H, W, C)`, `(C, H, W)` or batches of them), or lists.
        latent_channels: channels of the latents, which tensors `(4, h, w)` and `(N, 4, h, w)` are; None where latents
            make no sense.
        name: of the argument, for errors.

    Returns:
        PIL images (mode RGB) and float32 arrays `(H, W, 3)` in 0..1; or latents `(N, C, h, w)`.

    Raises:
        ValueError: for what is no image; the message says why.
    """
    found: list[Any] = []
    latents: list[torch.Tensor] = []
    for value in _flatten(images, name):
        batch = _as_latents(value, latent_channels, name)
        if batch is not None:
            latents.append(batch)
        elif isinstance(value, PIL.Image.Image):
            found.append(_rgb(PIL.ImageOps.exif_transpose(value), name))
        else:
            found += [_rgb_of_array(array, name) for array in _arrays(value, name)]
    if not latents:
        return found
    if found or len({batch.shape[1:] for batch in latents}) > 1:
        raise ValueError(f"`{name}` mixes latents with pixels, or latents of several sizes: give them one by one.")
    return torch.cat(latents)


def read_masks(masks: Any, name: str = "mask_image") -> "list[PIL.Image.Image | np.ndarray]":
    """Masks of any kind, as [`read_images`]; PIL images (mode L) and float32 arrays `(H, W)`, 1 where to draw anew."""
    found: list[Any] = []
    for value in _flatten(masks, name):
        if isinstance(value, PIL.Image.Image):
            found.append(_grey(PIL.ImageOps.exif_transpose(value), name))
        else:
            found += [_grey_of_array(array, name) for array in _mask_arrays(value, name)]
    return found


def size_of(image: "PIL.Image.Image | np.ndarray") -> tuple[int, int]:
    """Height and width."""
    return (image.height, image.width) if isinstance(image, PIL.Image.Image) else image.shape[:2]


def to_pixels(images: "list[PIL.Image.Image | np.ndarray]", height: int, width: int) -> torch.Tensor:
    """`(N, 3 or 1, height, width)`, float32 in 0..1; other sizes are resized by Lanczos' filter, as diffusers does."""
    arrays = []
    for image in images:
        if size_of(image) != (height, width):
            image = _resize(image, height, width)
        array = np.asarray(image, dtype=np.float32)
        array = array / 255 if isinstance(image, PIL.Image.Image) else array
        arrays.append(array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0))
    return torch.from_numpy(np.ascontiguousarray(np.stack(arrays)))


def share_out(values: torch.Tensor, num_prompts: int, num_images: int, name: str) -> torch.Tensor:
    """One for all, one a prompt or one a result -> one a result."""
    check_share(len(values), num_prompts, num_images, name)
    return values.repeat_interleave(num_images // len(values), dim=0)


def check_share(count: int, num_prompts: int, num_images: int, name: str) -> None:
    if count not in (1, num_prompts, num_images):
        raise ValueError(
            f"{count} {name}s can't be shared out to {num_images} results of {num_prompts} prompts: give one for all, "
            "one a prompt, or one a result."
        )


# ------------------------------------------------------------------------------------------------------------ reading


def _flatten(values: Any, name: str) -> Iterator[Any]:
    if isinstance(values, (list, tuple)):
        if not values:
            raise ValueError(f"`{name}` is an empty list.")
        for value in values:
            yield from _flatten(value, name)
    elif isinstance(values, (PIL.Image.Image, np.ndarray, torch.Tensor)):
        yield values
    else:
        raise ValueError(
            f"`{name}` has to be PIL images, numpy arrays or torch tensors, one or a list, but holds "
            f"{type(values).__name__}."
        )


def _as_latents(value: Any, channels: int | None, name: str) -> torch.Tensor | None:
    """Latents `(N, C, h, w)`; None for anything else."""
    if channels is None or isinstance(value, PIL.Image.Image) or value.ndim not in (3, 4):
        return None
    is_first = value.shape[-3] == channels
    if not is_first or (isinstance(value, np.ndarray) and value.shape[-1] in (1, 3, 4)):
        return None
    value = torch.as_tensor(value)
    if not value.is_floating_point():
        raise ValueError(
            f"`{name}` has shape {tuple(value.shape)}, which is that of latents, but {value.dtype} numbers: latents "
            "are floats; pixels with transparency come channels last, (H, W, 4)."
        )
    if not torch.isfinite(value).all():
        raise ValueError(f"`{name}` is not finite.")
    return value[None] if value.ndim == 3 else value


def _arrays(value: "np.ndarray | torch.Tensor", name: str) -> list[np.ndarray]:
    """The images `(H, W, C)` of an array: a tensor's channels come first if they can, an array's last."""
    array = _numpy(value)
    if array.ndim not in (2, 3, 4):
        raise ValueError(f"`{name}` has shape {array.shape}: (H, W), (H, W, C), (C, H, W) or a batch (N, ...).")
    if array.ndim == 2:
        return [array[..., None]]
    is_first, is_last = array.shape[-3] in (1, 3, 4), array.shape[-1] in (1, 3, 4)
    if not is_first and not is_last:
        raise ValueError(f"`{name}` has shape {array.shape}: 1, 3 or 4 channels, first or last, are wanted.")
    if is_first and (isinstance(value, torch.Tensor) or not is_last):
        array = np.moveaxis(array, -3, -1)
    return list(array) if array.ndim == 4 else [array]


def _mask_arrays(value: "np.ndarray | torch.Tensor", name: str) -> list[np.ndarray]:
    """The masks `(H, W, C)` of an array; three dimensions without channels last are a batch, as in diffusers."""
    array = _numpy(value)
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        if len(array) == 3 and (array[:1] == array[1:]).all():  # three channels of one mask
            array = array[:1]
        return [mask[..., None] for mask in array]
    return _arrays(value, name)


def _numpy(value: "np.ndarray | torch.Tensor") -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    return value


def _unit(array: np.ndarray, name: str) -> np.ndarray:
    """Floats in 0..1 as they are, in -1..1 mapped to it."""
    array = array.astype(np.float32)
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if not np.isfinite([low, high]).all():
        raise ValueError(f"`{name}` is not finite.")
    if low < -1 - TOLERANCE or high > 1 + TOLERANCE:
        raise ValueError(
            f"`{name}` has floats from {low:.4g} to {high:.4g}: they have to be in 0..1 (or -1..1); bytes in 0..255 "
            "come as uint8."
        )
    if low < -TOLERANCE:
        if array.shape[-1] == 4:
            raise ValueError(f"`{name}` has four channels with floats from {low:.4g}: with transparency it is 0..1.")
        array = (array + 1) / 2
    return array.clip(0, 1)


# ------------------------------------------------------------------------------------------------------------- colours


def _rgb_of_array(array: np.ndarray, name: str) -> "PIL.Image.Image | np.ndarray":
    """`(H, W, 1, 3 or 4)` -> an image that [`to_pixels`] takes."""
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.dtype == np.uint8:
        return _rgb(_pil(array), name)
    if array.dtype == np.uint16:
        array = array.astype(np.float32) / 65535
    elif array.dtype.kind != "f":
        raise ValueError(
            f"`{name}` has {array.dtype} numbers: bytes in 0..255 come as uint8, numbers in 0..1 as floats."
        )
    array = _unit(array, name)
    if array.shape[-1] == 4:
        alpha = array[..., 3:]
        array = array[..., :3] * alpha + (1 - alpha)
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array


def _pil(array: np.ndarray) -> PIL.Image.Image:
    """Bytes `(H, W, 1, 3 or 4)` -> L, RGB or RGBA."""
    return PIL.Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array))


def _rgb(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """An image of any mode in RGB, transparency on white."""
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, WHITE), image).convert("RGB")
    image = _eight_bits(image, name)
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"`{name}` is an image of mode {image.mode}, which PIL can't convert to RGB.") from error


def _eight_bits(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """16 bits, 32 bits and floats as bytes; PIL itself cuts off what is above 255."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    array = np.asarray(image)
    low, high = float(array.min()), float(array.max())
    is_float = image.mode == "F"
    limit = 65535 if image.mode.startswith("I;16") or high > 255 else 1 if is_float and high <= 1 else 255
    if not np.isfinite([low, high]).all() or low < 0 or high > (255 if is_float else 65535):
        raise ValueError(
            f"`{name}` is an image of mode {image.mode} with numbers from {low:.4g} to {high:.4g}: 0..255 are wanted"
            f"{', or 0..1' if is_float else ', or 16 bits, 0..65535'}."
        )
    return PIL.Image.fromarray((array.astype(np.float64) * (255 / limit)).round().astype(np.uint8))


# --------------------------------------------------------------------------------------------------------------- masks


def _grey_of_array(array: np.ndarray, name: str) -> "PIL.Image.Image | np.ndarray":
    """`(H, W, 1, 3 or 4)` -> a mask that [`to_pixels`] takes."""
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.dtype.kind in "iu":
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > 255:
            raise ValueError(f"`{name}` has numbers from {low} to {high}: 0 and 1, or 0 to 255, are wanted.")
        return _grey(_pil((array * 255 if high <= 1 else array).astype(np.uint8)), name)
    array = array.astype(np.float32)
    low, high = float(array.min()), float(array.max())
    if not (low >= -TOLERANCE and high <= 255):  # refuses what isn't finite too
        raise ValueError(f"`{name}` has floats from {low:.4g} to {high:.4g}: 0..1, or 0..255, are wanted.")
    if array.shape[-1] == 4:
        raise ValueError(f"`{name}` has four channels: give one, white where something new is drawn.")
    return (array / 255 if high > 1 + TOLERANCE else array).clip(0, 1).mean(-1)


def _grey(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """A mask of any mode in L."""
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            raise ValueError(
                f"`{name}` is transparent in places, which may mean to draw there or not to: make it white where "
                "something new is drawn and black elsewhere."
            )
        image = image.convert("RGB")
    image = _eight_bits(image, name).convert("L")
    # Zeros and ones in bytes, as of an array: PIL's white is 255.
    return image.point(lambda value: value * 255) if image.getextrema()[1] == 1 else image


def _resize(image: "PIL.Image.Image | np.ndarray", height: int, width: int) -> "PIL.Image.Image | np.ndarray":
    lanczos = PIL.Image.Resampling.LANCZOS
    if isinstance(image, PIL.Image.Image):
        return image.resize((width, height), lanczos)
    planes = [image] if image.ndim == 2 else list(np.moveaxis(image, -1, 0))
    planes = [np.asarray(PIL.Image.fromarray(plane).resize((width, height), lanczos)) for plane in planes]
    return (planes[0] if image.ndim == 2 else np.stack(planes, axis=-1)).clip(0, 1)


__all__ = ["check_share", "read_images", "read_masks", "share_out", "size_of", "to_pixels"]
