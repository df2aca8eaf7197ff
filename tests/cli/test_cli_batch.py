"""`viscpm-hf batch`: whole runs, cut off and gone on with."""

import json
import os
import signal
import subprocess
import sys

import paint_support
import PIL.Image
import pytest
from support import Golden

from viscpm_hf.cli.main import main


GOLDEN_A = Golden("chat_a")
MODEL = str(GOLDEN_A.weights)
PAINT_MODEL = str(paint_support.PAINT / "pytorch_model.bin")
CPU = ("--device", "cpu")
LENGTH = ("--max-new-tokens", "5")


def write_questions(folder, count: int, *more) -> str:
    path = folder / "in.jsonl"
    rows = [
        {"id": f"q{index}", "image": str(GOLDEN_A.image(index % 3)), "question": "颜色" * (index * 5 % 7)}
        for index in range(count)
    ]
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([*lines[:1], *more, *lines[1:]]) + "\n", "utf-8")
    return str(path)


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "viscpm_hf.cli", "batch", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_lines(process: subprocess.Popen, part, count: int) -> None:
    while not part.is_file() or part.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stderr.read()
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_run_and_the_same_again(tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    poisoned = [
        '{"id": "broken", "image": "broken.png", "question": "月"}',
        "no JSON",
        '{"id": "x", "image": "none.png"}',
    ]
    source, output = write_questions(tmp_path, 9, *poisoned), tmp_path / "out.jsonl"
    arguments = ["batch", MODEL, source, str(output), "--batch-size", "4", *CPU, *LENGTH]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "12 rows, 3 errors" in captured.out and "3 rows failed; --retry-errors" in captured.err
    rows = read(output)
    assert [row["id"] for row in rows] == ["q0", "broken", None, "x", *(f"q{index}" for index in range(1, 9))]
    assert rows[2]["line"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "broken.png", "in.jsonl", "out.jsonl", "out.jsonl.settings.json",
    ]  # fmt: skip
    before = output.read_bytes()
    assert main(arguments) == 0
    assert output.read_bytes() == before
    assert main([*arguments, "--mode", "generate"]) == 1
    assert "begun with other settings: mode was 'reference'" in capsys.readouterr().err
    # Mended, the row gets its answer; the others keep theirs.
    PIL.Image.open(GOLDEN_A.image(0)).save(tmp_path / "broken.png")
    assert main([*arguments, "--retry-errors"]) == 0
    again = read(output)
    assert "answer" in again[1] and "error" in again[3]
    assert [row for index, row in enumerate(again) if index != 1] == [
        row for index, row in enumerate(rows) if index != 1
    ]


def test_rows_may_be_added(tmp_path):
    output = tmp_path / "out.jsonl"
    assert main(["batch", MODEL, write_questions(tmp_path, 3), str(output), *CPU, *LENGTH]) == 0
    first = read(output)
    source = write_questions(tmp_path, 5, '{"id": "new", "question": "月"}')
    assert main(["batch", MODEL, source, str(output), *CPU, *LENGTH]) == 0
    rows = read(output)
    assert [row["id"] for row in rows] == ["q0", "new", "q1", "q2", "q3", "q4"]
    assert [rows[0], *rows[2:4]] == first


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_cut_off_goes_on(tmp_path, capsys, how):
    source, output = write_questions(tmp_path, 40), tmp_path / "out.jsonl"
    options = ["--batch-size", "2", *CPU, "--max-new-tokens", "60"]
    process = start(MODEL, source, output, *options)
    part = tmp_path / "out.jsonl.parts" / "part-00000.jsonl"
    wait_for_lines(process, part, 6)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert not output.exists()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "of 40 rows are finished; the same command goes on" in err and "Traceback" not in err
    else:
        assert process.returncode == -signal.SIGKILL
    done = [json.loads(line) for line in part.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 6 <= len(done) < 40
    # As if killed in the middle of a line; and marked, to see that what is finished isn't done again.
    done[0]["answer"] = "not done again"
    part.write_text("".join(f"{json.dumps(row)}\n" for row in done) + '{"id": "q39", "ans')
    with pytest.raises(SystemExit):
        main(["batch"])
    assert main(["batch", MODEL, source, str(output), *options, "--mode", "generate"]) == 1
    assert "begun with other settings: mode was 'reference'" in capsys.readouterr().err
    assert main(["batch", MODEL, source, str(output), *options]) == 0
    rows = read(output)
    assert [row["id"] for row in rows] == [f"q{index}" for index in range(40)]
    assert next(row for row in rows if row["id"] == done[0]["id"]) == done[0]
    assert not part.parent.exists()
    whole = tmp_path / "whole.jsonl"
    assert main(["batch", MODEL, source, str(whole), *options]) == 0
    assert [row for row in read(whole) if row["id"] != done[0]["id"]] == [
        row for row in rows if row["id"] != done[0]["id"]
    ]


def test_two_processes_are_one(tmp_path):
    source = write_questions(tmp_path, 13, '{"id": "bad", "image": "none.png", "question": "月"}')
    options = ["--batch-size", "3", *CPU, *LENGTH]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert main(["batch", MODEL, source, str(one), *options]) == 0
    process = start(MODEL, source, two, *options, "--num-processes", "2")
    parts = tmp_path / "two.jsonl.parts"
    for name in ("part-00000.jsonl", "part-00001.jsonl"):
        wait_for_lines(process, parts / name, 1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.count("14 rows, 1 error") == 1
    assert two.read_bytes() == one.read_bytes()
    assert not parts.exists()


def test_a_process_that_fails_ends_the_run(tmp_path):
    source = write_questions(tmp_path, 8)
    broken = tmp_path / "model.bin"
    broken.write_bytes(GOLDEN_A.weights.read_bytes())
    process = start(broken, source, tmp_path / "out.jsonl", *CPU, "--num-processes", "2", "--batch-size", "2")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "There is no vocabulary" in err and "of 2 ended with 1" in err
    assert "Traceback" not in err


def test_prompts(tmp_path, capsys):
    source, output, images = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "images"
    rows = [{"id": 1, "prompt": "蓝色"}, {"id": "b/c", "prompt": "红", "seed": 9}, {"id": 3, "prompt": ""}]
    source.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    alone = ["--no-rank", "--no-check-prompt", "--no-check-image", "--steps", "2", "--seed", "5", *CPU]
    command = ["batch", PAINT_MODEL, str(source), str(output), *alone]
    assert main(command) == 1
    assert "--images-out DIR" in capsys.readouterr().err
    assert main([*command, "--images-out", str(images)]) == 0
    found = read(output)
    assert [row.get("seed") for row in found] == [5, 9, None]
    assert "The prompt is empty" in found[2]["error"]
    assert sorted(path.name for path in images.iterdir()) == sorted(row["file"] for row in found[:2])
    assert found[0]["file"] == "1.png"


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "3"], "--steps is for VisCPM-Paint"),
        (["--top-p", "0.5", "--mode", "reference"], "--top-p needs sampling"),
        (["--images", "nowhere"], "There is no folder nowhere of images"),
        (["--batch-size", "0"], "must be greater than 0"),
        (["--num-processes", "2", "--device", "cpu:0"], "can't all run on cpu:0"),
    ],
)
def test_bad_arguments(tmp_path, capfd, arguments, message):
    source = write_questions(tmp_path, 2)
    try:
        assert main(["batch", MODEL, source, str(tmp_path / "out.jsonl"), *arguments]) == 1
    except SystemExit as exit:
        assert exit.code == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_bad_files(tmp_path, capsys):
    source, output = write_questions(tmp_path, 2), tmp_path / "out.jsonl"

    def error_of(*arguments) -> str:
        assert main(["batch", *map(str, arguments)]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert "nowhere.jsonl" in error_of(MODEL, tmp_path / "nowhere.jsonl", output)
    assert "is the input" in error_of(MODEL, source, source)
    assert "is a folder" in error_of(MODEL, source, tmp_path)
    assert "There is no folder" in error_of(MODEL, source, tmp_path / "no" / "out.jsonl")
    assert "There is no checkpoint" in error_of(tmp_path / "none.bin", source, output)
    assert 'line 2 has the id "q0" of line 1' in error_of(MODEL, write_questions(tmp_path, 2, '{"id": "q0"}'), output)
    write_questions(tmp_path, 2)
    output.write_text('{"id": "q0", "question": "mine"}\n')
    assert "is no result of a batch run" in error_of(MODEL, source, output, *CPU)
    assert output.read_text() == '{"id": "q0", "question": "mine"}\n'
