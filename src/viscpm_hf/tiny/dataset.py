"""Conversations about pictures of the demo world, as records of a fine-tuning data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .questions import QUESTION_TYPES, make_question
from .scene import draw, make_scene, scene_rng
from .words import LANGUAGES


class ShapesDataset(Sequence):
    """`index -> {"id", "image", "conversations"}`: LLaVA-style records that are drawn when they are asked for.

    Args:
        split: `"train"`, `"validation"` or `"test"`.
        length: number of pictures.
        languages: of the questions, chosen anew for every conversation.
        types: of the questions, see `QUESTION_TYPES`.
        turns: questions per picture, each one after those before it.
        image_size: side of the picture, in pixels.
    """

    def __init__(
        self,
        split: str,
        length: int,
        languages: tuple[str, ...] = LANGUAGES,
        types: tuple[str, ...] = QUESTION_TYPES,
        turns: int = 1,
        image_size: int = 128,
    ):
        self.split, self.length, self.languages, self.types = split, length, tuple(languages), tuple(types)
        self.turns, self.image_size = turns, image_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(f"Picture {index} of {self.length}.")
        scene = make_scene(self.split, index)
        rng = scene_rng(self.split, index, "conversation")
        language = rng.choice(self.languages)
        turns: list[tuple[str, str]] = []
        while len(turns) < self.turns:
            question = make_question(scene, rng.choice(self.types), language, rng)
            if question is not None:
                turns += [*question.turns_before, (question.text, question.answer)]
        conversations = [
            {"from": speaker, "value": text}
            for turn in turns
            for speaker, text in zip(("human", "gpt"), turn, strict=True)
        ]
        return {
            "id": f"{self.split}-{index}",
            "image": draw(scene, self.image_size),
            "conversations": conversations,
        }
