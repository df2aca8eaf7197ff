"""`convert --quantize`: folders that are quantised, and what is said of them."""

import json

import pytest
import quantization_support
import torch
from support import Golden

from viscpm_hf import ConversionError, VisCPMChat, VisCPMPaint, convert, inspect
from viscpm_hf.cli import main
from viscpm_hf.conversion.quantized import convert_quantized


IMAGE = Golden("chat_a").image(0)
GREEDY = {"mode": "generate", "max_new_tokens": 4}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return quantization_support.write_chat(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    output = tmp_path_factory.mktemp("nf4") / "chat"
    convert_quantized(original, output, "nf4", dtype="float32")
    return output


def weights(chat: VisCPMChat) -> dict[str, torch.Tensor]:
    return chat.model.state_dict()


def test_the_folder_is_what_loading_makes(original, folder):
    chat, direct = VisCPMChat(folder, device="cpu"), VisCPMChat(
        original, device="cpu", dtype="float32", quantization="nf4"
    )  # fmt: skip
    ours, theirs = weights(chat), weights(direct)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert chat.ask(IMAGE, "颜色", **GREEDY).answer == direct.ask(IMAGE, "颜色", **GREEDY).answer
    manifest = json.loads((folder / "conversion.json").read_text("utf-8"))
    assert manifest["quantization"] == "nf4" and manifest["source"]["file"] == "pytorch_model.bin"
    assert "--quantize nf4" in (folder / "README.md").read_text("utf-8")


def test_a_converted_folder_is_quantised(original, tmp_path):
    convert(original, tmp_path / "full")
    result = convert_quantized(tmp_path / "full", tmp_path / "int8", "8bit")
    assert result.kind == "chat" and result.files.keys() == {"model.safetensors"}
    assert VisCPMChat(tmp_path / "int8", device="cpu").model.is_quantized


def test_paint(tmp_path):
    original = quantization_support.write_paint(tmp_path / "original")
    convert_quantized(original.parent, tmp_path / "paint", "nf4")
    painter = VisCPMPaint(
        tmp_path / "paint", image_safety_checker=False, prompt_safety_checker=False, add_ranker=False, device="cpu"
    )
    assert painter.pipeline.text_encoder.is_quantized
    painter.generate("猫", generator=0, num_inference_steps=1)
    found = inspect(tmp_path / "paint")
    assert found.is_complete and found.quantization == "4 bits (nf4, bitsandbytes)"


def test_inspect_tells(folder, original, tmp_path):
    convert(original, tmp_path / "full")  # padded to the model's rows, as the quantised one is
    found, before = inspect(folder), inspect(tmp_path / "full")
    assert found.is_complete and found.quantization == "4 bits (nf4, bitsandbytes)"
    before_parts = {part: count for part, count in before.parameters.items() if part != "other"}
    assert found.parameters["language model"] == before_parts["language model"]
    (folder.parent / "broken").mkdir()
    for file in folder.iterdir():
        if file.suffix == ".json":
            (folder.parent / "broken" / file.name).write_bytes(file.read_bytes())
    assert not inspect(folder.parent / "broken").is_complete


def test_the_command_line(original, tmp_path, capsys):
    output = tmp_path / "int8"
    assert main(["convert", str(original), str(output), "--quantize", "8bit"]) == 0
    assert main(["inspect", str(output)]) == 0
    assert "8 bits (packed)" in capsys.readouterr().out
    assert main(["chat", str(output), str(IMAGE), "颜色", "--json", "--device", "cpu", "--max-new-tokens", "3"]) == 0
    from_folder = json.loads(capsys.readouterr().out)
    options = ["--quantization", "8bit", "--device", "cpu", "--dtype", "float16", "--max-new-tokens", "3"]
    assert main(["chat", str(original), str(IMAGE), "颜色", "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out)["question"] == from_folder["question"]


@pytest.mark.parametrize("option", ["--resume", "--verify", "--dry-run"])
def test_options_that_need_single_files(original, tmp_path, capsys, option):
    assert main(["convert", str(original), str(tmp_path / "out"), "--quantize", "nf4", option]) == 1
    assert option in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_there_is_no_way_back(folder, tmp_path):
    with pytest.raises(ConversionError, match="quantised to 4 bits .* can't be had back"):
        convert(folder, tmp_path / "original", to="original")
    with pytest.raises(ConversionError, match="is quantised already"):
        convert_quantized(folder, tmp_path / "again", "8bit")


def test_nothing_is_left_of_a_failure(golden, tmp_path):
    with pytest.raises(ValueError, match="4-bit weights need multiples"):
        convert_quantized(golden.weights, tmp_path / "out", "nf4", vocab=golden.vocab)
    assert not list(tmp_path.iterdir())
