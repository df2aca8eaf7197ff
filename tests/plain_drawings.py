"""Plain drawings of one flat shape, as anybody would make them with PIL: none of the package's code is in them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor, ImageDraw


SIDE = 224
PAINTS = {
    "red": ("#ff0000", "红"),
    "orange": ("#ff8c00", "橙"),
    "yellow": ("#ffe600", "黄"),
    "green": ("#00a000", "绿"),
    "cyan": ("#00e0e0", "青"),
    "blue": ("#0000ff", "蓝"),
    "purple": ("#800080", "紫"),
    "pink": ("#ff69b4", "粉"),
    "brown": ("#8b4513", "棕"),
    "black": ("#000000", "黑"),
}
FIGURES = {"circle": "圆", "square": "方", "triangle": "三角", "star": "星"}
SPOTS = {
    "left": (60, 112, "左"),
    "right": (164, 112, "右"),
    "top": (112, 60, "上"),
    "bottom": (112, 164, "下"),
}


@dataclass(frozen=True)
class Drawing:
    image: Image.Image
    figure: str
    paint: str
    spot: str


def draw_figure(figure: str, paint: str, centre: tuple[int, int], radius: int) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(image)
    x, y = centre
    colour = PAINTS[paint][0]
    if figure == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif figure == "square":
        pen.rectangle((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif figure == "triangle":
        pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=colour)
    else:
        spikes = []
        for step in range(10):
            reach = radius if step % 2 == 0 else radius * 0.4
            turn = math.pi * step / 5
            spikes.append((x + reach * math.sin(turn), y - reach * math.cos(turn)))
        pen.polygon(spikes, fill=colour)
    return image


def likest_drawing(image: Image.Image) -> tuple[str, str, str]:
    """Figure, paint and spot of the plain drawing that a picture of one shape is most like.

    The shape is what differs from the picture's corner; its outline is compared with every figure's in one box.
    """
    pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE)), dtype=float)
    covered = np.abs(pixels - pixels[2, 2]).max(-1) > 60
    left, top, right, bottom = _box(covered)
    x, y = (left + right) / 2, (top + bottom) / 2
    mean = pixels[covered].mean(0)
    paint = min(PAINTS, key=lambda name: float(np.abs(mean - ImageColor.getrgb(PAINTS[name][0])).sum()))
    figure = max(FIGURES, key=lambda name: _likeness(covered, _covered_by(name)))
    spot = min(SPOTS, key=lambda name: (x - SPOTS[name][0]) ** 2 + (y - SPOTS[name][1]) ** 2)
    return figure, paint, spot


def _covered_by(figure: str) -> np.ndarray:
    return np.asarray(draw_figure(figure, "black", (SIDE // 2, SIDE // 2), 60).convert("L")) < 128


def _box(covered: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom, the last two inclusive."""
    rows, columns = (np.flatnonzero(covered.any(axis)) for axis in (1, 0))
    return columns[0], rows[0], columns[-1], rows[-1]


def _likeness(first: np.ndarray, second: np.ndarray) -> float:
    boxes = []
    for covered in (first, second):
        left, top, right, bottom = _box(covered)
        boxes.append(np.asarray(Image.fromarray(covered[top : bottom + 1, left : right + 1]).resize((64, 64))))
    return float((boxes[0] & boxes[1]).sum() / (boxes[0] | boxes[1]).sum())


def drawings() -> Iterator[Drawing]:
    """Every figure in every colour; spots and sizes take turns."""
    spots = list(SPOTS)
    for number, (figure, paint) in enumerate((f, p) for f in FIGURES for p in PAINTS):
        spot = spots[number % len(spots)]
        x, y, _ = SPOTS[spot]
        yield Drawing(draw_figure(figure, paint, (x, y), 26 + 4 * (number % 6)), figure, paint, spot)
