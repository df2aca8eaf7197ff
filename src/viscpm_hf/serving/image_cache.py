"""Encoded images, kept as long as there is room."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


def image_key(size: Sequence[Any], pixels: bytes) -> str:
    """The same for pictures that look the same to the model.

    Args:
        size, pixels: of what the model is given, not of the file, whose pixels may be numbers of a palette.
    """
    digest = hashlib.sha256(repr(tuple(size)).encode())
    digest.update(pixels)
    return digest.hexdigest()


@dataclass
class ImageCache:
    """Least recently used first out; not for several threads at once.

    Args:
        max_bytes: of the encoded images; 0 keeps none.
    """

    max_bytes: int

    def __post_init__(self):
        self._entries: OrderedDict[str, torch.Tensor] = OrderedDict()
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, key: str) -> torch.Tensor | None:
        encoded = self._entries.get(key)
        if encoded is None:
            self.misses += 1
            return None
        self._entries.move_to_end(key)
        self.hits += 1
        return encoded

    def put(self, key: str, encoded: torch.Tensor) -> None:
        if encoded.nbytes > self.max_bytes or key in self._entries:
            return
        self._entries[key] = encoded
        self.num_bytes += encoded.nbytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= oldest.nbytes
