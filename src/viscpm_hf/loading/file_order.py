"""Weights quantised as they lie in their mapped file, several at once, about as fast as a disk delivers them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..checkpoints.transfer import one_torch_thread


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of that shape and dtype in memory; the given one may be on the meta device.

    numpy asks for huge pages, of which making and reading so much memory takes far less time.
    """
    memory = np.empty(tensor.numel() * tensor.element_size(), dtype=np.uint8)
    return torch.from_numpy(memory).view(tensor.dtype).view(tensor.shape)


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
    # A weight a thread; more than there are cores, for those that wait for the disk.
    with ThreadPoolExecutor(torch.get_num_threads() + 3) as pool, one_torch_thread():
        parts = pool.map(quantize_one, names, targets)
        for part in tqdm(parts, total=len(names), desc="quantising", disable=None):
            quantized |= part
    return quantized
