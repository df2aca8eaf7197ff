"""`viscpm-hf memory`."""

import json
import shlex

import paint_support
import pytest
from support import Golden

from viscpm_hf.cli.main import build_parser, main


MODEL = str(Golden("chat_a").weights)
PAINT_MODEL = str(paint_support.PAINT / "pytorch_model.bin")
MACHINE = ("--gpu", "8GB", "--ram", "16GB")


def test_a_table_and_the_command_for_the_machine(capsys):
    assert main(["memory", MODEL, *MACHINE]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "VisCPM-Chat" in lines[0] and "3 beams" in lines[1] and lines[2] == "GPU 8 GB, RAM 16 GB"
    table = [line for line in lines if line.startswith(("fp32", "half", "int8", "nf4", "int4"))]
    assert len(table) == 4 + 4 + 2 + 2 - 2  # everything fits: nothing is streamed
    assert all(line.rstrip().endswith("yes") for line in table)
    # What it recommends is a command line that there is.
    command = shlex.split(lines[-1])
    arguments = build_parser().parse_args(command[1:])
    assert (arguments.model, arguments.device) == (MODEL, "cuda")


def test_every_recommended_command_is_one(capsys):
    for model, options in ((MODEL, ["--beams", "1", "--length", "20"]), (PAINT_MODEL, ["--candidates", "2"])):
        assert main(["memory", model, *MACHINE, *options, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["advice"] == plan["best"]["command"]
        for row in plan["rows"]:
            words = [word for word in shlex.split(row["command"]) if not word.startswith("CUDA_MEMORY_CPMBEE_MAX=")]
            arguments = build_parser().parse_args(words[1:])
            assert arguments.command == plan["kind"]
            assert row["weights"] > 0 and row["peak_ram"] > 0


def test_paint(capsys):
    assert main(["memory", PAINT_MODEL, *MACHINE]) == 0
    out = capsys.readouterr().out
    assert "UNet" in out and "s/image" in out and "4 candidates" in out and "ranker" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([MODEL, "--steps", "3"], "--steps means nothing to"),
        ([PAINT_MODEL, "--beams", "3", "--length", "9"], "--length, --beams means nothing to"),
        ([MODEL, "--gpu", "huge"], "--gpu is a size (8GB), none, or one of H200"),
        ([MODEL, "--ram", "-3GB"], "expected one argument"),
        ([MODEL, "--ram", "x"], "--ram is a number of bytes"),
        ([MODEL, "--length", "0"], "must be greater than 0"),
        (["nobody/nothing"], "neither a path here nor in the Hub's cache"),
        (["./nowhere.bin"], "There is no checkpoint at ./nowhere.bin"),
        ([MODEL, "--gpu", "none", "--ram", "50MB"], "fits nowhere on this machine (no GPU, RAM 50 MB)"),
    ],
)
def test_bad_input(capsys, arguments, message):
    try:
        assert main(["memory", *arguments]) == 1
    except SystemExit as exit:
        assert exit.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["openbmb/VisCPM-Chat:v1.1", "openbmb/VisCPM-Chat/pytorch_model.zhplus.bin"])
def test_alternatives_of_a_released_repository(capsys, name):
    sizes = []
    for model in (name, "openbmb/VisCPM-Chat"):
        assert main(["memory", model, "--gpu", "24GB", "--ram", "32GB", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["model"] == model
        sizes.append(found["parameters"])
    assert sizes[0] == sizes[1]
    assert main(["memory", "openbmb/VisCPM-Chat:v7"]) == 1
    assert "has no release 'v7'" in capsys.readouterr().err
