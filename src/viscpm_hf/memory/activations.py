"""What a computation holds in memory besides weights, found by running it on tensors without data.

Every operation runs on torch's meta device, which knows shapes and lifetimes but no values, so that the peak of what
is alive at once is exact for plain ("eager") execution, whatever the size of the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _FusedAttention(TorchFunctionMode):
    """Attention as fused kernels do it: no scores in memory, which on the meta device they would be."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within and are alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Weights and inputs were there before.
        self._known.update(storage._cdata for storage in _storages((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._note(storage)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


@torch.no_grad()
def peak_bytes(compute: Callable[[], Any]) -> int:
    """The most bytes of new tensors alive at once while `compute` runs, on the meta device throughout."""
    with _FusedAttention(), _LiveBytes() as live:
        compute()
    return live.peak
