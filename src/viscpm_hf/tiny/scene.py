"""Pictures of the demo world: one to three flat shapes on a light background, drawn with PIL.

Lengths are parts of the picture's side, from its top left corner. Every picture follows from a split's name and an
index. What lies where is drawn anew until it belongs to the split (see [`layout_split`]), so that no layout of the
validation and test pictures occurs in training.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageDraw

from .words import COLOURS, KINDS, SHADES


SPLITS = ("train", "validation", "test")
TEXTURES = ("plain", "plain", "gradient", "noise", "stripes", "dots")

MIN_SIZE = 0.2
MAX_SIZES = {1: 0.8, 2: 0.45, 3: 0.38}
MARGIN = 0.02

# Closer to the middle of an axis than the first a shape is in the middle, farther than the second on a side; between
# them nobody is asked.
MIDDLE = 0.05
SIDE = 0.12

# Background and shape must differ: pink and yellow come near to a light background.
MIN_CONTRAST = 70

SUPERSAMPLING = 4
CIRCLE_POINTS = 48


@dataclass(frozen=True)
class Shape:
    """`x`, `y`: middle of the bounding box, whose longer side is `size`. `points`: its outline, closed by itself."""

    kind: str
    colour: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    size: float
    points: tuple[tuple[float, float], ...]

    @property
    def place(self) -> frozenset[str] | None:
        """A key of `PLACES`, or None where people would disagree."""
        sides = [side(self.x, "left", "right"), side(self.y, "top", "bottom")]
        return None if None in sides else frozenset(name for name in sides if name)


@dataclass(frozen=True)
class Scene:
    shapes: tuple[Shape, ...]
    background: tuple[int, int, int]
    texture: str
    texture_seed: int

    def find(self, kind: str | None = None, colour: str | None = None) -> list[Shape]:
        """The shapes of a kind, of a colour, or of both."""
        return [s for s in self.shapes if kind in (None, s.kind) and colour in (None, s.colour)]


def side(position: float, low: str, high: str) -> str | None:
    """The side of an axis, `""` in its middle, None between the two."""
    offset = position - 0.5
    if abs(offset) <= MIDDLE:
        return ""
    if abs(offset) < SIDE:
        return None
    return low if offset < 0 else high


def outline(kind: str, rng: random.Random) -> list[tuple[float, float]]:
    """An outline of the kind, of any size and place: turned and stretched a little."""
    if kind == "circle":
        points = [(math.cos(angle), math.sin(angle)) for angle in _angles(CIRCLE_POINTS)]
        turn, stretch = 0.0, rng.uniform(0.97, 1.03)
    elif kind == "square":
        points = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
        turn, stretch = rng.choice((0, rng.uniform(-8, 8))), rng.uniform(0.93, 1.07)
    elif kind == "triangle":
        tip = rng.choice((0, 0, 0, rng.uniform(-1, 1)))
        points = [(tip, -1), (1, 1), (-1, 1)]
        turn, stretch = rng.choice((0, 0, rng.uniform(-10, 10), 180)), rng.uniform(0.8, 1.2)
    elif kind == "star":
        inner = rng.uniform(0.36, 0.52)
        points = [
            (math.sin(angle) * radius, -math.cos(angle) * radius)
            for angle, radius in zip(_angles(10), (1, inner) * 5, strict=True)
        ]
        turn, stretch = rng.choice((0, rng.uniform(-15, 15))), rng.uniform(0.95, 1.05)
    else:
        raise ValueError(f"The world has no {kind!r}; its shapes are {', '.join(KINDS)}.")
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    return [(stretch * (x * cos - y * sin), x * sin + y * cos) for x, y in points]


def _angles(count: int) -> list[float]:
    return [2 * math.pi * index / count for index in range(count)]


def make_shape(
    kind: str,
    colour: str,
    x: float,
    y: float,
    size: float,
    rng: random.Random,
    rgb: tuple[int, int, int] | None = None,
) -> Shape:
    """A shape whose bounding box has its middle at `x`, `y` and its longer side is `size`."""
    if colour not in COLOURS:
        raise ValueError(f"The world has no {colour!r}; its colours are {', '.join(COLOURS)}.")
    raw = outline(kind, rng)
    left, right = min(p[0] for p in raw), max(p[0] for p in raw)
    top, bottom = min(p[1] for p in raw), max(p[1] for p in raw)
    scale = size / max(right - left, bottom - top)
    points = tuple((x + (px - (left + right) / 2) * scale, y + (py - (top + bottom) / 2) * scale) for px, py in raw)
    return Shape(kind, colour, rgb or shade(colour, rng), x, y, size, points)


def shade(colour: str, rng: random.Random) -> tuple[int, int, int]:
    first, second, share = rng.choice(SHADES[colour]), rng.choice(SHADES[colour]), rng.random()
    mixed = [a * share + b * (1 - share) + rng.uniform(-8, 8) for a, b in zip(first, second, strict=True)]
    red, green, blue = (min(255, max(0, round(value))) for value in mixed)
    return red, green, blue


def contrast(first: tuple[int, int, int], second: tuple[int, int, int]) -> float:
    return math.dist(first, second)


def random_scene(rng: random.Random, num_shapes: int | None = None, textures: tuple[str, ...] = TEXTURES) -> Scene:
    """One to three shapes that neither touch nor are of the same kind and colour both."""
    while True:
        count = num_shapes or rng.choices((1, 2, 3), (4, 3, 3))[0]
        level = 255 if rng.random() < 0.3 else rng.randint(215, 252)
        tint = 0 if level == 255 else 10
        red, green, blue = (min(255, level + rng.randint(-tint, tint)) for _ in range(3))
        shapes: list[Shape] = []
        for _ in range(30):
            shape = _random_shape(rng, count)
            if contrast(shape.rgb, (red, green, blue)) >= MIN_CONTRAST and all(_fit(shape, s) for s in shapes):
                shapes.append(shape)
            if len(shapes) == count:
                return Scene(tuple(shapes), (red, green, blue), rng.choice(textures), rng.getrandbits(32))


def _random_shape(rng: random.Random, count: int) -> Shape:
    size = rng.uniform(MIN_SIZE, MAX_SIZES[count])
    reach = 0.5 - MARGIN - size / 2
    # Now and then exactly in the middle of an axis, where chance alone seldom puts a shape.
    x, y = (0.5 if rng.random() < 0.12 else 0.5 + rng.uniform(-reach, reach) for _ in range(2))
    return make_shape(rng.choice(tuple(KINDS)), rng.choice(tuple(COLOURS)), x, y, size, rng)


def _fit(a: Shape, b: Shape) -> bool:
    """Whether two shapes are told apart: not twins, a gap between their bounding boxes."""
    gap = (a.size + b.size) / 2 + MARGIN
    return (a.kind, a.colour) != (b.kind, b.colour) and max(abs(a.x - b.x), abs(a.y - b.y)) >= gap


def layout_split(scene: Scene) -> str:
    """The split that a layout belongs to: places and sizes of all shapes, on a grid of 1/16, decide."""
    grid = sorted((round(s.x * 16), round(s.y * 16), round(s.size * 16)) for s in scene.shapes)
    slot = zlib.crc32(repr(grid).encode()) % 10
    return {0: "validation", 1: "test"}.get(slot, "train")


def scene_rng(split: str, index: int, purpose: str = "scene") -> random.Random:
    """The random numbers that everything of one picture is drawn with."""
    if split not in SPLITS:
        raise ValueError(f"The world's splits are {', '.join(SPLITS)}, got {split!r}.")
    return random.Random(f"{purpose}/{split}/{index}")


def make_scene(split: str, index: int, num_shapes: int | None = None, textures: tuple[str, ...] = TEXTURES) -> Scene:
    """The scene `index` of a split, always the same one."""
    rng = scene_rng(split, index)
    while layout_split(scene := random_scene(rng, num_shapes, textures)) != split:
        pass
    return scene


def draw(scene: Scene, size: int = 128) -> PIL.Image.Image:
    """The scene as an RGB picture of `size` × `size` pixels, with smooth edges."""
    if size < 1:
        raise ValueError(f"A picture has at least 1 pixel a side, got {size}.")
    background = _background(scene, size)
    if not scene.shapes:
        return background
    large = background.resize((size * SUPERSAMPLING,) * 2, PIL.Image.Resampling.NEAREST)
    pen = PIL.ImageDraw.Draw(large)
    for shape in scene.shapes:
        pen.polygon([(x * large.width, y * large.height) for x, y in shape.points], fill=shape.rgb)
    return large.reduce(SUPERSAMPLING)


def _background(scene: Scene, size: int) -> PIL.Image.Image:
    if scene.texture == "plain":
        return PIL.Image.new("RGB", (size, size), scene.background)
    rng = np.random.default_rng(scene.texture_seed)
    across, down = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size))
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(4, 12)
    along = across * np.cos(angle) + down * np.sin(angle)
    if scene.texture == "gradient":
        pattern = along * 2
    elif scene.texture == "noise":
        pattern = rng.normal(size=(size, size)) * 0.6
    elif scene.texture == "stripes":
        pattern = np.sign(np.sin(along * 2 * np.pi * rng.integers(4, 12)))
    else:
        count = 2 * np.pi * rng.integers(4, 10)
        pattern = np.sin(across * count) * np.sin(down * count) > 0.6
    pixels = np.asarray(scene.background, dtype=np.float32) - strength * pattern[..., None].astype(np.float32)
    return PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
