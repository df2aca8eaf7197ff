"""Rules that tell a right answer and a right painting; numpy and PIL only.

Answers are judged by what they say, not by their wording. In a painting the background is the border's colour, what
differs from it most clearly is the shape; its colour, its outline and its place must be those of the prompt.
"""

from __future__ import annotations

import colorsys
import functools
import random
import re
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageDraw

from .prompts import PaintPrompt
from .questions import Question
from .scene import outline
from .words import COLOURS, KINDS, LANGUAGES, NUMBERS, OPPOSITE, SHADES, SIDES, Name, language_of


YES = Name(("yes",), ("是的", "对", "有", "是", "在", "看到了"))
NO = Name(("no", "not", "isn't", "none"), ("不", "没"))

# A painting's side while it is judged, in pixels; outlines are compared on a grid of OUTLINE_SIZE.
JUDGED_SIZE = 64
OUTLINE_SIZE = 32
MIN_REGION = 0.01
MIN_OVERLAP = 0.75
# Largest distance of the painted shape's middle from the line between two places, on the wrong side.
PLACE_TOLERANCE = 0.05


@dataclass(frozen=True)
class AnswerVerdict:
    """Whether an answer says the right thing, and in the question's language."""

    is_right_content: bool
    is_right_language: bool

    @property
    def is_right(self) -> bool:
        return self.is_right_content and self.is_right_language


def check_answer(question: Question, answer: str) -> AnswerVerdict:
    """Judges an answer by its content, in whichever language it is."""
    answer = answer.strip().lower()
    is_right = bool(answer) and _CHECKS[question.asks](question.facts, answer)
    return AnswerVerdict(is_right, bool(answer) and language_of(answer) == question.language)


def _mentioned(names: dict, text: str) -> list[tuple[int, object]]:
    """`(position, key)` of every name in the text, the longest name winning where several match."""
    found = []
    for language in LANGUAGES:
        words = {word: key for key, name in names.items() for word in name.words(language)}
        pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
        bounds = (r"\b(?:", r")(?:e?s)?\b") if language == "en" else ("(?:", ")")
        for match in re.finditer(bounds[0] + f"({pattern})" + bounds[1], text):
            found.append((match.start(), words[match.group(1)]))
    return sorted(found, key=lambda entry: entry[0])


def _keys(names: dict, text: str) -> set:
    return {key for _, key in _mentioned(names, text)}


def _is_truth(facts: frozenset, answer: str) -> bool:
    says_no = _keys({False: NO}, answer) != set()
    says_yes = not says_no and _keys({True: YES}, answer) != set()
    return (says_yes if True in facts else says_no) and (says_yes or says_no)


def _is_number(facts: frozenset, answer: str) -> bool:
    return _keys(NUMBERS, answer) == set(facts)


def _is_place(facts: frozenset, answer: str) -> bool:
    """No side at all is the middle, but then the answer must say so."""
    says_middle = re.search("middle|cent|中", answer) is not None
    return _keys(SIDES, answer) == set(facts) and (bool(facts) or says_middle)


def _is_side(facts: frozenset, answer: str) -> bool:
    (wanted,) = facts
    found = _keys(SIDES, answer)
    return wanted in found and OPPOSITE[wanted] not in found


def _is_pairs(facts: frozenset, answer: str) -> bool:
    """Every colour belongs to the kind that comes next."""
    pairs, colour = [], None
    marks = [(at, ("colour", key)) for at, key in _mentioned(COLOURS, answer)]
    marks += [(at, ("kind", key)) for at, key in _mentioned(KINDS, answer)]
    for _, (what, key) in sorted(marks):
        if what == "colour":
            colour = key
        else:
            pairs.append((colour, key))
            colour = None
    return len(pairs) == len(facts) and set(pairs) == set(facts)


_CHECKS = {
    "colour": lambda facts, answer: _keys(COLOURS, answer) == set(facts),
    "kind": lambda facts, answer: _keys(KINDS, answer) == set(facts),
    "number": _is_number,
    "place": _is_place,
    "side": _is_side,
    "truth": _is_truth,
    "pairs": _is_pairs,
}


# --------------------------------------------------------------------------------------------------------- paintings


@dataclass(frozen=True)
class PaintingVerdict:
    """What a painting shows, and whether that is what was asked for."""

    colour: str | None
    kind: str | None
    overlap: float
    """Of the painted outline with the kind's own, 1 where they are equal."""
    x: float
    y: float
    is_right_colour: bool
    is_right_kind: bool
    is_right_place: bool
    """True if the prompt names no place."""

    @property
    def is_right(self) -> bool:
        return self.is_right_colour and self.is_right_kind and self.is_right_place


def check_painting(prompt: PaintPrompt, image: PIL.Image.Image) -> PaintingVerdict:
    """Judges a painting by its largest region that differs from the border's colour."""
    pixels = np.asarray(image.convert("RGB").resize((JUDGED_SIZE,) * 2, PIL.Image.Resampling.BOX), dtype=np.float32)
    region = painted_region(pixels)
    if region.mean() < MIN_REGION:
        return PaintingVerdict(None, None, 0.0, 0.5, 0.5, False, False, False)
    colour = nearest_colour(np.median(pixels[_inside(region)], axis=0))
    kind, overlap = nearest_kind(region)
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    x = (columns[0] + columns[-1] + 1) / 2 / JUDGED_SIZE
    y = (rows[0] + rows[-1] + 1) / 2 / JUDGED_SIZE
    return PaintingVerdict(
        colour,
        kind,
        overlap,
        x,
        y,
        is_right_colour=colour == prompt.colour,
        is_right_kind=kind == prompt.kind and overlap >= MIN_OVERLAP,
        is_right_place=prompt.place is None or _is_there(prompt.place, x, y),
    )


def painted_region(pixels: np.ndarray) -> np.ndarray:
    """`(side, side, 3)` -> bool `(side, side)`: the largest connected region unlike the background."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    distance = np.linalg.norm(pixels - background, axis=-1)
    # Half way between background and shape, but above the texture's own variation.
    threshold = max(30.0, np.percentile(distance, 99) / 2)
    return largest_region(distance > threshold)


def largest_region(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected region of a mask; all False if there is none."""
    best = np.zeros_like(mask)
    rest = mask.copy()
    while rest.sum() > best.sum():
        region = np.zeros_like(mask)
        region.flat[np.flatnonzero(rest)[0]] = True
        size = 0
        while region.sum() != size:
            size = region.sum()
            region = _spread(region) & rest
        rest &= ~region
        if size > best.sum():
            best = region
    return best


def _spread(region: np.ndarray) -> np.ndarray:
    spread = region.copy()
    spread[1:] |= region[:-1]
    spread[:-1] |= region[1:]
    spread[:, 1:] |= region[:, :-1]
    spread[:, :-1] |= region[:, 1:]
    return spread


def _inside(region: np.ndarray) -> np.ndarray:
    """The region without its edge, whose pixels are mixtures; the region itself where nothing else is left."""
    inside = ~_spread(~region)
    return inside if inside.any() else region


def nearest_colour(rgb: np.ndarray) -> str:
    """The colour with the nearest shade, dark and light counting less than the hue."""
    point = _colour_point(rgb)

    def distance(colour: str) -> float:
        return min(float(np.linalg.norm(point - _colour_point(shade))) for shade in _shades(colour))

    return min(COLOURS, key=distance)


def _shades(colour: str) -> list[np.ndarray]:
    """The named shades and what lies between them, which the scenes use too."""
    shades = [np.array(shade, dtype=np.float32) for shade in SHADES[colour]]
    return [
        first * share + second * (1 - share) for first in shades for second in shades for share in (0.0, 0.25, 0.5)
    ]


def _colour_point(rgb) -> np.ndarray:
    red, green, blue = (float(value) / 255 for value in rgb)
    hue, _, _ = colorsys.rgb_to_hsv(red, green, blue)
    chroma = max(red, green, blue) - min(red, green, blue)
    angle = 2 * np.pi * hue
    return np.array([1.5 * chroma * np.cos(angle), 1.5 * chroma * np.sin(angle), red, green, blue])


def nearest_kind(region: np.ndarray) -> tuple[str, float]:
    """The kind whose outline overlaps the region most when both fill the same square, and by how much."""
    fitted = _fit(region)
    scores = {}
    for kind, templates in _templates().items():
        union = (templates | fitted).sum((1, 2))
        scores[kind] = float(((templates & fitted).sum((1, 2)) / union).max())
    best = max(scores, key=scores.get)
    return best, scores[best]


def _fit(region: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    box = region[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = PIL.Image.fromarray(box.astype(np.uint8) * 255)
    return np.asarray(image.resize((OUTLINE_SIZE,) * 2, PIL.Image.Resampling.BILINEAR)) > 127


@functools.cache
def _templates(count: int = 120) -> dict[str, np.ndarray]:
    """`count` outlines of every kind, bool `(count, OUTLINE_SIZE, OUTLINE_SIZE)`."""
    templates = {}
    for kind in KINDS:
        rng = random.Random(kind)
        drawn = []
        for _ in range(count):
            image = PIL.Image.new("L", (256, 256))
            points = [(128 + 80 * x, 128 + 80 * y) for x, y in outline(kind, rng)]
            PIL.ImageDraw.Draw(image).polygon(points, fill=255)
            drawn.append(_fit(np.asarray(image) > 127))
        templates[kind] = np.stack(drawn)
    return templates


def _is_there(place: frozenset[str], x: float, y: float) -> bool:
    """Sides reach to the middle line; the middle of an axis is its inner half."""
    for position, low, high in ((x, "left", "right"), (y, "top", "bottom")):
        offset = position - 0.5
        wanted = place & {low, high}
        if not wanted and abs(offset) > 0.15:
            return False
        if low in wanted and offset > -PLACE_TOLERANCE or high in wanted and offset < PLACE_TOLERANCE:
            return False
    return True
