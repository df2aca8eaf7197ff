"""The vocabulary of `viscpm-tiny`: special tokens, single characters, and the words of the demo world.

Everything else is written with the characters, and a character that is not here becomes an unknown token.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import texts

from viscpm_hf.tiny.phrases import PAINT_PHRASES, PAINT_PHRASES_WITH_PLACE, PHRASES
from viscpm_hf.tiny.words import CHINESE_CHARACTER, COLOURS, KINDS, NUMBERS, PLACES


SPECIALS = ["<pad>", "<unk>", "<mask>", "<sep>", "</n>", "</_>", "<s>", "</s>", "<root>", "<ans>", "<option>", "<eod>"]

# Keys of documents, and how a conversation's turns begin.
DOCUMENT_WORDS = ["image", "context", "question", "caption", "objects", "input", "User: ", "AI: "]

CHINESE_WORDS = [
    "图中", "图片", "图形", "图像", "形状", "颜色", "什么", "什么颜色", "什么形状", "什么图形", "哪里",
    "哪儿", "位置", "哪个", "几个", "多少个", "一共", "一个", "两个", "三个", "没有", "有没有", "不是",
    "是不是", "是的", "还是", "看到", "这是", "这个", "这张", "它是", "描述", "一下", "请用", "一句话",
    "说说", "那么", "画一个", "一张", "一幅", "里有", "里的", "翻译", "英文", "中文", "英语", "汉语", "成",
    "详细",
]  # fmt: skip


def english_words(phrases: list[str]) -> set[str]:
    """Every word as it begins a text, and with the space before it."""
    found = {word for text in phrases for word in re.findall("[A-Za-z']+", re.sub(r"\{\w+\}", " ", text))}
    found |= {word.capitalize() for word in found if word.islower()}
    return {form for word in found if len(word) > 1 for form in (word, f" {word}")} | {" a", " I"}


def make_vocabulary() -> list[str]:
    phrases = [text for kind in PHRASES.values() for language in kind.values() for text in language]
    for table in (PAINT_PHRASES, PAINT_PHRASES_WITH_PLACE, texts.TRANSLATE, texts.DETAILS, texts.ABOUT):
        phrases += [text for language in table.values() for text in language]
    phrases += [*texts.OTHER_WORDS, *texts.NOTHING_LIKE_IT.values()]
    names = [*KINDS.values(), *COLOURS.values(), *PLACES.values(), *NUMBERS.values()]
    for name in names:
        phrases += name.en
    phrases += [f"{word}s" for kind in KINDS.values() for word in kind.en]
    english = english_words([text for text in phrases if not CHINESE_CHARACTER.search(text)])
    chinese = set(CHINESE_WORDS) | {word for name in names for word in name.zh if len(word) > 1 and word != "0"}
    words = english | chinese | set(DOCUMENT_WORDS)
    characters = {chr(code) for code in range(33, 127)} | set("，。？！、：；（）“”的了吗呢和")
    characters |= {character for text in [*phrases, *words] for character in text if character != " "}
    return [*SPECIALS, *sorted(characters), *sorted(words - characters)]


def write_vocabulary(path: Path) -> int:
    """Writes `vocab.txt`, which another stage may be reading; returns the number of tokens."""
    tokens = make_vocabulary()
    whole = path.with_suffix(f".{os.getpid()}")
    whole.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    whole.replace(path)
    return len(tokens)
