"""Paint's rows: prompts drawn in batches are as they are alone."""

import json

import numpy as np
import paint_support
import PIL.Image
import pytest
from paint_support import PAINT

from viscpm_hf import UnsafeImageError, UnsafePromptError, VisCPMPaint
from viscpm_hf.batch.processing import PaintRows
from viscpm_hf.batch.rows import read_rows
from viscpm_hf.batch.runner import BatchRunner
from viscpm_hf.paint.painting import PaintRequest, paint_batch


STEPS = {"num_inference_steps": 3}
REQUESTS = [
    PaintRequest("蓝色", None, 1),
    PaintRequest("a red circle and a very long prompt 🙂", "红 <", 2),
    PaintRequest("月", "", 1),
    PaintRequest("月", "a much longer negative prompt than the prompt", 1),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for name, pair in (
        ("image", paint_support.safety_checker(is_strict=True)),
        ("prompt", paint_support.prompt_checker(folder, 0.9)),
        ("ranker", paint_support.ranker(folder)),
    ):
        for part in pair.values():
            part.save_pretrained(folder / name)
    return folder


def load(**options) -> VisCPMPaint:
    alone = {"image_safety_checker": False, "prompt_safety_checker": False, "add_ranker": False, "device": "cpu"}
    painter = VisCPMPaint(PAINT / "pytorch_model.bin", **{**alone, **options})
    painter.pipeline.set_progress_bar_config(disable=True)
    return painter


def assert_same(images, others) -> None:
    for image, other in zip(images, others, strict=True):
        # A rounding of the last bit may fall on the other side.
        assert np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= 1


def alone(painter, request: PaintRequest, **options):
    return painter.generate_all(request.prompt, request.negative_prompt, generator=request.seed, **options)


@pytest.mark.parametrize("has_ranker", [False, True])
def test_batch_is_its_prompts(parts, has_ranker):
    painter = load(add_ranker=parts / "ranker" if has_ranker else False, candidates=2)
    together = paint_batch(painter, REQUESTS, **STEPS)
    for request, result in zip(REQUESTS, together, strict=True):
        expected = alone(painter, request, **STEPS)
        assert (result.prompt, result.seeds, result.flags) == (request.prompt, expected.seeds, expected.flags)
        assert_same(result.images, expected.images)
        assert len(result.images) == (2 if has_ranker else 1)
        if has_ranker:
            assert result.scores == pytest.approx(expected.scores, abs=0.05)
    assert (np.asarray(together[0].images[0]) != np.asarray(together[1].images[0])).any()


def test_refused_prompts_and_flagged_images(parts):
    refusing = load(prompt_safety_checker=parts / "prompt")
    assert all(isinstance(result, UnsafePromptError) for result in paint_batch(refusing, REQUESTS, **STEPS))
    flagging = load(image_safety_checker=parts / "image")
    results = paint_batch(flagging, REQUESTS[:2], **STEPS)
    assert all(result.flags == [True] and not np.asarray(result.images[0]).any() for result in results)
    flagging.image_policy = "raise"
    assert all(isinstance(result, UnsafeImageError) for result in paint_batch(flagging, REQUESTS[:2], **STEPS))


def test_rows_become_files(tmp_path):
    painter = load()
    good = [
        {"id": f"row {index}", "prompt": request.prompt, "negative_prompt": request.negative_prompt}
        for index, request in enumerate(REQUESTS)
    ]
    good[2]["seed"] = 40
    bad = {
        "none": ({}, 'The row has no "prompt"'),
        "blank": ({"prompt": " "}, "The prompt is empty"),
        "type": ({"prompt": 3}, '"prompt" is a text, got int'),
        "negative": ({"prompt": "月", "negative_prompt": []}, '"negative_prompt" is a text'),
        "long": ({"prompt": "a" * 4000}, "the text encoder takes"),
    }
    rows = [*good, *({"id": name, **values} for name, (values, _) in bad.items())]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    found: list[dict] = []
    output = tmp_path / "images"
    output.mkdir()
    BatchRunner(PaintRows(painter, output, seed=7, options=STEPS), 3, found.extend).run(read_rows(source))
    by_id = {row["id"]: row for row in found}
    for name, (_, message) in bad.items():
        assert message in by_id[name]["error"]
    assert len(list(output.iterdir())) == len(good)
    for index, row in enumerate(good):
        result = by_id[row["id"]]
        assert result["seed"] == (40 if index == 2 else 7 + index)
        assert (result["flagged"], result["score"], result["reason"]) == (False, None, None)
        request = PaintRequest(row["prompt"], row["negative_prompt"], result["seed"])
        with PIL.Image.open(output / result["file"]) as image:
            assert_same([image], alone(painter, request, **STEPS).images)
            assert image.text["prompt"] == row["prompt"] and image.text["seed"] == str(result["seed"])
            assert image.text["negative_prompt"] == (row["negative_prompt"] or "")
        assert_same(painter.draw_again(output / result["file"]).images, alone(painter, request, **STEPS).images)
