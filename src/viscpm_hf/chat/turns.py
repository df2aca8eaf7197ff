"""What one turn of a conversation is, whoever answers it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch

from ..modeling.image_processing_viscpm import VisCPMImageProcessor


MODES = ("reference", "generate")


REFUSAL = (
    "抱歉，安全检查未通过这张图片，无法回答。 / "
    "Sorry, this image did not pass the safety check, so it is not answered."
)


@dataclass(frozen=True)
class ChatTurn:
    """One answered question."""

    question: str
    answer: str
    """For people: special tokens by name, every `<` once."""
    context: str
    """The conversation so far, this turn included, in document syntax: hand it to the next turn."""
    vision_hidden_states: torch.Tensor | None
    """`(images, queries, hidden)`: the encoded image, for the next turn."""
    num_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


def open_picture(image: Any, image_processor: VisCPMImageProcessor) -> PIL.Image.Image:
    """A path, bytes or picture -> picture, with the image processor's checks."""
    picture = image_processor.fetch_images(image)
    if not isinstance(picture, PIL.Image.Image):
        raise ValueError(f"An image is a path or a PIL image, got {type(image).__name__}.")
    return picture


def check_generation(generation: Mapping[str, Any]) -> None:
    """Checks what `generate` would take silently or fail on deep inside."""
    value = generation.get("max_new_tokens")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"max_new_tokens must be a whole number of at least 1, got {value!r}.")


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators, and leaves them afterwards as they were; does nothing without a seed."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
