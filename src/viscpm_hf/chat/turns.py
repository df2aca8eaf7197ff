"""What one turn of a conversation is, whoever answers it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from transformers import GenerationConfig

from ..modeling.generation_cpm_bee import RowSampling
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
    if (generation.get("num_return_sequences") or 1) != 1:
        raise ValueError(
            f"num_return_sequences is {generation['num_return_sequences']!r}, but a question gets one answer: ask "
            "it several times with other seeds, or call model.generate."
        )
    if generation.get("return_dict_in_generate"):
        raise ValueError("return_dict_in_generate is for model.generate; here the answer is what is returned.")


_ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def sampling(
    seeds: Sequence[int | None], generation: Mapping[str, Any], defaults: GenerationConfig, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Options for `generate` with which every row that has a seed draws by it alone, whatever is drawn elsewhere.

    Args:
        seeds: of the rows; None for any.
        generation, defaults: the call's options, and the model's.
    """
    samples = generation.get("do_sample", defaults.do_sample)
    if not samples or all(seed is None for seed in seeds):
        yield {}
    elif (generation.get("num_beams") or 1) == 1:
        chosen = [int(torch.randint(2**31, (1,))) if seed is None else seed for seed in seeds]
        drawing = RowSampling([torch.Generator(device).manual_seed(seed) for seed in chosen])
        yield {"logits_processor": [*(generation.get("logits_processor") or []), drawing]}
    else:
        # Beams are drawn together, by torch's generators for the whole process.
        with _ONE_AT_A_TIME, seeded(seeds[0], device):
            yield {}


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
