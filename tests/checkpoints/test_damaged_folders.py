"""Damaged folders of weights, adapters, runs and checkpoints: one sentence that names the file, or the one before."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from support import GOLDEN

import viscpm_hf
from viscpm_hf import VisCPMChat, VisCPMPaint
from viscpm_hf.batch.results import Results
from viscpm_hf.checkpoints.headers import LFS_POINTER
from viscpm_hf.cli import main
from viscpm_hf.training.output import last_checkpoint


IMAGE = str(GOLDEN / "chat_a" / "image_0.png")


class Attack:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "cut": cut,
    "empty": lambda path: os.truncate(path, 0),
    "pointer": lambda path: path.write_bytes(LFS_POINTER + b"v1\noid sha256:abc\nsize 123\n"),
    "page": lambda path: path.write_text("<html>404</html>" * 20),
}


@pytest.fixture
def chat(tmp_path):
    return Path(shutil.copytree(viscpm_hf.tiny("chat"), tmp_path / "chat"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_named(chat, capsys, damage):
    DAMAGES[damage](chat / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors") as error:
        VisCPMChat(chat, device="cpu")
    assert ("git lfs pull" in str(error.value)) == (damage == "pointer")
    assert main(["chat", str(chat), IMAGE, "hi"]) == 1
    error = capsys.readouterr().err
    assert "viscpm-hf: error: " in error and "model.safetensors" in error


def test_damaged_parts_of_paint_are_named(tmp_path):
    for part, file in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        folder = Path(shutil.copytree(viscpm_hf.tiny("paint"), tmp_path / part))
        cut(folder / part / f"{file}.safetensors")
        with pytest.raises(ValueError, match=f"{part}/{file}.safetensors"):
            VisCPMPaint(
                folder, device="cpu", image_safety_checker=False, prompt_safety_checker=False, add_ranker=False
            )


def test_a_pickle_in_place_of_weights_runs_nothing(chat, capsys, tmp_path):
    (chat / "model.safetensors").unlink()
    mark = tmp_path / "it ran"
    torch.save({"lm_head.weight": Attack(mark)}, chat / "pytorch_model.bin")
    assert main(["chat", str(chat), IMAGE, "hi"]) == 1
    error = capsys.readouterr().err
    assert "pytorch_model.bin was refused" in error and "weights_only" not in error
    assert not mark.exists()


@pytest.mark.parametrize("content", ["[]", "3", "{", "", "null", "[" * 100_000])
def test_settings_that_are_none(tmp_path, content):
    results = Results(tmp_path / "out.jsonl")
    results.settings.write_text(content)
    with pytest.raises(ValueError, match=r"out.jsonl.settings.json doesn't hold the settings.*--overwrite"):
        results.check_settings({"model": "a"})


CHECKPOINT = {"trainer_state.json": None, "model.safetensors": None, "optimizer.pt": None, "rng_state.pth": None}


def write_checkpoint(folder: Path) -> None:
    folder.mkdir(parents=True)
    shutil.copy(Path(viscpm_hf.tiny("chat")) / "model.safetensors", folder)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    for name in ("optimizer.pt", "rng_state.pth"):
        torch.save({"state": torch.ones(3)}, folder / name)


@pytest.mark.parametrize("name", CHECKPOINT)
@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_a_cut_checkpoint_is_passed_over(tmp_path, name, damage):
    first, second = (tmp_path / f"checkpoint-{number}" for number in (1, 2))
    write_checkpoint(first), write_checkpoint(second)
    assert last_checkpoint(tmp_path) == second
    DAMAGES[damage](second / name)
    assert last_checkpoint(tmp_path) == first
    (first / name).unlink()
    assert (last_checkpoint(tmp_path) is None) == (name == "trainer_state.json")
