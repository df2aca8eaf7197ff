"""The names of the demo world: kinds of shapes, colours and places, in English and Chinese."""

from __future__ import annotations

import re
from dataclasses import dataclass


LANGUAGES = ("en", "zh")

# A character of Chinese text; the world's words need no rarer ones.
CHINESE_CHARACTER = re.compile("[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Name:
    """What a kind, colour or place is called. The first word of a language is the one that answers use."""

    en: tuple[str, ...]
    zh: tuple[str, ...]

    def words(self, language: str) -> tuple[str, ...]:
        return self.en if language == "en" else self.zh


KINDS = {
    "circle": Name(("circle",), ("圆形", "圆")),
    "square": Name(("square",), ("正方形", "方形", "方块")),
    "triangle": Name(("triangle",), ("三角形", "三角")),
    "star": Name(("star",), ("五角星", "星形", "星星")),
}

COLOURS = {
    "red": Name(("red",), ("红色",)),
    "orange": Name(("orange",), ("橙色", "橘色")),
    "yellow": Name(("yellow",), ("黄色",)),
    "green": Name(("green",), ("绿色",)),
    "cyan": Name(("cyan", "turquoise"), ("青色",)),
    "blue": Name(("blue",), ("蓝色",)),
    "purple": Name(("purple", "violet"), ("紫色",)),
    "pink": Name(("pink",), ("粉色", "粉红色")),
    "brown": Name(("brown",), ("棕色", "褐色")),
    "black": Name(("black",), ("黑色",)),
}

# Shades of each colour; a shape's own is a mixture of two of them. The plain ones that drawing programs use are here.
SHADES = {
    "red": ((255, 0, 0), (220, 20, 40), (230, 45, 35)),
    "orange": ((255, 165, 0), (255, 128, 0), (240, 140, 30)),
    "yellow": ((255, 255, 0), (255, 220, 0), (235, 225, 60)),
    "green": ((0, 128, 0), (0, 255, 0), (60, 180, 75), (20, 110, 50)),
    "cyan": ((0, 255, 255), (0, 205, 215), (60, 220, 215)),
    "blue": ((0, 0, 255), (30, 90, 230), (0, 0, 150), (65, 105, 225)),
    "purple": ((128, 0, 128), (150, 60, 210), (110, 20, 160)),
    "pink": ((255, 192, 203), (255, 105, 180), (250, 150, 190)),
    "brown": ((165, 42, 42), (139, 69, 19), (115, 70, 35)),
    "black": ((0, 0, 0), (35, 35, 35)),
}

# Where a shape lies: its place on each axis that is not the middle; nothing at all is the middle of both.
PLACES = {
    frozenset(): Name(("in the middle", "in the center", "in the centre"), ("中间", "中央", "正中间")),
    frozenset({"left"}): Name(("on the left", "on the left side"), ("左边", "左侧")),
    frozenset({"right"}): Name(("on the right", "on the right side"), ("右边", "右侧")),
    frozenset({"top"}): Name(("at the top",), ("上面", "上方", "顶部")),
    frozenset({"bottom"}): Name(("at the bottom",), ("下面", "下方", "底部")),
    frozenset({"top", "left"}): Name(("at the top left", "in the upper left"), ("左上角", "左上方")),
    frozenset({"top", "right"}): Name(("at the top right", "in the upper right"), ("右上角", "右上方")),
    frozenset({"bottom", "left"}): Name(("at the bottom left", "in the lower left"), ("左下角", "左下方")),
    frozenset({"bottom", "right"}): Name(("at the bottom right", "in the lower right"), ("右下角", "右下方")),
}

# How each side is recognised in an answer; longer phrases are built of these.
SIDES = {
    "left": Name(("left",), ("左",)),
    "right": Name(("right",), ("右",)),
    "top": Name(("top", "upper"), ("上", "顶")),
    "bottom": Name(("bottom", "lower"), ("下", "底")),
}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}

NUMBERS = {
    0: Name(("none", "no", "zero", "0"), ("没有", "零个", "0")),
    1: Name(("one", "1"), ("一个", "1")),
    2: Name(("two", "2"), ("两个", "二", "2")),
    3: Name(("three", "3"), ("三个", "3")),
}


def language_of(text: str) -> str:
    """`"zh"` if the text has a Chinese character, else `"en"`."""
    return "zh" if CHINESE_CHARACTER.search(text) else "en"


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def phrase(colour: str, kind: str, language: str, colour_word: str | None = None, kind_word: str | None = None) -> str:
    """`"red circle"` or `"红色的圆形"`, in the answers' words unless others are given."""
    colour_word = colour_word or COLOURS[colour].words(language)[0]
    kind_word = kind_word or KINDS[kind].words(language)[0]
    return f"{colour_word} {kind_word}" if language == "en" else f"{colour_word}的{kind_word}"
