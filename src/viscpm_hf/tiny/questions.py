"""Questions about a scene, with the answer that a model is taught and the facts that any right answer has.

Only what every onlooker would answer alike is asked: no place of a shape near a boundary between two places, and no
shape by a name that two of them have.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .phrases import PHRASES
from .scene import Scene, Shape, make_scene, scene_rng, side
from .words import COLOURS, KINDS, LANGUAGES, NUMBERS, OPPOSITE, PLACES, phrase, with_article


QUESTION_TYPES = ("colour", "shape", "count", "position", "yes_no", "description", "follow_up")


@dataclass(frozen=True)
class Question:
    """`type` is one of `QUESTION_TYPES`. `asks` says how `facts` are compared, see `checking.check_answer`."""

    type: str
    language: str
    text: str
    answer: str
    asks: str
    facts: frozenset
    turns_before: tuple[tuple[str, str], ...] = ()
    """Question and answer of the conversation that this one goes on with."""


def make_question(scene: Scene, type: str, language: str, rng: random.Random) -> Question | None:
    """One question of the type, or None if the scene is not clear enough for it."""
    if type not in QUESTION_TYPES or language not in LANGUAGES:
        raise ValueError(
            f"There is no {type!r} question in {language!r}: types are {', '.join(QUESTION_TYPES)}, languages "
            f"{', '.join(LANGUAGES)}."
        )
    return _MAKERS[type](scene, language, rng)


def questions_of(
    split: str,
    index: int,
    types: tuple[str, ...] = QUESTION_TYPES,
    languages: tuple[str, ...] = LANGUAGES,
    num_shapes: int | None = None,
) -> list[Question]:
    """For the picture `index` of a split: one question of every type and language that it is clear enough for."""
    scene = make_scene(split, index, num_shapes)
    questions = []
    for type in types:
        for language in languages:
            question = make_question(scene, type, language, scene_rng(split, index, f"{type}/{language}"))
            if question is not None:
                questions.append(question)
    return questions


# ----------------------------------------------------------------------------------------------------------- wording


def _ask(name: str, language: str, rng: random.Random, **values: str) -> str:
    return rng.choice(PHRASES[name][language]).format(**values)


def _word(name, language: str, rng: random.Random) -> str:
    """Mostly the usual word, sometimes another of its names."""
    words = name.words(language)
    return words[0] if rng.random() < 0.6 else rng.choice(words)


def _kind(kind: str, language: str, rng: random.Random) -> str:
    return _word(KINDS[kind], language, rng)


def _colour(colour: str, language: str, rng: random.Random) -> str:
    return _word(COLOURS[colour], language, rng)


def _phrase(colour: str, kind: str, language: str, rng: random.Random) -> str:
    words = phrase(colour, kind, language, _colour(colour, language, rng), _kind(kind, language, rng))
    return words.replace("的", "") if rng.random() < 0.3 else words


def _name(shape: Shape, scene: Scene, language: str, rng: random.Random) -> str:
    """What only this shape is called: its kind if there is no other of it, else colour and kind."""
    if len(scene.find(shape.kind)) == 1 and rng.random() < 0.5:
        return _kind(shape.kind, language, rng)
    return _phrase(shape.colour, shape.kind, language, rng)


def place_answer(place: frozenset[str], language: str) -> str:
    words = PLACES[place].words(language)[0]
    return f"{words.capitalize()}." if language == "en" else f"在{words}。"


def colour_answer(colour: str, language: str) -> str:
    word = COLOURS[colour].words(language)[0]
    return f"{word.capitalize()}." if language == "en" else f"{word}。"


def kind_answer(kind: str, language: str) -> str:
    word = KINDS[kind].words(language)[0]
    return f"{with_article(word).capitalize()}." if language == "en" else f"{word}。"


def number_answer(count: int, language: str) -> str:
    word = NUMBERS[count].words(language)[0]
    return f"{word.capitalize()}." if language == "en" else f"{word}。"


def yes_no_answer(is_true: bool, language: str, is_about_presence: bool) -> str:
    if language == "en":
        return "Yes." if is_true else "No."
    if is_about_presence:
        return "有。" if is_true else "没有。"
    return "是的。" if is_true else "不是。"


def in_order(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """The palette's order, then that of the kinds: it doesn't depend on places, which may be nearly alike."""
    colours, kinds = list(COLOURS), list(KINDS)
    return tuple(sorted(shapes, key=lambda s: (colours.index(s.colour), kinds.index(s.kind))))


def description(scene: Scene, language: str) -> str:
    """`"There are a red circle and a blue star."`, see [`in_order`]."""
    shapes = in_order(scene.shapes)
    names = [phrase(s.colour, s.kind, language) for s in shapes]
    if language == "en":
        parts = [with_article(name) for name in names]
        listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
        return f"There {'is' if len(parts) == 1 else 'are'} {listed}."
    parts = [f"一个{name}" for name in names]
    listed = parts[0] if len(parts) == 1 else f"{'、'.join(parts[:-1])}和{parts[-1]}"
    return f"图中有{listed}。"


# --------------------------------------------------------------------------------------------------------- questions


def _colour_question(scene: Scene, language: str, rng: random.Random) -> Question | None:
    shape = rng.choice(scene.shapes)
    if len(scene.shapes) == 1 and rng.random() < 0.6:
        text = _ask("colour_of_only", language, rng)
    elif len(scene.find(shape.kind)) == 1:
        text = _ask("colour", language, rng, it=_kind(shape.kind, language, rng))
    else:
        return None
    return Question(
        "colour", language, text, colour_answer(shape.colour, language), "colour", frozenset({shape.colour})
    )


def _shape_question(scene: Scene, language: str, rng: random.Random) -> Question | None:
    shape = rng.choice(scene.shapes)
    if len(scene.shapes) == 1 and rng.random() < 0.6:
        text = _ask("shape_of_only", language, rng)
    elif len(scene.find(colour=shape.colour)) == 1:
        text = _ask("shape", language, rng, it=_colour(shape.colour, language, rng))
    else:
        return None
    return Question("shape", language, text, kind_answer(shape.kind, language), "kind", frozenset({shape.kind}))


def _count_question(scene: Scene, language: str, rng: random.Random) -> Question:
    if rng.random() < 0.5:
        count, text = len(scene.shapes), _ask("count", language, rng)
    elif rng.random() < 0.6:
        kind = rng.choice(scene.shapes).kind if rng.random() < 0.7 else rng.choice(tuple(KINDS))
        word = _kind(kind, language, rng)
        count, text = len(scene.find(kind)), _ask("count_of", language, rng, it=word, many=_plural(word))
    else:
        colour = rng.choice(scene.shapes).colour if rng.random() < 0.7 else rng.choice(tuple(COLOURS))
        word = _colour(colour, language, rng)
        count = len(scene.find(colour=colour))
        text = _ask("count_of", language, rng, it=f"{word}的图形", many=f"{word} shapes")
    return Question("count", language, text, number_answer(count, language), "number", frozenset({count}))


def _plural(word: str) -> str:
    return f"{word}es" if word.endswith("x") else f"{word}s"


def _position_question(scene: Scene, language: str, rng: random.Random) -> Question | None:
    shape = rng.choice(scene.shapes)
    it = _name(shape, scene, language, rng)
    if rng.random() < 0.5:
        if shape.place is None:
            return None
        is_only = len(scene.shapes) == 1 and rng.random() < 0.4
        text = _ask("where_is_only", language, rng) if is_only else _ask("where", language, rng, it=it)
        return Question(
            "position", language, text, place_answer(shape.place, language), "place", frozenset(shape.place)
        )
    sides = _clear_sides(shape)
    if not sides:
        return None
    right = rng.choice(sides)
    both = [PLACES[frozenset({name})].words(language)[0] for name in (right, OPPOSITE[right])]
    rng.shuffle(both)
    text = _ask("which_side", language, rng, it=it, first=both[0], second=both[1])
    answer = place_answer(frozenset({right}), language)
    return Question("position", language, text, answer, "side", frozenset({right}))


def _clear_sides(shape: Shape) -> list[str]:
    """The sides that the shape is on beyond doubt."""
    names = (side(shape.x, "left", "right"), side(shape.y, "top", "bottom"))
    return [name for name in names if name]


def _yes_no_question(scene: Scene, language: str, rng: random.Random) -> Question | None:
    is_true = rng.random() < 0.5
    maker: Callable = rng.choice((_is_there, _is_there, _is_coloured, _is_placed))
    made = maker(scene, is_true, language, rng)
    if made is None:
        return None
    text, is_about_presence = made
    answer = yes_no_answer(is_true, language, is_about_presence)
    return Question("yes_no", language, text, answer, "truth", frozenset({is_true}))


def _is_there(scene: Scene, is_true: bool, language: str, rng: random.Random) -> tuple[str, bool]:
    what = rng.choice(("kind", "colour", "both", "both"))
    if what == "kind":
        absent = [kind for kind in KINDS if not scene.find(kind)]
        it = _kind(rng.choice(scene.shapes).kind if is_true else rng.choice(absent), language, rng)
    elif what == "colour":
        absent = [colour for colour in COLOURS if not scene.find(colour=colour)]
        it = _any_of(rng.choice(scene.shapes).colour if is_true else rng.choice(absent), language, rng)
    else:
        pairs = [(s.kind, s.colour) for s in scene.shapes] if is_true else _absent_pairs(scene, rng)
        kind, colour = rng.choice(pairs)
        it = _phrase(colour, kind, language, rng)
    return _ask("is_there", language, rng, it=it, one=with_article(it)), True


def _any_of(colour: str, language: str, rng: random.Random) -> str:
    word = _colour(colour, language, rng)
    return f"{word} shape" if language == "en" else f"{word}的图形"


def _absent_pairs(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Half the time only kinds or colours that are there, each with something else: the hard ones."""
    absent = [(kind, colour) for kind in KINDS for colour in COLOURS if not scene.find(kind, colour)]
    if rng.random() < 0.5:
        return absent
    return [(kind, colour) for kind, colour in absent if scene.find(kind) or scene.find(colour=colour)]


def _is_coloured(scene: Scene, is_true: bool, language: str, rng: random.Random) -> tuple[str, bool] | None:
    shape = rng.choice(scene.shapes)
    if len(scene.find(shape.kind)) > 1:
        return None
    others = [s.colour for s in scene.shapes if s.colour != shape.colour]
    if not others or rng.random() < 0.5:
        others = [c for c in COLOURS if c != shape.colour]
    colour = shape.colour if is_true else rng.choice(others)
    it, word = _kind(shape.kind, language, rng), _colour(colour, language, rng)
    return _ask("is_coloured", language, rng, it=it, colour=word), False


def _is_placed(scene: Scene, is_true: bool, language: str, rng: random.Random) -> tuple[str, bool] | None:
    shape = rng.choice(scene.shapes)
    sides = _clear_sides(shape)
    if not sides:
        return None
    name = rng.choice(sides)
    place = PLACES[frozenset({name if is_true else OPPOSITE[name]})].words(language)[0]
    return _ask("is_placed", language, rng, it=_name(shape, scene, language, rng), place=place), False


def _description_question(scene: Scene, language: str, rng: random.Random) -> Question:
    text = _ask("describe", language, rng)
    facts = frozenset((s.colour, s.kind) for s in scene.shapes)
    return Question("description", language, text, description(scene, language), "pairs", facts)


def _follow_up_question(scene: Scene, language: str, rng: random.Random) -> Question | None:
    """A question that can't be answered without the turn before, which may be in the other language."""
    before = language if rng.random() < 0.8 else LANGUAGES[language == "en"]
    maker = rng.choice((_follow_it, _follow_it, _follow_and) if len(scene.shapes) > 1 else (_follow_it,))
    return maker(scene, before, language, rng)


def _follow_it(scene: Scene, before: str, language: str, rng: random.Random) -> Question | None:
    """`Is there a star? - Yes. - What color is it?`"""
    shape = rng.choice(scene.shapes)
    what = rng.choice(("colour", "kind", "place"))
    if what == "kind":
        if len(scene.find(colour=shape.colour)) > 1:
            return None
        it = _any_of(shape.colour, before, rng)
        text, answer = _ask("shape_of_it", language, rng), kind_answer(shape.kind, language)
        facts = frozenset({shape.kind})
    elif what == "colour":
        if len(scene.find(shape.kind)) > 1:
            return None
        it = _kind(shape.kind, before, rng)
        text, answer = _ask("colour_of_it", language, rng), colour_answer(shape.colour, language)
        facts = frozenset({shape.colour})
    else:
        if shape.place is None:
            return None
        it = _name(shape, scene, before, rng)
        text, answer = _ask("where_is_it", language, rng), place_answer(shape.place, language)
        facts = frozenset(shape.place)
    first = _ask("is_there", before, rng, it=it, one=with_article(it))
    turn = (first, yes_no_answer(True, before, is_about_presence=True))
    return Question("follow_up", language, text, answer, what, facts, (turn,))


def _follow_and(scene: Scene, before: str, language: str, rng: random.Random) -> Question | None:
    """`What color is the star? - Red. - And the circle?`"""
    first, second = rng.sample(scene.shapes, 2)
    if rng.random() < 0.5:
        if len(scene.find(first.kind)) > 1 or len(scene.find(second.kind)) > 1:
            return None
        turn = (
            _ask("colour", before, rng, it=_kind(first.kind, before, rng)),
            colour_answer(first.colour, before),
        )
        it, what = _kind(second.kind, language, rng), "colour"
        answer, facts = colour_answer(second.colour, language), frozenset({second.colour})
    else:
        if first.place is None or second.place is None:
            return None
        turn = (
            _ask("where", before, rng, it=_name(first, scene, before, rng)),
            place_answer(first.place, before),
        )
        it, what = _name(second, scene, language, rng), "place"
        answer, facts = place_answer(second.place, language), frozenset(second.place)
    text = _ask("and_the", language, rng, it=it)
    return Question("follow_up", language, text, answer, what, facts, (turn,))


_MAKERS: dict[str, Callable[[Scene, str, random.Random], Question | None]] = {
    "colour": _colour_question,
    "shape": _shape_question,
    "count": _count_question,
    "position": _position_question,
    "yes_no": _yes_no_question,
    "description": _description_question,
    "follow_up": _follow_up_question,
}
