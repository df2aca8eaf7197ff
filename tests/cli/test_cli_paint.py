"""`viscpm-hf paint`."""

import json

import paint_support
import pytest
from paint_support import PAINT
from PIL import Image

from viscpm_hf.cli.main import main


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
    assert settings == {"steps": 2, "scheduler": "EulerDiscreteScheduler", "guidance": 5.0, "size": [16, 16]}


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
    assert (tmp_path / "out-1.png").is_file()


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
