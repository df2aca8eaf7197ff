"""Weights quantised as they lie in their mapped file, several at once, about as fast as a disk delivers them."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm

from ..checkpoints.transfer import one_torch_thread
from ..modeling.huge_pages import empty_in_huge_pages


# Linux's number for taking pages out of memory that can be read again.
MADV_PAGEOUT = 21


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of that shape and dtype in memory; the given one may be on the meta device."""
    # Making and reading so much memory takes far less time so.
    return empty_in_huge_pages(tensor.shape, tensor.dtype)


def quantize_in_file_order(
    weights: Mapping[str, tuple[torch.Tensor, float]],
    empty: Callable[[str], Any],
    quantize_one: Callable[[str, Any], dict[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """What `quantize_one(name, empty(name))` returns for all weights, as one mapping.

    Args:
        weights: `{name: (weight (rows, columns), factor it is to be multiplied by)}`.
    """
    names = sorted(weights, key=lambda name: weights[name][0].data_ptr())
    # Allocated in this thread: what is freed in another's arena, as by a first forward, isn't used again by this one.
    targets = [empty(name) for name in names]
    quantized: dict[str, torch.Tensor] = {}
    files = _mapped_files()
    mapped = {name for name in names if any(weights[name][0].data_ptr() in file for file in files)}
    # A file that would fill most of the memory isn't kept there: what was read is given back at once and used again,
    # which the system would otherwise have to look for.
    if 2 * sum(weights[name][0].nbytes for name in mapped) < psutil.virtual_memory().available:
        mapped.clear()

    def quantize_and_release(name: str, target: Any) -> dict[str, torch.Tensor]:
        part = quantize_one(name, target)
        if name in mapped:
            _release(weights[name][0])
        return part

    # A weight a thread; more than there are cores, for those that wait for the disk.
    with ThreadPoolExecutor(torch.get_num_threads() + 3) as pool, one_torch_thread():
        parts = pool.map(quantize_and_release, names, targets)
        for part in tqdm(parts, total=len(names), desc="quantising", disable=None):
            quantized |= part
    return quantized


def _mapped_files() -> list[range]:
    """Where in this process's memory there are files; nowhere if the system isn't Linux."""
    if sys.platform != "linux":
        return []
    found = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            place, _, _, _, inode, *_ = line.split()
            if inode != "0":
                found.append(range(*(int(address, 16) for address in place.split("-"))))
    return found


def _release(weight: torch.Tensor) -> None:
    """Takes a mapped weight out of memory, unless another process has it there; its values stay what they are."""
    begin = weight.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = weight.data_ptr() + weight.nbytes - begin
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), MADV_PAGEOUT)
