"""`viscpm-hf export`: the programs answer as the model does, run by ExecuTorch's Python runtime."""

import json
import shutil
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch

from viscpm_hf import SiblingChat
from viscpm_hf.cli.main import main


sys.path.append(str(Path(__file__).parents[1] / "siblings"))

from sibling_folders import write_folder  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder("minicpmv-2.0", tmp_path_factory.mktemp("minicpmv"))


@pytest.fixture(scope="module")
def chat(folder) -> SiblingChat:
    return SiblingChat(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    pytest.importorskip("executorch", reason="executorch is not installed")
    from viscpm_hf.conversion.executorch_run import ExportedModel

    out = tmp_path_factory.mktemp("exported") / "out"
    views = ("--view", "56x56", "--view", "42x70")
    assert main(["export", str(folder), str(out), *views, "--context", "200", "--verify"]) == 0
    return ExportedModel(out)


def greedy(chat: SiblingChat, inputs: dict[str, torch.Tensor], count: int) -> list[int]:
    ids = chat.model.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        max_new_tokens=count,
        eos_token_id=chat.processor.tokenizer.eos_token_id,
    )
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("size", [(60, 60), (70, 42), None], ids=str)
def test_answers_are_the_models(exported, chat, size):
    """Each conversation anew, in whatever view its picture is."""
    image = PIL.Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 90).convert("RGB") if size else None
    inputs = exported.inputs(image, "这是什么？")
    if size is not None:
        assert tuple(inputs["pixel_values"].shape[-2:]) == ((56, 56) if size == (60, 60) else (42, 70))
    assert exported.generate(**inputs, max_new_tokens=12) == greedy(chat, inputs, 12)
    assert isinstance(exported.chat(image, "What is it?", max_new_tokens=3), str)


def test_long_prompts_go_in_pieces(exported, chat):
    ids = torch.randint(130, 400, (1, exported.chunk + 20), generator=torch.Generator().manual_seed(0))
    assert exported.generate(ids, max_new_tokens=8) == greedy(chat, {"input_ids": ids}, 8)
    with pytest.raises(ValueError, match="200 tokens, and 201 are needed"):
        exported.logits(exported.embeddings(ids.repeat(1, 2)[:, :201]))
    with pytest.raises(ValueError, match="56x56, 42x70"):
        exported.image_features(torch.zeros(1, 3, 70, 70))


def test_quantised_weights_are_small_and_answer_as_in_torch(exported, folder, tmp_path, capsys):
    pytest.importorskip("torchao", reason="torchao is not installed")
    out = tmp_path / "out"
    assert main(["export", str(folder), str(out), "--quantization", "int4", "--context", "64", "--verify"]) == 0
    assert "from torch's" in capsys.readouterr().out
    assert json.loads((out / "export.json").read_text())["quantization"] == "int4"
    for part, times in (("vision", 2.5), ("token_embedding", 3.5), ("language_model", 5.5)):
        assert (out / f"{part}.pte").stat().st_size * times < (exported.folder / f"{part}.pte").stat().st_size
    from viscpm_hf.conversion.executorch import _quantize
    from viscpm_hf.conversion.executorch_run import ExportedModel

    chat = SiblingChat(folder, device="cpu", dtype="float32")
    _quantize(chat.model.requires_grad_(False), "int4")
    small = ExportedModel(out)
    inputs = small.inputs(PIL.Image.new("RGB", (60, 60), "red"), "What is it?")
    assert small.generate(**inputs, max_new_tokens=12) == greedy(chat, inputs, 12)


def test_what_cannot_be_exported_is_said(folder, tmp_path, capsys):
    """And nothing is written."""
    out = tmp_path / "out"
    other = write_folder("omnilmm", tmp_path / "omnilmm")
    for model, option, words in (
        (other, (), "export takes MiniCPM-V 1.0 and 2.0, and"),
        (folder, ("--view", "50x56"), "multiples of the patch size 14, and 50x56 isn't"),
        (folder, ("--context", "1000000"), "got 1000000"),
    ):
        assert main(["export", str(model), str(out), *option]) == 1
        assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_library_that_is_missing_is_said_before_weights_are_read(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", None)
    without = tmp_path / "without"
    shutil.copytree(folder, without, ignore=shutil.ignore_patterns("*.safetensors"))
    assert main(["export", str(without), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "needs executorch" in said and "[executorch]" in said
