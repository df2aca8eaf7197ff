"""Two processes that train together do what one does with accumulation."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chat_training_support import conversation, run_config, write_rows
from safetensors.torch import load_file

from viscpm_hf import VisCPMChat
from viscpm_hf.training import train_chat


pytestmark = pytest.mark.parametrize("golden", ["chat_a"], indirect=True, scope="session")

WORKER = Path(__file__).parent / "chat_worker.py"
OPTIONS = {"mode": "full", "max_steps": 4, "save_steps": 2, "warmup": 0, "learning_rate": 1e-3, "batch_size": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Answers of different lengths; and text, so that a process may have a batch without a picture. (A step of all
    processes has one: without any gradient an optimizer passes weights over, with one of 0 it lets them decay.)"""
    answers = ["red", "a b c", "circle red blue", "x"] * 4
    rows = [conversation("image_0.png" if n % 2 == 0 else None, ("q", answer)) for n, answer in enumerate(answers)]
    return write_rows(tmp_path_factory.mktemp("data") / "train.json", rows)


@pytest.fixture(scope="module")
def alone(golden, data, tmp_path_factory):
    """One process, whose batches are those of two."""
    folder = tmp_path_factory.mktemp("alone")
    result = train_chat(run_config(golden, data, folder / "out", accumulation=2, eval_data=[data], **OPTIONS))
    return folder / "out", [entry["loss"] for entry in result.log if "loss" in entry]


def run_together(configs: list[dict], **environment: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_DEVICE": "cpu",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(configs)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error[-3000:]


def options_of(golden, data, output, **options) -> dict:
    return vars(run_config(golden, data, output, eval_data=[data], **{**OPTIONS, **options}))


def assert_same_run(alone, output: Path) -> None:
    folder, losses = alone
    torch.testing.assert_close(json.loads((output / "losses.json").read_text()), losses, atol=1e-4, rtol=1e-4)
    ours, theirs = load_file(output / "model.safetensors"), load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


def test_two_processes(golden, data, alone, tmp_path):
    run_together([options_of(golden, data, tmp_path / "out")])
    assert_same_run(alone, tmp_path / "out")


def test_fsdp(golden, data, alone, tmp_path):
    """Sharded weights, gradients and optimizer; the result is an ordinary folder, checkpoints can be resumed."""
    options = options_of(golden, data, tmp_path / "out")
    again = {**options, "output": str(tmp_path / "again"), "resume": True, "continue_from": str(tmp_path / "out")}
    run_together(
        [options, again],
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_TRANSFORMER_CLS_TO_WRAP="CpmBeeDecoderLayer,Beit3Layer",
        FSDP_RESHARD_AFTER_FORWARD="true",
        FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT",
        FSDP_CPU_RAM_EFFICIENT_LOADING="false",
    )
    assert list((tmp_path / "out" / "checkpoints").rglob("*.distcp"))  # sharded, in truth
    assert_same_run(alone, tmp_path / "out")
    assert_same_run(alone, tmp_path / "again")
    assert VisCPMChat(tmp_path / "out", device="cpu").chat(golden.image(0), "?", max_new_tokens=2)[0] is not None
