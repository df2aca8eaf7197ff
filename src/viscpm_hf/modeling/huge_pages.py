"""Weights in huge pages, since with pages of 4 KB a third of a decoding step goes into finding them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from collections.abc import Iterable

import torch
from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)

PAGE, HUGE_PAGE_BYTES = 2**12, 2**21
# Bytes of weights that lie in one piece of memory, at least.
ROOM = 2**26


def put_into_huge_pages(parameters: Iterable[nn.Parameter]) -> None:
    """Moves weights on the CPU into memory that the system backs by huge pages, one after another; elsewhere than on
    Linux, and where they would not fit beside memory that others hold on to, nothing happens."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    try:
        advised, available = advised_ranges(), available_bytes()
    except OSError as error:  # not every kernel and container has them
        logger.info(f"Weights stay where they are: {error}")
        return
    weights = [
        weight
        for weight in parameters
        if type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and not weight.is_shared()  # other processes have it too
        and not weight.is_inference()  # which can't be moved
        and not any(weight.data_ptr() in places for places in advised)
    ]
    shared = sum(weight.nbytes for weight in weights if weight.untyped_storage().nbytes() > weight.nbytes + PAGE)
    if shared + ROOM > available:
        return
    while weights:
        group, size = [], 0
        while weights and size < ROOM:
            weight = weights.pop(0)
            group.append((weight, size))
            size += -weight.nbytes % 64 + weight.nbytes
        if size >= HUGE_PAGE_BYTES:
            _move(group, size)


def _move(group: list[tuple[nn.Parameter, int]], size: int) -> None:
    """Weights and where they are to lie in one piece of memory of `size` bytes."""
    try:
        memory = mmap.mmap(-1, size + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # a limit of this process's memory
        return
    with contextlib.suppress(OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    begin = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % HUGE_PAGE_BYTES
    for weight, offset in group:
        if weight.numel():
            place = torch.frombuffer(memory, dtype=weight.dtype, offset=begin + offset, count=weight.numel())
            weight.data = place.view(weight.shape).copy_(weight.detach())


def advise_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Has the system back a tensor that nothing was written to yet by huge pages."""
    begin, end = -(-tensor.data_ptr() // PAGE) * PAGE, (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE
    if hasattr(mmap, "MADV_HUGEPAGE") and tensor.device.type == "cpu" and end - begin >= HUGE_PAGE_BYTES:
        _c_library().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE)
    return tensor


@functools.lru_cache(1)
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def advised_ranges() -> list[range]:
    """Addresses for which huge pages were asked already."""
    ranges, places = [], range(0)
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
        for line in file:
            words = line.split()
            if line.startswith("VmFlags:"):
                if "hg" in words:
                    ranges.append(places)
            elif not words[0].endswith(":"):
                places = range(*(int(word, 16) for word in words[0].split("-")))
    return ranges


def available_bytes() -> int:
    """Of memory, as Linux counts it."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")), 0)


__all__ = ["advise_huge_pages", "put_into_huge_pages"]
