"""The embedded Paint model draws what it is asked for, in both languages, as it comes."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from plain_drawings import PAINTS, drawings, likest_drawing

import viscpm_hf
from viscpm_hf import VisCPMPaint, VisCPMPaintPipeline, VisCPMPaintTextEncoder
from viscpm_hf.paint import PRESETS
from viscpm_hf.shapes import LANGUAGES, check_painting, judged_prompts


FOLDER = Path(viscpm_hf.tiny("paint"))


@pytest.fixture(scope="module")
def painter() -> VisCPMPaint:
    return VisCPMPaint("viscpm-tiny", device="cpu", dtype="float32")


def test_folder_is_an_ordinary_pipeline_of_our_classes_and_small():
    pipeline = DiffusionPipeline.from_pretrained(FOLDER)
    assert type(pipeline) is VisCPMPaintPipeline and type(pipeline.text_encoder) is VisCPMPaintTextEncoder
    assert pipeline.scheduler.config.prediction_type == "epsilon" and pipeline.default_size() == (64, 64)
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors")) <= 7e6


@pytest.mark.parametrize("language", LANGUAGES)
def test_draws_what_prompts_describe(painter, language):
    prompts = judged_prompts(language, 8, seed=1)
    painter.pipeline.set_progress_bar_config(disable=True)
    images = painter.pipeline(
        [prompt.text for prompt in prompts],
        generator=[torch.Generator().manual_seed(index) for index in range(len(prompts))],
    ).images
    verdicts = [check_painting(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
    # Nine of ten are right on average (see the recipe's results); other processors round differently.
    assert sum(verdict.is_right for verdict in verdicts) >= 6, verdicts


PLACES = {
    "left": ("on the left", "左边"),
    "right": ("on the right", "右边"),
    "top": ("at the top", "上面"),
    "bottom": ("at the bottom", "下面"),
}
KINDS = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "五角星"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_paintings_are_most_like_the_plain_drawings_of_their_prompts(painter, language):
    """Judged by nothing of the package: which drawing of `plain_drawings.py` a painting is most like."""
    painter.pipeline.set_progress_bar_config(disable=True)
    wanted = [(drawing.figure, drawing.paint, drawing.spot) for drawing in drawings()]
    assert [likest_drawing(drawing.image) for drawing in drawings()] == wanted
    prompts = [
        f"a {paint} {figure} {PLACES[spot][0]}"
        if language == "en"
        else f"{PLACES[spot][1]}有一个{PAINTS[paint][1]}色的{KINDS[figure]}"
        for figure, paint, spot in wanted
    ]
    generators = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
    images = painter.pipeline(prompts, generator=generators).images
    right = sum(likest_drawing(image) == drawn for image, drawn in zip(images, wanted, strict=True))
    assert right >= 0.85 * len(wanted)  # 37 of 40 where this was written; other processors round differently


def test_draws_with_the_original_interface_and_its_defaults_without_the_network(painter):
    assert painter.pipeline.safety_checker is None and painter.pipeline.ranker is None
    (prompt,) = (prompt for prompt in judged_prompts("zh", 40) if (prompt.kind, prompt.colour) == ("square", "red"))
    image = painter.generate(prompt.text, generator=3)
    verdict = check_painting(prompt, image)
    assert image.size == (64, 64) and verdict.is_right_colour and verdict.is_right_kind


def test_draws_in_few_steps_with_a_faster_sampler():
    painter = VisCPMPaint("viscpm-tiny", device="cpu", dtype="float32", scheduler="dpm++")
    prompts = judged_prompts("en", 6, seed=2)
    verdicts = [
        check_painting(prompt, painter.generate(prompt.text, num_inference_steps=15, guidance_scale=3.0, generator=5))
        for prompt in prompts
    ]
    assert sum(verdict.is_right for verdict in verdicts) >= 4, verdicts


@pytest.mark.parametrize("preset", ["fast", "quality"])
def test_presets_draw_what_the_reference_draws(painter, preset):
    prompts = judged_prompts("zh", 6, seed=7)
    images = [painter.generate(prompt.text, generator=5, **PRESETS[preset]) for prompt in prompts]
    verdicts = [check_painting(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
    assert sum(verdict.is_right for verdict in verdicts) >= 5, verdicts  # 39 and 40 of 40 in docs/painting.md


def test_half_precision_draws_alike(painter):
    prompt = judged_prompts("en", 1)[0]
    half = VisCPMPaint("viscpm-tiny", device="cpu", dtype="bfloat16")
    images = [one.generate(prompt.text, generator=1) for one in (painter, half)]
    assert all(check_painting(prompt, image).is_right_colour for image in images)


def test_results_of_the_recipe_are_what_is_claimed():
    report = json.loads((Path(__file__).parents[1] / "recipes" / "tiny" / "results" / "paint.json").read_text("utf-8"))
    for language in LANGUAGES:
        assert report["right"][language]["right"]["value"] >= 0.9
        assert report["right"][language]["right"]["count"] >= 100
