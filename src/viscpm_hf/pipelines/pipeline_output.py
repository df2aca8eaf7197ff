from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class VisCPMPaintPipelineOutput(BaseOutput):
    """
    Output of the VisCPM-Paint pipelines.

    Args:
        images: PIL images, an array `(batch, height, width, 3)`, a tensor `(batch, 3, height, width)`, or latents.
        nsfw_content_detected: for every image whether it or its prompt was flagged; None where nothing was checked.
        flag_reasons: for every image why it was flagged, None if it wasn't; None where nothing was checked.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    nsfw_content_detected: list[bool] | None = None
    flag_reasons: list[str | None] | None = None
