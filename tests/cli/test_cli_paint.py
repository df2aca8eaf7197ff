"""`viscpm-hf paint`."""

import gc
import json
import os

import numpy as np
import paint_support
import pytest
import torch
from diffusers import UNet2DConditionModel
from paint_support import PAINT
from PIL import Image

from viscpm_hf import VisCPMPaint, VisCPMPaintTextEncoder
from viscpm_hf.cli.main import main
from viscpm_hf.paint import read_record


MODEL = str(PAINT / "pytorch_model.bin")
ALONE = ["--no-rank", "--no-check-prompt", "--no-check-image", "--device", "cpu", "--steps", "2"]


def test_an_image_with_all_it_takes_to_draw_it_again(tmp_path, capsys):
    output = tmp_path / "out.png"
    arguments = ["--negative", "红", "--seed", "3", "--guidance", "5", "--scheduler", "euler"]
    assert main(["paint", MODEL, "蓝色", "-o", str(output), *ALONE, *arguments]) == 0
    assert "seed 3" in capsys.readouterr().out
    with Image.open(output) as image:
        assert image.size == (16, 16)
        assert image.text["prompt"] == "蓝色"
        assert image.text["negative_prompt"] == "红"
        assert image.text["seed"] == "3"
        assert image.text["model"] == MODEL
        settings = json.loads(image.text["settings"])
    assert (settings["steps"], settings["scheduler"]) == (2, "EulerDiscreteScheduler")
    assert (settings["guidance"], settings["size"]) == (5.0, [16, 16])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's device that is always full")
def test_a_full_disk_leaves_what_was_there(tmp_path, capsys):
    output = tmp_path / "out.png"
    output.write_bytes(b"of before")
    (tmp_path / "out.png.tmp").symlink_to("/dev/full")
    assert main(["paint", MODEL, "蓝色", "-o", str(output), *ALONE]) == 1
    assert "The disk to write to is full, free some of it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"] and output.read_bytes() == b"of before"


def same(first, second):
    with Image.open(first) as one, Image.open(second) as other:
        return one.tobytes() == other.tobytes()


def test_a_png_is_drawn_again(tmp_path, capsys):
    for part in paint_support.ranker(tmp_path).values():
        part.save_pretrained(tmp_path / "ranker")
    output, again = tmp_path / "out.png", tmp_path / "again.png"
    arguments = ["--negative", "红", "--preset", "fast", "--steps", "3", "--size", "24", "--guidance", "0.5"]
    arguments += ["--save-all", "--candidates", "2", "--ranker", str(tmp_path / "ranker")]
    rest = ["--no-check-prompt", "--no-check-image", "--device", "cpu"]
    assert main(["paint", MODEL, "蓝色", "-o", str(output), *arguments, *rest]) == 0
    for drawn in (output, tmp_path / "out.1.png"):
        assert main(["paint", "--from", str(drawn), "-o", str(again), *rest]) == 0
        assert same(drawn, again)
    assert main(["paint", "--from", str(again), "-o", str(tmp_path / "third.png"), *rest]) == 0
    assert same(again, tmp_path / "third.png")
    assert not same(output, tmp_path / "out.1.png")


def test_what_cannot_be_drawn_again(tmp_path, capsys):
    output, again = tmp_path / "out.png", str(tmp_path / "again.png")
    rest = ["--no-rank", "--no-check-prompt", "--no-check-image", "--device", "cpu"]

    def error_of(*arguments):
        assert main(["paint", *arguments, "-o", again, *rest]) == 1
        error = capsys.readouterr().err.strip()
        assert error.count("\n") == 0
        return error

    Image.new("RGB", (16, 16)).save(output)
    assert "doesn't say its prompt, model, settings" in error_of("--from", str(output))
    output.write_bytes(b"no image")
    assert "no image file" in error_of("--from", str(output))
    assert "No such file" in error_of("--from", "/nowhere.png")
    painter = VisCPMPaint(MODEL, False, False, False, device="cpu")
    painter.generate_all("蓝色", generator=1, num_inference_steps=1).save(output, model="some/model")
    assert "was drawn by 'some/model', which isn't here" in error_of("--from", str(output))
    assert "can't be given: steps, seed" in error_of("--from", str(output), "--steps", "3", "--seed", "1")
    latents = torch.zeros(1, 4, 8, 8)
    painter.generate_all("蓝色", generator=1, num_inference_steps=1, latents=latents).save(output, model=MODEL)
    assert "latents were given as tensors" in error_of("--from", str(output))
    generator = torch.Generator().manual_seed(0)
    painter.generate_all("蓝色", generator=generator, num_inference_steps=1).save(output, model=MODEL)
    assert "no seed" in error_of("--from", str(output))
    assert error_of() == "viscpm-hf: error: Give a MODEL, and a prompt or --prompts-file."


@pytest.mark.parametrize(
    ("arguments", "steps", "scheduler", "guidance"),
    [
        (["--preset", "fast"], 12, "DPMSolverMultistepScheduler", 7.5),
        (["--preset", "reference"], 50, "DDPMScheduler", 7.5),
        (["--preset", "quality", "--guidance", "3", "--scheduler", "ddim"], 25, "DDIMScheduler", 3.0),
        ([], 50, "DDPMScheduler", 7.5),
    ],
)
def test_presets(tmp_path, arguments, steps, scheduler, guidance):
    output, rest = tmp_path / "out.png", ["--no-rank", "--no-check-prompt", "--no-check-image", "--device", "cpu"]
    assert main(["paint", MODEL, "蓝色", "-o", str(output), *arguments, *rest]) == 0
    record = read_record(output)
    assert (record.steps, record.scheduler, record.guidance_scale) == (steps, scheduler, guidance)


def test_candidates_with_scores(tmp_path, capsys):
    for part in paint_support.ranker(tmp_path).values():
        part.save_pretrained(tmp_path / "ranker")
    output, sheet = tmp_path / "out.png", tmp_path / "sheet.png"
    arguments = ["--ranker", str(tmp_path / "ranker"), "--candidates", "3", "--seed", "0", "--json", "--save-all"]
    rest = [argument for argument in ALONE if argument != "--no-rank"]
    assert main(["paint", MODEL, "蓝色", "-o", str(output), "--contact-sheet", str(sheet), *arguments, *rest]) == 0
    result = json.loads(capsys.readouterr().out)
    scores = [candidate["score"] for candidate in result["candidates"]]
    assert scores == sorted(scores, reverse=True)
    assert {candidate["seed"] for candidate in result["candidates"]} == {0, 1, 2}
    with Image.open(sheet) as image:
        assert image.size == (32, 64)
    for candidate in result["candidates"]:
        with Image.open(candidate["output"]) as image:
            assert image.text["seed"] == str(candidate["seed"])


def test_a_file_of_prompts(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("蓝色\n\n a red circle \n", "utf-8")
    assert main(["paint", MODEL, "--prompts-file", str(prompts), "-o", str(tmp_path / "out.png"), *ALONE]) == 0
    with Image.open(tmp_path / "out-2.png") as image:
        assert image.text["prompt"] == "a red circle"
    assert main(["paint", MODEL, "蓝色", "-o", str(tmp_path / "alone.png"), "--seed", "5", *ALONE]) == 0
    assert main(
        ["paint", MODEL, "--prompts-file", str(prompts), "-o", str(tmp_path / "out.png"), "--seed", "5", *ALONE]
    ) == 0  # fmt: skip
    with Image.open(tmp_path / "alone.png") as alone, Image.open(tmp_path / "out-1.png") as first:
        difference = np.asarray(alone, int) - np.asarray(first, int)
        assert abs(difference).max() <= 1  # encoded together, the last bit may round the other way


def test_a_file_is_encoded_in_one_pass_and_drawn_without_the_text_encoder(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("蓝色\na red circle\n" + "a" * 10_000 + "\n蓝色\n", "utf-8")
    passes, alive = [], []

    def encoders():
        gc.collect()
        return {id(thing) for thing in gc.get_objects() if type(thing) is VisCPMPaintTextEncoder}

    kept_by_other_tests = encoders()

    def see(module, arguments, *_):
        if isinstance(module, VisCPMPaintTextEncoder):
            passes.append(1)
        if isinstance(module, UNet2DConditionModel):
            alive.append(bool(encoders() - kept_by_other_tests))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(see)
    try:
        output = str(tmp_path / "out.png")
        assert main(["paint", MODEL, "--prompts-file", str(prompts), "-o", output, *ALONE]) == 1
    finally:
        handle.remove()
    assert len(passes) == 2  # all prompts, and the empty one that is kept when the encoder goes
    assert alive and not any(alive)
    assert [(tmp_path / f"out-{number}.png").is_file() for number in (1, 2, 3, 4)] == [True, True, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["蓝色", "-o", "/nowhere/out.png"], "no folder /nowhere"),
        (["蓝色", "-o", "/tmp"], "ends in .png"),
        (["蓝色", "-o", "out.txt"], "ends in .png"),
        (["-o", "out.png"], "either a prompt or --prompts-file"),
        (["蓝色", "--prompts-file", "x", "-o", "out.png"], "either a prompt or --prompts-file"),
        (["--prompts-file", "/nowhere", "-o", "out.png"], "/nowhere: No such file"),
        (["", "-o", "out.png"], "The prompt is empty"),
        (["蓝色", "-o", "out.png", "--size", "20"], "multiple of 8"),
        (["蓝色", "-o", "out.png", "--scheduler", "best"], "no scheduler 'best'"),
        (["蓝色", "-o", "out.png", "--offload", "model"], "needs a GPU"),
        (["蓝色", "-o", "out.png", "--vae", "/nowhere"], "no VAE at /nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["paint", MODEL, *arguments, *ALONE]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.count("\n") == 0
    assert not (tmp_path / "out.png").exists()


def test_a_device_that_is_not_there(capsys, tmp_path):
    arguments = ["paint", MODEL, "蓝色", "-o", str(tmp_path / "out.png"), *ALONE, "--device", "tpu"]
    assert main(arguments) == 1
    assert "The device 'tpu' can't be used" in capsys.readouterr().err


def test_a_chat_checkpoint(capsys, tmp_path):
    chat = str(PAINT.parent / "chat_a" / "pytorch_model.bin")
    assert main(["paint", chat, "蓝色", "-o", str(tmp_path / "out.png"), *ALONE]) == 1
    assert "can't paint" in capsys.readouterr().err


def test_a_part_that_cannot_be_had(capsys, tmp_path):
    rest = [argument for argument in ALONE if argument != "--no-rank"]
    assert main(["paint", MODEL, "蓝色", "-o", str(tmp_path / "out.png"), *rest]) == 1
    assert "--no-rank" in capsys.readouterr().err
