"""Weights are quantised as they lie in their file, and of a large file nothing is left in memory."""

import contextlib
import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from viscpm_hf.loading import file_order
from viscpm_hf.loading.file_order import quantize_in_file_order


def resident_bytes(path) -> int:
    """How much of a file this process has in its memory."""
    size, is_of_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, value = line.split()[:2]
        if not name.endswith(":"):  # the next range of addresses
            is_of_file = line.endswith(str(path))
        elif is_of_file and name == "Rss:":
            size += 1024 * int(value)
    return size


def are_pages_given_back(folder) -> bool:
    """Whether the system takes pages of this folder's files out of memory: not of one that lies in memory itself."""
    path = folder / "probe"
    path.write_bytes(b"1" * 2**20)
    os.sync()
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
        assert sum(memory[:: mmap.PAGESIZE]) and resident_bytes(path)
        with contextlib.suppress(OSError):
            memory.madvise(file_order.MADV_PAGEOUT)
        return resident_bytes(path) < 2**19


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux")
@pytest.mark.parametrize("is_large", [True, False])
def test_what_was_read_of_a_large_file_is_given_back(monkeypatch, tmp_path, is_large):
    if is_large and not are_pages_given_back(tmp_path):
        pytest.skip("needs a temporary folder on a disk, and Linux 5.4")
    available = SimpleNamespace(available=2**20 if is_large else 2**40)
    monkeypatch.setattr(file_order.psutil, "virtual_memory", lambda: available)
    given = {name: torch.randn(512, 1024) for name in ("a", "b", "c")}
    path = tmp_path / "model.safetensors"
    save_file(given, path)
    os.sync()  # what isn't on the disk yet can't be given back
    with safe_open(path, framework="pt") as file:
        weights = {name: (file.get_tensor(name), 1.0) for name in ("c", "a")}
    weights["c"][0][0, 0] = 5  # which the file doesn't have
    weights["memory"] = given["b"].clone(), 1.0
    seen = []

    def quantize_one(name, target):
        seen.append(name)
        return {name: target.copy_(weights[name][0])}

    result = quantize_in_file_order(weights, lambda name: torch.empty(512, 1024), quantize_one)
    held = resident_bytes(path)
    assert held < 2**20 if is_large else held >= 2 * given["a"].nbytes
    assert sorted(seen) == sorted(result) == ["a", "c", "memory"]
    for name, (weight, _) in weights.items():
        assert torch.equal(result[name], weight), name
    assert weights["c"][0][0, 0] == 5 and torch.equal(weights["a"][0], load_file(path)["a"])
