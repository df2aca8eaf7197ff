"""`viscpm-hf train chat` and `viscpm-hf train merge`."""

import argparse
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from chat_training_support import colour_rows, write_rows

from viscpm_hf.cli import main
from viscpm_hf.training import ChatTrainingConfig
from viscpm_hf.training.options import (
    add_config_options,
    check_types,
    config_from_arguments,
    option,
    read_yaml,
)


one_size = pytest.mark.parametrize("golden", ["chat_a"], indirect=True, scope="session")


@pytest.fixture
def options(golden, tmp_path) -> list[str]:
    data = write_rows(tmp_path / "train.json", [*colour_rows(4), {"bad": "row"}])
    return [
        "--model", str(golden.weights), "--data", data, "--images", str(golden.folder), "--output",
        str(tmp_path / "out"), "--min-image-side", "2", "--batch-size", "4", "--log-steps", "1", "--no-tensorboard",
    ]  # fmt: skip


@one_size
def test_train_and_merge(golden, options, tmp_path, capsys):
    assert main(["train", "chat", *options, "--lora", "--epochs", "1", "--eval-data", options[3]]) == 0
    output = capsys.readouterr().out
    assert "step 2/2  loss " in output and "step 2/2  held-out loss " in output
    assert "not trained: 1 bad, 0 too long, 0 with too small pictures" in output
    assert f"wrote {tmp_path / 'out'}: 2 steps" in output
    merged = str(tmp_path / "merged")
    assert main(["train", "merge", "--model", str(golden.weights), "--adapter", str(tmp_path / "out"), merged]) == 0
    assert capsys.readouterr().out == f"wrote {merged}\n"
    assert main(["chat", merged, str(golden.image(0)), "?", "--max-new-tokens", "2"]) == 0


@one_size
def test_errors_are_one_line(options, tmp_path, capsys):
    cases = [
        (["--bad-rows", "fail"], "train.json line 5: neither 'conversations' nor 'caption'"),
        (["--max-length", "3"], "Nothing of"),
        (["--data", "missing.json"], "no training data at missing.json"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
    ]
    for more, message in cases:
        assert main(["train", "chat", *options, *more]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("viscpm-hf: error: ") and message in error
        assert not (tmp_path / "out").exists()


@one_size
def test_stopped_by_ctrl_c_and_resumed(options, tmp_path):
    """In a process of its own, as a shell would do it."""
    command = [sys.executable, "-m", "viscpm_hf.cli", "train", "chat", *options, "--full", "--max-steps", "2000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGINT)
            break
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors[-2000:]
    assert "the same command with --resume goes on from there" in output
    assert list((tmp_path / "out" / "checkpoints").glob("checkpoint-*/trainer_state.json"))
    assert not (tmp_path / "out" / "config.json").exists()


# ------------------------------------------------------------------------------------------------------------- options


@dataclass
class Example:
    name: str = option("x", "a name / 名字")
    rate: float | None = option(None, "a rate / 比率")
    files: list[str] = option([], "some files / 文件")
    flag: bool = option(False, "a flag / 开关")
    kind: str = option("a", "a kind / 种类", choices=("a", "b"))

    def __post_init__(self):
        check_types(self)


def parse(*words: str) -> Example:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    add_config_options(parser, Example)
    return config_from_arguments(Example, parser.parse_args(words))


def test_given_options_over_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("rate: 1e-4\nfiles: [a, b]\nflag: true\n")
    assert parse() == Example()
    assert parse("--config", str(file)) == Example(rate=1e-4, files=["a", "b"], flag=True)
    given = parse("--config", str(file), "--rate", "2", "--no-flag", "--files", "c")
    assert given == Example(rate=2.0, files=["c"], flag=False)


def test_the_example_is_valid():
    values = read_yaml(Path(__file__).parents[2] / "examples" / "train.yaml", ChatTrainingConfig)
    config = ChatTrainingConfig(**values)
    assert config.learning_rate == 2e-4 and config.eval_data == ["eval.json"] and config.resume


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raet: 1", "unknown option 'raet'. Did you mean 'rate'?"),
        ("zzzzzz: 1", "Options are: files, flag, kind, name, rate"),
        ("rate: fast", "rate must be of type float, got 'fast'"),
        ("flag: 3", "flag must be of type bool, got 3"),
        ("name: [1]", "name must be of type str"),
        ("- a\n- b", "should hold `option: value` lines"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "train.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        parse("--config", str(file))
    assert message in str(error.value) and str(file) in str(error.value)


def test_choices():
    with pytest.raises(ValueError, match="kind is one of a, b, got 'c'"):
        Example(kind="c")
