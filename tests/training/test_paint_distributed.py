"""Two processes that train Paint together do what one does with accumulation, and share the encoding."""

import os
import socket
import subprocess
import sys

import torch
from paint_training_support import run_config, save_pipeline, tensors_of, write_captions

from viscpm_hf.training import train_paint


def run_together(command: list[str]) -> None:
    """As `accelerate launch` on two GPUs, but on the CPU, for which it wants MPI."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_DEVICE": "cpu",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error[-3000:]


def test_two_processes_equal_one_with_accumulation(tmp_path):
    model, data = save_pipeline(tmp_path / "model"), write_captions(tmp_path / "data")
    alone = run_config(
        model,
        data,
        tmp_path / "alone",
        batch_size=2,
        accumulation=2,
        max_steps=2,
        train_projection=True,
        ema_decay=0.9,
    )
    train_paint(alone)
    command = [
        *(sys.executable, "-m", "viscpm_hf.cli", "train", "paint", "--model", str(model), "--data", data),
        *("--output", str(tmp_path / "together"), "--batch-size", "2", "--max-steps", "2", "--train-projection"),
        *("--learning-rate", str(alone.learning_rate), "--ema-decay", "0.9", "--no-tensorboard"),
    ]
    run_together(command)
    for part in ("unet", "text_encoder"):
        ours, theirs = tensors_of(tmp_path / "together" / part), tensors_of(tmp_path / "alone" / part)
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=5e-5, msg=name)
    # Each process has encoded its share: two files of either kind.
    for kind in ("prompts", "pictures"):
        assert len(list((tmp_path / "together" / "cache").glob(f"{kind}-*/*.safetensors"))) == 2
