"""Checkpoints in the original's format, converted ones, and small files to spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support import GOLDEN, Golden

from viscpm_hf import convert


PAINT = GOLDEN / "paint_a"


@pytest.fixture(scope="session")
def converted(golden, tmp_path_factory) -> Path:
    """The checkpoint converted, in four shards, and verified."""
    folder = tmp_path_factory.mktemp("converted") / golden.name
    convert(golden.weights, folder, max_shard_size=golden.weights.stat().st_size // 3, verify=True)
    return folder


@pytest.fixture
def own_converted(converted, tmp_path) -> Path:
    """As `converted`, for a test that changes files."""
    return Path(shutil.copytree(converted, tmp_path / "own converted"))


@pytest.fixture(scope="session")
def half_golden(golden, tmp_path_factory) -> Path:
    """The checkpoint in fp16, as the released ones are."""
    folder = tmp_path_factory.mktemp("half") / golden.name
    shutil.copytree(golden.folder, folder, ignore=shutil.ignore_patterns("*.bin", "expected*"))
    torch.save({name: tensor.half() for name, tensor in golden.state_dict().items()}, folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def small_original(tmp_path) -> Path:
    """A folder with the files of one golden checkpoint, for a test that changes them."""
    golden = Golden("chat_a")
    folder = tmp_path / "original"
    shutil.copytree(golden.folder, folder, ignore=shutil.ignore_patterns("expected*", "*.png"))
    return folder


@pytest.fixture(scope="session")
def converted_paint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "paint_a"
    convert(PAINT / "pytorch_model.bin", folder, max_shard_size="1MB", verify=True)
    return folder
