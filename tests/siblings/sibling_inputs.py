"""Prompts of ids and pictures of noise, as the processors would hand them to the models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from reference import System
from torch.nn.functional import pad


@dataclass(frozen=True)
class Sample:
    """One prompt and its views, `(3, height, width)` each."""

    ids: list[int]
    views: list[torch.Tensor]


def view_sizes(system: System) -> list[tuple[int, int]]:
    """Sizes of views that the system takes; MiniCPM-V 2.0 takes any, also ones that no patch fits."""
    if "slice_mode" in system.config:
        return [(56, 56), (28, 98), (70, 45), (56, 56), (30, 100)]
    if system.name == "visualcla":
        side = system.config["vision_config"]["image_size"]
    else:
        side = system.config["image_size"]
    return [(side, side)] * 5


def sample(system: System, num_views: int = 1, num_words: int = 6, seed: int = 0) -> Sample:
    """A prompt with `num_views` views at its beginning and `num_words` ids behind."""
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(3, *size, generator=generator) for size in view_sizes(system)[:num_views]]
    words = torch.randint(3, 90, (num_words,), generator=generator).tolist()
    return Sample([1, *(token for _ in views for token in system.view_ids()), *words], views)


def model_inputs(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Left-padded, views one after the other and padded to the largest."""
    length = max(len(one.ids) for one in samples)
    inputs = {
        "input_ids": torch.tensor([[0] * (length - len(one.ids)) + one.ids for one in samples]),
        "attention_mask": torch.tensor([[0] * (length - len(one.ids)) + [1] * len(one.ids) for one in samples]),
    }
    views = [view for one in samples for view in one.views]
    if views:
        sizes = torch.tensor([view.shape[-2:] for view in views])
        height, width = sizes.amax(0).tolist()
        inputs["pixel_values"] = torch.stack(
            [pad(view, (0, width - view.shape[2], 0, height - view.shape[1])) for view in views]
        )
        inputs["image_sizes"] = sizes
        inputs["num_views"] = torch.tensor([len(one.views) for one in samples])
    return inputs
