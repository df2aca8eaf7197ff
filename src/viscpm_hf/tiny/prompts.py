"""Prompts for VisCPM-Paint: one shape, its colour and, if named, its place."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .phrases import PAINT_PHRASES, PAINT_PHRASES_WITH_PLACE
from .scene import TEXTURES, Scene, make_scene, scene_rng
from .words import COLOURS, KINDS, LANGUAGES, PLACES, phrase, with_article


@dataclass(frozen=True)
class PaintPrompt:
    """`place` is a key of `PLACES`, None where the prompt leaves it open."""

    language: str
    text: str
    kind: str
    colour: str
    place: frozenset[str] | None = None


def word_prompt(
    kind: str, colour: str, place: frozenset[str] | None, language: str, rng: random.Random | None = None
) -> PaintPrompt:
    """The prompt in words: with `rng` any of the phrasings and names, without it the plainest."""
    if kind not in KINDS or colour not in COLOURS or language not in LANGUAGES:
        raise ValueError(f"The world has no {colour!r} {kind!r} in {language!r}.")

    def choose(words: tuple[str, ...]) -> str:
        return words[0] if rng is None or rng.random() < 0.6 else rng.choice(words)

    words = (choose(COLOURS[colour].words(language)), choose(KINDS[kind].words(language)))
    it = phrase(colour, kind, language, *words)
    templates = (PAINT_PHRASES if place is None else PAINT_PHRASES_WITH_PLACE)[language]
    where = "" if place is None else choose(PLACES[place].words(language))
    return PaintPrompt(
        language, choose(templates).format(it=it, one=with_article(it), place=where), kind, colour, place
    )


def prompt_of(scene: Scene, language: str, rng: random.Random, place_share: float = 0.7) -> PaintPrompt:
    """A prompt that the scene's only shape answers; it names the place in `place_share` of all cases that have one."""
    (shape,) = scene.shapes
    place = shape.place if rng.random() < place_share else None
    return word_prompt(shape.kind, shape.colour, place, language, rng)


def make_paint_example(
    split: str, index: int, language: str, textures: tuple[str, ...] = TEXTURES
) -> tuple[Scene, PaintPrompt]:
    """A scene of one shape and its prompt, always the same for a split and an index."""
    scene = make_scene(split, index, num_shapes=1, textures=textures)
    return scene, prompt_of(scene, language, scene_rng(split, index, f"paint/{language}"))


def judged_prompts(language: str, count: int, seed: int = 0) -> list[PaintPrompt]:
    """Prompts to judge a model by: every kind, colour and place, as evenly as `count` allows, half with a place."""
    rng = random.Random(f"paint/test/{language}/{seed}")
    pairs = [(kind, colour) for kind in KINDS for colour in COLOURS]
    places = list(PLACES)
    prompts = []
    for index in range(count):
        if index % len(pairs) == 0:
            rng.shuffle(pairs)
        kind, colour = pairs[index % len(pairs)]
        place = places[(index // 2) % len(places)] if index % 2 else None
        prompts.append(word_prompt(kind, colour, place, language, rng))
    return prompts
