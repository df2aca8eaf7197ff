"""What each stage of training is shown: endless rows of lessons, every one drawn from a seed and its index."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace

import texts
from torch.utils.data import Dataset

from viscpm_hf.shapes import LANGUAGES, QUESTION_TYPES, Scene, draw, make_question
from viscpm_hf.tiny.questions import in_order
from viscpm_hf.tiny.scene import layout_split, random_scene
from viscpm_hf.training.records import ChatRecord, ChatSample


# The sides of the pictures before they are made the model's; mostly its own, which draws fastest.
PICTURE_SIZES = (64, 64, 64, 128)

LONG_TYPES = ("description", "follow_up")
SHORT_TYPES = tuple(name for name in QUESTION_TYPES if name not in LONG_TYPES)


class Lesson(ChatRecord):
    """The samples of one step: of like length, so that little of the batch is padding."""

    def __init__(self, samples: list[ChatSample]):
        super().__init__([(sample.question, sample.answer) for sample in samples])
        object.__setattr__(self, "samples", samples)


class Lessons(Dataset):
    """`index -> Lesson`.

    Args:
        make: a lesson from a random number generator.
        length: number of lessons; their order depends on it.
        seed: of all lessons; another stage has another.
    """

    def __init__(self, make: Callable[[random.Random], list[ChatSample]], length: int, seed: str):
        self.make, self.length, self.seed = make, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Lesson:
        return Lesson(self.make(random.Random(f"{self.seed}/{index}")))


def text_lesson(rng: random.Random, size: int = 64) -> list[ChatSample]:
    """Texts of one kind."""
    make = rng.choice(texts.KINDS_OF_TEXT)
    count = rng.choices((1, 2, 3), (4, 3, 3))[0]
    samples: list[ChatSample] = []
    while len(samples) < size:
        samples += make(rng, count)
    return samples


def picture_lesson(
    rng: random.Random,
    languages: tuple[str, ...] = LANGUAGES,
    weights: tuple[float, ...] | None = None,
    details: float = 0.3,
    pictures: int = 32,
    questions: int = 2,
    talked: float = 0.0,
    hard: Mapping[str, float] | None = None,
) -> list[ChatSample]:
    """Questions about pictures of the training split. In one lesson all have short answers or all have long ones, and
    all come late in conversations or none does.

    Args:
        languages, weights: which languages, and how often each.
        details: share of the lessons that ask for shapes with their places.
        pictures, questions: number of pictures, and of the questions about each.
        talked: share of the lessons whose questions come after one to four others, which have nothing to do with them.
        hard: how many times as often as the others some types are asked for.
    """
    frequencies = dict.fromkeys(QUESTION_TYPES, 1.0) | dict(hard or {})
    asks_details, talks = rng.random() < details, rng.random() < talked
    (types,) = rng.choices(
        (SHORT_TYPES, LONG_TYPES), [sum(frequencies[name] for name in kind) for kind in (SHORT_TYPES, LONG_TYPES)]
    )
    samples: list[ChatSample] = []
    for _ in range(pictures):
        while layout_split(scene := random_scene(rng)) != "train":
            pass
        picture = draw(scene, rng.choice(PICTURE_SIZES))
        asked = 0
        while asked < (1 if asks_details else questions):
            (language,) = rng.choices(languages, weights)
            if asks_details:
                sample = texts.detail(in_their_order(scene), language, rng)
            else:
                (type,) = rng.choices(types, [frequencies[name] for name in types])
                sample = question(scene, language, type, rng)
            if sample is not None:
                before = talk(scene, language, rng) if talks else ""
                samples.append(replace(sample, images=(picture,), context=before + sample.context))
                asked += 1
    return samples


def in_their_order(scene: Scene) -> Scene:
    return replace(scene, shapes=in_order(scene.shapes))


def question(scene: Scene, language: str, type: str, rng: random.Random) -> ChatSample | None:
    made = make_question(scene, type, language, rng)
    return made and ChatSample(made.text, made.answer, texts.turns_as_context(made.turns_before))


def talk(scene: Scene, language: str, rng: random.Random) -> str:
    """The context of a conversation about the picture, mostly in one language."""
    turns, count = [], rng.randint(1, 4)
    while len(turns) < count:
        spoken = language if rng.random() < 0.8 else rng.choice(LANGUAGES)
        if made := make_question(scene, rng.choice(QUESTION_TYPES), spoken, rng):
            turns += [*made.turns_before, (made.text, made.answer)]
    return texts.turns_as_context(turns)
