"""The siblings by a name of their own: [`VisCPMChat`] is any of them, whatever its path says."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import PIL.Image

from ..modeling.chat_processing import EncodedImage
from .chat import VisCPMChat


class SiblingChat(VisCPMChat):
    """[`VisCPMChat`] with arguments in another order: those of original files aren't there.

    ```python
    >>> from viscpm_hf import SiblingChat

    >>> chat = SiblingChat("openbmb/MiniCPM-V-2")
    >>> answer, context, image = chat.chat("figures/vision.png", "这张图片里有什么？")
    >>> answer, context, image = chat.chat(None, "它是什么颜色的？", context, image)
    ```
    """

    def __init__(
        self,
        model_path: str | os.PathLike,
        image_safety_checker: bool | str | os.PathLike | Callable[[PIL.Image.Image], bool] = False,
        **options: Any,
    ):
        super().__init__(model_path, None, image_safety_checker, **options)


__all__ = ["EncodedImage", "SiblingChat"]
