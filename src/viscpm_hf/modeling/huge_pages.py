"""Weights in huge pages, since with pages of 4 KB a third of a decoding step goes into finding them."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn


PAGE, HUGE_PAGE = 2**12, 2**21
# Of Linux since 6.1, which Python doesn't name yet.
MADV_COLLAPSE = 25
# Weights so near to each other are one piece of memory: what lies in between are the allocator's notes.
GAP = 2**16
# Bytes of a piece of memory that weights share, since most of them are of a few huge pages at best. Of its last huge
# page half is lost on average; what is behind that is never touched, and takes no memory.
ROOM = 2**28

_gathering, _taking = threading.Lock(), threading.Lock()


class _Shared:
    """The piece of memory that the next weights are cut from; it is there for as long as a weight in it."""

    memory: Callable[[], mmap.mmap | None] = staticmethod(lambda: None)
    left = range(0)


def empty_in_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor for weights on the CPU, in huge pages where the system has them, which costs nothing."""
    count = math.prod(shape)
    size = -(-count * dtype.itemsize // 64) * 64
    if not size or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    with _taking:
        memory, left = _Shared.memory(), _Shared.left
        if memory is None or size > len(left):
            memory, left = _new_memory(max(size, ROOM))
        if size < ROOM:
            _Shared.memory, _Shared.left = weakref.ref(memory), left[size:]
    return torch.frombuffer(memory, dtype=dtype, offset=left.start, count=count).view(shape)


def _new_memory(size: int) -> tuple[mmap.mmap, range]:
    """Of which these places, so many, are in huge pages."""
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    begin = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
    _advise(begin, begin + size + HUGE_PAGE, PAGE, mmap.MADV_HUGEPAGE)
    return memory, range(-begin % HUGE_PAGE, -begin % HUGE_PAGE + size)


def put_into_huge_pages(parameters: Iterable[nn.Parameter]) -> None:
    """Has Linux gather the pages of weights on the CPU into huge ones, where they lie: a second or two for a GB. What
    it leaves as it is (weights in a mapped file; all, before Linux 6.1) is copied if there is room. Elsewhere nothing
    happens."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    left = []
    for weights in _neighbours([it for it in parameters if it.device.type == "cpu" and it.numel()]):
        begin, end = weights[0].data_ptr(), max(weight.data_ptr() + weight.nbytes for weight in weights)
        if not _advise(begin, end, HUGE_PAGE, MADV_COLLAPSE):
            left += [weight for weight in weights if _can_be_moved(weight)]
    if left and sum(weight.nbytes for weight in left) + ROOM <= available_bytes():
        _move(left)


def gather_weights(model: nn.Module, *parts: nn.Module) -> None:
    """Puts the weights of a model's parts into huge pages, once for as long as they stay where they are."""
    weights = list(dict.fromkeys(weight for part in parts for weight in part.parameters()))
    with _gathering:
        if model.__dict__.get("_gathered_places") != list(map(torch.Tensor.data_ptr, weights)):
            put_into_huge_pages(weights)
            model.__dict__["_gathered_places"] = list(map(torch.Tensor.data_ptr, weights))


def _can_be_moved(weight: nn.Parameter) -> bool:
    is_own = not weight.is_shared() and not weight.is_inference()  # of no other process, and of a kind to be changed
    return type(weight) is nn.Parameter and weight.is_contiguous() and is_own


def _neighbours(weights: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    group: list[nn.Parameter] = []
    for weight in sorted(weights, key=torch.Tensor.data_ptr):
        if group and weight.data_ptr() > group[-1].data_ptr() + group[-1].nbytes + GAP:
            yield group
            group = []
        group.append(weight)
    if group:
        yield group


def _move(weights: list[nn.Parameter]) -> None:
    """Copies weights into new memory."""
    for weight in weights:
        weight.data = empty_in_huge_pages(weight.shape, weight.dtype).copy_(weight.detach())


def available_bytes() -> int:
    """Of memory, as Linux counts it; psutil isn't there wherever an exported folder's code runs."""
    if not os.access("/proc/meminfo", os.R_OK):  # not every container has it
        return 0
    with open("/proc/meminfo", encoding="ascii") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")), 0)


def _advise(begin: int, end: int, unit: int, advice: int) -> bool:
    """Of whole units in between; False if the system doesn't follow, which changes nothing."""
    begin, end = -(-begin // unit) * unit, end // unit * unit
    if end - begin < HUGE_PAGE:
        return True
    return _c_library().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice) == 0


@functools.lru_cache(1)
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


__all__ = ["empty_in_huge_pages", "gather_weights", "put_into_huge_pages"]
