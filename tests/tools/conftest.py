"""The tools of other people, run for real on viscpm-tiny. `make tools` has them all; here a missing one is skipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import viscpm_hf
from viscpm_hf import CpmBeeForCausalLM, CpmBeeTokenizer, VisCPMChatForConditionalGeneration
from viscpm_hf.shapes import draw, make_scene


@pytest.fixture(scope="session")
def chat_folder() -> Path:
    return Path(viscpm_hf.tiny("chat"))


@pytest.fixture(scope="session")
def bee_folder(chat_folder, tmp_path_factory) -> Path:
    """The language model of viscpm-tiny alone, as CPM-Bee's own checkpoints are."""
    folder = tmp_path_factory.mktemp("cpm-bee")
    chat = VisCPMChatForConditionalGeneration.from_pretrained(chat_folder, dtype=torch.float32)
    bee = CpmBeeForCausalLM(chat.config.text_config)
    bee.model.load_state_dict(chat.model.language_model.state_dict())
    bee.save_pretrained(folder)
    CpmBeeTokenizer.from_pretrained(chat_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        draw(make_scene("test", number), 64).convert("RGB").save(path)
    return paths


@pytest.fixture(scope="session")
def run_python():
    """Runs `python ARGUMENTS` to its end; its output, or an assertion with the end of what it said."""

    def run(*arguments: object, timeout: int = 400) -> str:
        process = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_BUILD_OPS": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert process.returncode == 0, process.stdout[-3000:]
        return process.stdout

    return run
