"""`viscpm-hf chat` in a terminal's terms: arguments, standard streams and exit status."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from support import GOLDEN, Golden, reference_options, unescape

from viscpm_hf import VisCPMChat
from viscpm_hf.cli import main


GOLDEN_A = Golden("chat_a")
MODEL, IMAGE = str(GOLDEN_A.weights), str(GOLDEN_A.image(0))
SHORT = ("--max-new-tokens", "6", "--device", "cpu")


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main(["chat", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def objects(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


# ------------------------------------------------------------------------------------------------------------- answers


def test_answers_are_the_references(golden, capsys):
    for case in golden.expected["answers"]:
        options = reference_options(case["generate"])
        options = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        questions = [turn["question"] for turn in case["turns"]]
        status, out, _ = run(capsys, golden.weights, golden.image(case["image"]), *questions, "--json", *options)
        assert status == 0
        assert [turn["question"] for turn in objects(out)] == questions
        assert [turn["answer"] for turn in objects(out)] == [unescape(turn["answer"]) for turn in case["turns"]]


@pytest.mark.parametrize("where", ["original", "saved"])
def test_folders(capsys, golden, where, original_folder, saved_folder):
    expected = golden.load_chat().chat(golden.image(0), "颜色", max_new_tokens=6)[0]
    folder = {"original": original_folder, "saved": saved_folder}[where]
    status, out, _ = run(capsys, folder, golden.image(0), "颜色", "--json", *SHORT)
    assert status == 0
    assert objects(out)[0]["answer"] == expected


def test_json_objects(capsys):
    status, out, err = run(capsys, MODEL, IMAGE, "图片是什么颜色？", "what shape is this?", "--json", *SHORT)
    assert (status, err) == (0, "")
    for turn in objects(out):
        assert list(turn) == ["question", "answer", "tokens", "seconds", "tokens_per_second"]
        assert turn["tokens"] > 0
        assert turn["seconds"] >= 0
    assert "图片是什么颜色？" in out  # not as \\u escapes


@pytest.mark.parametrize("arguments", [("颜色",), ("", "颜色"), ("what shape is this", "颜色")])
def test_questions_without_a_picture(capsys, arguments):
    questions = [argument for argument in arguments if argument]
    chat, context, answers = GOLDEN_A.load_chat(), "", []
    for question in questions:
        answer, context, _ = chat.chat(None, question, context, max_new_tokens=6)
        answers.append(answer)
    capsys.readouterr()
    for order in ((MODEL, *arguments, "--json", *SHORT), (MODEL, "--json", *arguments, *SHORT)):
        status, out, err = run(capsys, *order)
        assert (status, err) == (0, "")
        assert [turn["question"] for turn in objects(out)] == questions
        assert [turn["answer"] for turn in objects(out)] == answers


@pytest.mark.parametrize("image", ["photo.jp", "photo of a cat.jpg", "figures/a cat", "C:\\my photos", "cat"])
def test_a_mistyped_picture_is_no_question(capsys, image):
    status, out, err = run(capsys, MODEL, image, "颜色")
    assert status != 0 and out == ""
    assert "neither an image file" in err


@pytest.mark.parametrize("mode", ["reference", "generate"])
def test_text_output(capsys, mode):
    chat = GOLDEN_A.load_chat()
    turn = chat.ask(IMAGE, "颜色", mode=mode, max_new_tokens=6)
    capsys.readouterr()  # the progress bar of loading, which only the command line switches off
    status, out, err = run(capsys, MODEL, IMAGE, "颜色", "--mode", mode, *SHORT)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "Q: 颜色"
    assert lines[1] == f"A: {turn.answer}"
    assert f"({turn.num_tokens} tokens" in lines[2]


def test_seed_repeats(capsys):
    sampling = ("--mode", "generate", "--temperature", "3", "--top-p", "0.95", "--json", *SHORT)
    first, again, other = (
        objects(run(capsys, MODEL, IMAGE, "颜色", "--seed", seed, *sampling)[1])[0]["answer"] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_paths_of_an_original_file(capsys, tmp_path):
    file = tmp_path / "model.pt"
    file.write_bytes(GOLDEN_A.weights.read_bytes())
    paths = ("--config", GOLDEN_A.folder / "cpm-bee.json", "--vision-config", GOLDEN_A.folder / "vision.json")
    status, out, _ = run(capsys, file, IMAGE, "颜色", "--json", *SHORT, *paths, "--vocab", GOLDEN_A.vocab)
    assert status == 0
    assert objects(out)[0]["answer"] == GOLDEN_A.load_chat().chat(IMAGE, "颜色", max_new_tokens=6)[0]


# --------------------------------------------------------------------------------------------------------- interactive


def interact(capsys, monkeypatch, lines, *options) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    return run(capsys, MODEL, IMAGE, *SHORT, *options)


def test_conversation(capsys, monkeypatch):
    """The image's encoding and the history go from turn to turn; /clear forgets the history, /image both."""
    options = {"mode": "generate", "max_new_tokens": 6}
    chat, other = GOLDEN_A.load_chat(), str(GOLDEN_A.image(1))
    first = chat.ask(IMAGE, "颜色", **options)
    second = chat.ask(None, "描述", first.context, first.vision_hidden_states, **options)
    changed = chat.ask(other, "描述", **options)
    status, out, err = interact(
        capsys,
        monkeypatch,
        ["颜色", "", "描述", "/clear", "颜色", f"/image {other}", "描述", "/quit", "unread"],
        "--json",
    )
    assert (status, err) == (0, "")
    assert [turn["answer"] for turn in objects(out)] == [first.answer, second.answer, first.answer, changed.answer]


def test_end_of_input_ends(capsys, monkeypatch):
    status, out, _ = interact(capsys, monkeypatch, ["颜色"], "--json")
    assert status == 0
    assert len(objects(out)) == 1


def test_error_ends_a_turn_not_the_conversation(capsys, monkeypatch, tmp_path):
    dot = tmp_path / "dot.png"
    PIL.Image.new("RGB", (1, 1)).save(dot)
    lines = ["/image", f"/image {dot}", "/image nowhere.png", "a" * 4000, "/help", "颜色"]
    status, out, err = interact(capsys, monkeypatch, lines, "--json")
    assert status == 0
    (turn,) = objects(out)
    assert turn["question"] == "颜色"
    errors = [line for line in err.splitlines() if line.startswith("viscpm-hf: error:")]
    assert len(errors) == 4
    for complaint, line in zip(("needs the path", "1x1", "nowhere.png", "4,0"), errors, strict=True):
        assert complaint in line
    assert "换一张图片" in err
    assert "Traceback" not in err


def test_running_out_of_memory_ends_a_turn_not_the_conversation(capsys, monkeypatch):
    ask, calls = VisCPMChat.ask, []

    def ask_once_too_much(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ask(*args, **kwargs)

    monkeypatch.setattr(VisCPMChat, "ask", ask_once_too_much)
    status, out, err = interact(capsys, monkeypatch, ["你好", "颜色"], "--json")
    assert status == 0 and len(objects(out)) == 1 and "CUDA out of memory" in err


def test_reference_mode_interactively(capsys, monkeypatch):
    status, out, _ = interact(capsys, monkeypatch, ["颜色"], "--mode", "reference", "--json")
    assert status == 0
    assert objects(out)[0]["answer"] == GOLDEN_A.load_chat().chat(IMAGE, "颜色", max_new_tokens=6)[0]


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("nowhere.bin", IMAGE, "a"), "nowhere.bin"),
        ((MODEL, "nowhere.png", "a"), "nowhere.png"),
        ((MODEL, MODEL, "a"), "pytorch_model.bin"),
        ((IMAGE, IMAGE, "a", "--vocab", str(GOLDEN_A.vocab)), "image_0.png"),
        ((str(GOLDEN / "paint_a" / "pytorch_model.bin"), IMAGE, "a"), "Paint"),
        ((MODEL, IMAGE, "a", "--config", "nowhere.json"), "nowhere.json"),
        ((MODEL, IMAGE, "a", "--vocab", "nowhere.txt"), "nowhere.txt"),
        ((MODEL, IMAGE, "a" * 4000), "4,030 tokens, more than the limit of 3,000"),
        ((MODEL, IMAGE, "a", "--mode", "reference", "--top-p", "0.5"), "--top-p .*--mode generate"),
        ((MODEL, IMAGE, "a", "--device", "abacus"), "The device 'abacus' can't be used"),
        ((MODEL, IMAGE, "a", "--device", "cuda:99"), "The device 'cuda:99' can't be used"),
    ],
)
def test_error_is_one_line_and_status_1(capsys, arguments, complaint):
    status, out, err = run(capsys, *arguments)
    assert status == 1
    assert [line.startswith("viscpm-hf: error: ") for line in err.splitlines()] == [True]
    assert re.search(complaint, err)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--max-new-tokens", "0"), "must be greater than 0, got 0"),
        (("--max-new-tokens", "-4"), "must be greater than 0, got -4"),
        (("--num-beams", "0"), "must be greater than 0, got 0"),
        (("--num-beams", "many"), "invalid int value: 'many'"),
        (("--mode", "best"), "invalid choice: 'best'"),
    ],
)
def test_bad_argument_is_status_2(capsys, arguments, complaint):
    with pytest.raises(SystemExit) as caught:
        main(["chat", MODEL, IMAGE, "a", *arguments])
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


def test_help_and_version(capsys):
    for arguments, expected in ((["--version"], "viscpm-hf "), (["chat", "--help"], "就一张图片")):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert expected in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- process


def process(*arguments, stdin: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [Path(sys.executable).with_name("viscpm-hf"), "chat", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
    )


def test_real_process():
    """Nothing but answers on standard output, nothing at all on standard error."""
    expected = GOLDEN_A.load_chat().chat(IMAGE, "图片是什么颜色？", max_new_tokens=6)[0]
    result = process(MODEL, IMAGE, "图片是什么颜色？", "--json", *SHORT)
    assert (result.returncode, result.stderr) == (0, "")
    assert objects(result.stdout)[0]["answer"] == expected


def test_real_process_fails_without_traceback():
    result = process("nowhere.bin", IMAGE, "a")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("viscpm-hf: error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["fp16", "half", "torch.float16"])
def test_other_names_of_a_dtype(capsys, name):
    options = ("--json", "--max-new-tokens", "2", "--device", "cpu")
    answers = [run(capsys, MODEL, IMAGE, "颜色", "--dtype", dtype, *options)[1] for dtype in (name, "float16")]
    assert objects(answers[0])[0]["answer"] == objects(answers[1])[0]["answer"]
