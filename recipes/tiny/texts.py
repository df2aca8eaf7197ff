"""Text without pictures: scenes told in words with questions about them, and translations.

From these the language model learns both languages of the demo world, and that they speak of the same things, before
it has seen any picture.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from viscpm_hf.shapes import (
    COLOURS,
    KINDS,
    LANGUAGES,
    PLACES,
    QUESTION_TYPES,
    Scene,
    make_question,
    make_shape,
    word_prompt,
)
from viscpm_hf.tiny.phrases import PHRASES
from viscpm_hf.tiny.questions import colour_answer, description, kind_answer, place_answer
from viscpm_hf.tiny.scene import MIN_SIZE
from viscpm_hf.tiny.words import phrase, with_article
from viscpm_hf.training.records import ChatSample


# What a question wants translated follows it.
TRANSLATE = {
    "en": ("Translate into English: ", "What does this mean in English? "),
    "zh": ("翻译成中文：", "用中文说："),
}
# What describes every shape with its place; only the recipe asks this, for it teaches most from one picture.
DETAILS = {
    "en": ("Describe the picture in detail.", "Say what is where."),
    "zh": ("详细描述这张图片。", "说说什么在哪里。"),
}
# Another question of the recipe alone: what a question names has to be found, and everything about it told.
ABOUT = {
    "en": ("Tell me about the {it}.", "What about every {it}?"),
    "zh": ("说说{it}。", "讲讲{it}。"),
}
NOTHING_LIKE_IT = {"en": "There is none.", "zh": "没有。"}
OTHER_WORDS = ["There is a", "There are an", "Yes", "No", "None", "and", "A", "An", "In", "OK"]


@dataclass(frozen=True)
class CaptionSample(ChatSample):
    """A question about a text that stands where VisCPM-Paint has its prompt."""

    def document(self) -> dict[str, str]:
        return {"caption": self.context, "objects": "", "question": self.question, "<ans>": self.answer}


def told_in_words(scene: Scene, language: str) -> str:
    """Every shape with its place, where that is beyond doubt."""
    parts = []
    for shape in scene.shapes:
        words = phrase(shape.colour, shape.kind, language)
        place = "" if shape.place is None else PLACES[shape.place].words(language)[0]
        if language == "en":
            parts.append(f"{with_article(words)} {place}".strip())
        else:
            parts.append(f"{place}有一个{words}" if place else f"有一个{words}")
    return f"There is {', '.join(parts)}." if language == "en" else f"{'，'.join(parts)}。"


def imagined_scene(rng: random.Random, count: int) -> Scene:
    """Shapes that are told of but not drawn: each in one of the named places, no two of the same kind and colour."""
    pairs = rng.sample([(kind, colour) for kind in KINDS for colour in COLOURS], count)
    shapes = []
    for kind, colour in pairs:
        place = rng.choice(tuple(PLACES))
        x = 0.5 + 0.25 * (("right" in place) - ("left" in place))
        y = 0.5 + 0.25 * (("bottom" in place) - ("top" in place))
        shapes.append(make_shape(kind, colour, x, y, MIN_SIZE, rng))
    return Scene(tuple(shapes), (255, 255, 255), "plain", 0)


def detail(scene: Scene, language: str, rng: random.Random) -> ChatSample:
    """A question about every shape, or about those that have something in common; answered with their places."""
    if rng.random() < 0.3:
        return ChatSample(rng.choice(DETAILS[language]), told_in_words(scene, language))
    shapes = [make_shape(rng.choice(tuple(KINDS)), rng.choice(tuple(COLOURS)), 0.5, 0.5, MIN_SIZE, rng), *scene.shapes]
    named, by = rng.choice(shapes), rng.choice(("kind", "colour", "both"))
    kind, colour = named.kind if by != "colour" else None, named.colour if by != "kind" else None
    words = (
        rng.choice(KINDS[kind].words(language)) if by == "kind"
        else f"{COLOURS[colour].words(language)[0]}{' shape' if language == 'en' else '的图形'}" if by == "colour"
        else phrase(colour, kind, language)
    )  # fmt: skip
    found = scene.find(kind, colour)
    answer = told_in_words(replace(scene, shapes=tuple(found)), language) if found else NOTHING_LIKE_IT[language]
    return ChatSample(rng.choice(ABOUT[language]).format(it=words), answer)


def told_scene(rng: random.Random, count: int, types: tuple[str, ...] = QUESTION_TYPES) -> list[ChatSample]:
    """Questions in each language about one scene that is told in words."""
    scene, told, samples = imagined_scene(rng, count), rng.choice(LANGUAGES), []
    for language in LANGUAGES:
        question = None
        while question is None:
            question = make_question(scene, rng.choice(types), language, rng)
        context = told_in_words(scene, told) + "\n" + turns_as_context(question.turns_before)
        samples.append(ChatSample(question.text, question.answer, context))
    return samples


def comparison(rng: random.Random, count: int) -> list[ChatSample]:
    """Yes or no: what takes longest to learn."""
    return told_scene(rng, count, ("yes_no",))


def told_again(rng: random.Random, count: int) -> list[ChatSample]:
    """All of a scene or a part of it, told in the other words or the same."""
    scene, told = imagined_scene(rng, count), rng.choice(LANGUAGES)
    return [replace(detail(scene, language, rng), context=told_in_words(scene, told) + "\n") for language in LANGUAGES]


def turns_as_context(turns: Sequence[tuple[str, str]]) -> str:
    return "".join(f"User: {asked}\nAI: {answered}\n" for asked, answered in turns)


def translation(rng: random.Random, count: int) -> list[ChatSample]:
    """A description or a prompt from each language into the other; asked in either."""
    scene = imagined_scene(rng, count)
    if len(scene.shapes) > 1 or rng.random() < 0.3:
        words = {language: description(scene, language) for language in LANGUAGES}
    else:
        (shape,) = scene.shapes
        place = shape.place if rng.random() < 0.7 else None
        words = {name: word_prompt(shape.kind, shape.colour, place, name).text for name in LANGUAGES}
    samples = []
    for source, target in (LANGUAGES, LANGUAGES[::-1]):
        samples.append(ChatSample(rng.choice(TRANSLATE[target]) + words[source], words[target]))
    return samples


def caption_question(rng: random.Random, count: int) -> list[ChatSample]:
    """A question in each language about a prompt for VisCPM-Paint, which is always of one shape."""
    (shape,) = imagined_scene(rng, 1).shapes
    samples = []
    for language in LANGUAGES:
        prompt = word_prompt(shape.kind, shape.colour, shape.place, rng.choice(LANGUAGES), rng)
        what = rng.choice(("colour", "shape", "where"))
        name = f"{what}_is_only" if what == "where" else f"{what}_of_only"
        answer = {
            "colour": colour_answer(shape.colour, language),
            "shape": kind_answer(shape.kind, language),
            "where": place_answer(shape.place, language),
        }[what]
        samples.append(CaptionSample(rng.choice(PHRASES[name][language]), answer, prompt.text))
    return samples


KINDS_OF_TEXT = (told_scene, told_scene, told_scene, comparison, comparison, told_again, translation, caption_question)
