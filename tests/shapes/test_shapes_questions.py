"""Questions, their answers, and the rules that judge answers."""

import dataclasses

import pytest

from viscpm_hf.shapes import LANGUAGES, QUESTION_TYPES, check_answer, make_question, make_scene, questions_of
from viscpm_hf.tiny.scene import scene_rng
from viscpm_hf.tiny.words import language_of


QUESTIONS = [question for index in range(150) for question in questions_of("validation", index)]


def find(type: str, language: str, **values):
    """A question of the type whose attributes are these."""
    for index in range(500):
        question = make_question(make_scene("train", index), type, language, scene_rng("train", index, "find"))
        if question and all(getattr(question, name) == value for name, value in values.items()):
            return question
    raise AssertionError(f"no {type} question with {values}")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("type", QUESTION_TYPES)
def test_every_type_is_asked_in_both_languages(type, language):
    found = [question for question in QUESTIONS if (question.type, question.language) == (type, language)]
    assert len(found) >= 50
    assert len({question.text for question in found}) >= 5
    for question in found:
        assert language_of(question.text) == language_of(question.answer) == language
        assert bool(question.turns_before) == (type == "follow_up")


def test_the_taught_answers_are_right():
    for question in QUESTIONS:
        verdict = check_answer(question, question.answer)
        assert verdict.is_right, question


def test_answers_of_other_questions_are_wrong():
    for first, second in zip(QUESTIONS, QUESTIONS[200:], strict=False):
        if first.asks == second.asks and first.facts != second.facts and first.language == second.language:
            assert not check_answer(first, second.answer).is_right_content, (first, second)


def test_the_same_question_every_time():
    assert questions_of("test", 5) == questions_of("test", 5)


@pytest.mark.parametrize(
    ("type", "language", "asks", "facts", "right", "wrong"),
    [
        ("colour", "en", "colour", {"red"}, ["The circle is red.", "red"], ["Blue.", "Red or blue.", "", "colored"]),
        ("colour", "zh", "colour", {"pink"}, ["粉红色的。", "是粉色"], ["红色。", "蓝色。"]),
        ("shape", "en", "kind", {"star"}, ["It is a star.", "stars"], ["A circle.", "I started."]),
        ("count", "en", "number", {2}, ["There are two.", "2"], ["Three.", "One or two."]),
        ("count", "zh", "number", {2}, ["有两个图形。", "2个"], ["三个。"]),
        ("position", "en", "place", {"top", "left"}, ["In the upper left corner."], ["At the top.", "Bottom left."]),
        ("position", "zh", "place", set(), ["在正中间。"], ["在左边。", "不知道。"]),
        ("yes_no", "en", "truth", {False}, ["No, there isn't.", "There is none."], ["Yes.", "Perhaps."]),
        ("yes_no", "zh", "truth", {True}, ["是的，有。", "有。"], ["没有。", "不是。"]),
    ],
)
def test_answers_are_judged_by_content(type, language, asks, facts, right, wrong):
    question = dataclasses.replace(find(type, language), asks=asks, facts=frozenset(facts))
    for answer in right:
        assert check_answer(question, answer).is_right, answer
    for answer in wrong:
        assert not check_answer(question, answer).is_right, answer


def test_a_description_is_its_pairs_in_any_order():
    facts = frozenset({("red", "circle"), ("blue", "star")})
    question = dataclasses.replace(find("description", "en"), facts=facts)
    assert check_answer(question, "I see a blue star and a red circle.").is_right
    for wrong in ("A red star and a blue circle.", "A red circle.", "A red circle, a blue star and a red square."):
        assert not check_answer(question, wrong).is_right


def test_the_language_counts():
    question = find("colour", "zh", facts=frozenset({"red"}))
    verdict = check_answer(question, "Red.")
    assert verdict.is_right_content and not verdict.is_right_language and not verdict.is_right


def test_unknown_types_are_named():
    with pytest.raises(ValueError, match="no 'smell' question"):
        make_question(make_scene("train", 0), "smell", "en", scene_rng("train", 0))
