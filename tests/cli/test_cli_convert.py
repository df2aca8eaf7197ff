"""The commands inspect, convert and publish, as a user types them."""

import json

import pytest
from support import Golden

from viscpm_hf.cli import main


@pytest.fixture(scope="module")
def source() -> Golden:
    return Golden("chat_a")


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_inspect_convert_publish(source, tmp_path, capsys):
    code, out, _ = run(capsys, "inspect", source.weights)
    assert code == 0 and "VisCPM-Chat, original file" in out and "viscpm-hf convert" in out

    output = tmp_path / "out"
    code, out, _ = run(capsys, "convert", source.weights, output, "--dry-run")
    assert code == 0 and "would write" in out and not output.exists()
    code, out, err = run(capsys, "convert", source.weights, output, "--verify", "--max-shard-size", "300KB")
    assert code == 0 and "to the bit" in out and "SHA-256" in out
    assert err == "", "no progress bar where nobody looks"
    code, out, _ = run(capsys, "convert", output, tmp_path / "again")
    assert code == 0 and "converted folder already" in out

    code, out, _ = run(capsys, "inspect", output, "--json")
    found = json.loads(out)
    assert code == 0 and found["kind"] == "chat" and found["is_sharded"] and found["is_complete"]

    code, out, _ = run(capsys, "publish", output, "owner/name", "--dry-run")
    assert code == 0 and "model.safetensors.index.json" in out and "would upload to owner/name" in out

    code, out, _ = run(capsys, "convert", output, tmp_path / "back", "--to", "original")
    assert code == 0 and (tmp_path / "back" / "pytorch_model.bin").is_file()


def test_options_reach_the_conversion(source, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    weights = moved / "weights.pt"
    weights.write_bytes(source.weights.read_bytes())
    arguments = ["--llm-config", source.folder / "cpm-bee.json", "--vision-config", source.folder / "vision.json"]
    code, _, err = run(capsys, "convert", weights, tmp_path / "out", *arguments)
    assert code == 1 and "--vocab" in err
    arguments += ["--vocab", source.vocab, "--dtype", "bfloat16"]
    code, _, _ = run(capsys, "convert", weights, tmp_path / "out", *arguments)
    assert code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("command", [("inspect",), ("convert", "OUT"), ("publish", "owner/name")])
def test_errors_are_one_line(tmp_path, capsys, command):
    name, *rest = command
    rest = [tmp_path / "out" if word == "OUT" else word for word in rest]
    code, out, err = run(capsys, name, tmp_path / "nowhere", *rest)
    assert code == 1 and not out
    assert err.startswith("viscpm-hf: error: There is no") and err.count("\n") == 1


def test_incomplete_is_told_by_the_exit_status(source, tmp_path, capsys):
    (tmp_path / "weights.bin").write_bytes(source.weights.read_bytes())
    code, out, _ = run(capsys, "inspect", tmp_path)
    assert code == 1 and "missing" in out and "vocab.txt" in out


def test_interrupted(source, tmp_path, capsys, monkeypatch):
    import viscpm_hf.conversion.convert as module

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "converted_pieces", interrupted)
    code, _, err = run(capsys, "convert", source.weights, tmp_path / "out")
    assert code == 130 and "interrupted" in err and not (tmp_path / "out").exists()
