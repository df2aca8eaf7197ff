"""Checking images before anything is said about them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import torch


# The checker of the original, for images going into VisCPM-Chat and coming out of VisCPM-Paint.
DEFAULT_SAFETY_CHECKER = "CompVis/stable-diffusion-safety-checker"


def load_whole(model_class: type, name_or_path: str | os.PathLike, **kwargs: Any) -> torch.nn.Module:
    """`from_pretrained` of a checker or ranker, whose judgement is worth nothing with random weights in it.

    Raises:
        ValueError: if weights are missing in the file.
    """
    model, found = model_class.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    lost = sorted(found["missing_keys"]) + sorted(str(entry) for entry in found.get("mismatched_keys", ()))
    if lost:
        raise ValueError(
            f"{len(lost)} tensors of the {model_class.__name__} are missing or of another size, {lost[0]} for one."
        )
    return model.eval()


class UnsafeImageError(ValueError):
    """The safety checker flagged an image; nothing was said about it."""


class ImageSafetyChecker:
    """The Stable Diffusion safety checker as a function `image -> flagged or not`.

    Args:
        safety_checker: a diffusers `StableDiffusionSafetyChecker`.
        image_processor: its `CLIPImageProcessor`.
    """

    def __init__(self, safety_checker: torch.nn.Module, image_processor: Callable[..., Any]):
        self.safety_checker = safety_checker.eval()
        self.image_processor = image_processor

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike = DEFAULT_SAFETY_CHECKER,
        device: str | torch.device | None = None,
        **hub: Any,
    ) -> ImageSafetyChecker:
        """Loads the checker from a folder or Hub id; `hub` are `from_pretrained`'s arguments `token`, `cache_dir` ...

        Raises:
            OSError: if it can't be had; the message says where it was looked for and how to do without.
        """
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        try:
            model = load_whole(StableDiffusionSafetyChecker, name_or_path, **hub)
            processor = CLIPImageProcessor.from_pretrained(name_or_path, **hub)
        except (OSError, ValueError) as error:
            raise OSError(
                f"The image safety checker can't be loaded from {name_or_path}: {str(error).splitlines()[0]} Give a "
                "folder that holds it, or switch the check off (image_safety_checker=False)."
            ) from error
        return cls(model.to(device) if device is not None else model, processor)

    @torch.no_grad()
    def __call__(self, image: PIL.Image.Image) -> bool:
        """Whether the checker flags the image."""
        image = image.convert("RGB")
        inputs = self.image_processor(image, return_tensors="pt")
        parameter = next(self.safety_checker.parameters())
        pixels = np.asarray(image, dtype=np.float32)[None] / 255.0  # the checker blacks out its copy of it
        _, flagged = self.safety_checker(
            images=pixels, clip_input=inputs["pixel_values"].to(parameter.device, parameter.dtype)
        )
        return bool(flagged[0])


__all__ = ["DEFAULT_SAFETY_CHECKER", "ImageSafetyChecker", "UnsafeImageError", "load_whole"]
