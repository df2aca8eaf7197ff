"""Prompts for Paint, and the rules that judge paintings."""

from collections import Counter

import PIL.Image
import PIL.ImageDraw
import pytest
from plain_drawings import drawings

from viscpm_hf.shapes import COLOURS, KINDS, LANGUAGES, PLACES, check_painting, draw, judged_prompts
from viscpm_hf.tiny.prompts import make_paint_example, word_prompt


@pytest.mark.parametrize("language", LANGUAGES)
def test_judged_prompts_cover_the_world_evenly(language):
    prompts = judged_prompts(language, 80)
    assert prompts == judged_prompts(language, 80)
    assert Counter((prompt.kind, prompt.colour) for prompt in prompts) == {(k, c): 2 for k in KINDS for c in COLOURS}
    assert {prompt.place for prompt in prompts} == {None, *PLACES}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_worlds_own_pictures_are_right(language):
    examples = [make_paint_example("validation", index, language) for index in range(60)]
    right = [check_painting(prompt, draw(scene, 64)).is_right for scene, prompt in examples]
    assert sum(right) >= 0.95 * len(right)


def test_plain_drawings_are_recognised():
    for drawing in drawings():
        prompt = word_prompt(drawing.figure, drawing.paint, frozenset({drawing.spot}), "en")
        assert check_painting(prompt, drawing.image).is_right, (drawing, check_painting(prompt, drawing.image))


def test_what_was_not_asked_for_is_wrong():
    image = next(drawing.image for drawing in drawings() if (drawing.figure, drawing.paint) == ("circle", "red"))
    right = word_prompt("circle", "red", None, "en")
    assert check_painting(right, image).is_right
    assert not check_painting(word_prompt("square", "red", None, "en"), image).is_right_kind
    assert not check_painting(word_prompt("circle", "blue", None, "en"), image).is_right_colour
    assert not check_painting(word_prompt("circle", "red", frozenset({"right"}), "en"), image).is_right_place


def test_nothing_and_noise_are_wrong():
    prompt = word_prompt("circle", "red", None, "zh")
    empty = check_painting(prompt, PIL.Image.new("RGB", (64, 64), "white"))
    assert not empty.is_right and empty.colour is None
    noise = PIL.Image.effect_noise((64, 64), 90).convert("RGB")
    assert not check_painting(prompt, noise).is_right_kind


def test_prompts_of_another_world_are_refused():
    with pytest.raises(ValueError, match="no 'red' 'elephant' in 'en'"):
        word_prompt("elephant", "red", None, "en")
