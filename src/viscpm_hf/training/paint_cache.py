"""Tensors that are computed once and kept on the disk: what the frozen models make of prompts and pictures."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging


logger = logging.get_logger(__name__)

SHARD_BYTES = 64 << 20
CONFIG_NAME = "config.json"

# Of a file of weights: enough to tell any two trainings apart, without reading 20 GB.
SAMPLED_BLOCKS, BLOCK_BYTES, HEAD_BYTES = 256, 4096, 1 << 20


class TensorCache:
    """Tensors by key in safetensors files of one folder, whose name tells what they depend on.

    Files are written whole or not at all, and never changed: several processes may add to one folder, and whatever
    was written before an interruption is there after it. Only the keys are in memory; tensors are read when asked for.

    Args:
        folder: where all caches lie.
        kind: what the tensors are, the beginning of the folder's name.
        config: all that they depend on besides their key.
    """

    def __init__(self, folder: Path, kind: str, config: Mapping[str, Any]):
        text = json.dumps(config, sort_keys=True, ensure_ascii=False)
        self.folder = folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        self._places: dict[str, Path] = {}
        self._files: dict[Path, Any] = {}
        self._waiting: dict[str, torch.Tensor] = {}
        self._waiting_bytes = 0
        self.reload()

    def reload(self) -> None:
        """Learns what other processes have added."""
        known = set(self._places.values())
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in known:
                continue
            try:
                with safe_open(path, "pt") as file:
                    self._places.update(dict.fromkeys(file.keys(), path))
            except (SafetensorError, OSError) as error:
                logger.warning("%s can't be read (%s) and is made anew", path, error)
                path.unlink(missing_ok=True)

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self._waiting

    def __getitem__(self, key: str) -> torch.Tensor:
        path = self._places[key]
        if path not in self._files:
            self._files[path] = safe_open(path, "pt")
        return self._files[path].get_tensor(key)

    def add(self, key: str, tensor: torch.Tensor) -> None:
        tensor = tensor.detach().cpu().contiguous().clone()
        self._waiting[key] = tensor
        self._waiting_bytes += tensor.nbytes
        if self._waiting_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what was added; before it, nothing of that can be read."""
        if not self._waiting:
            return
        name = hashlib.sha256("".join(self._waiting).encode()).hexdigest()[:24]
        path, partial = self.folder / f"{name}.safetensors", self.folder / f"{name}.{os.getpid()}.partial"
        save_file(self._waiting, partial)
        os.replace(partial, path)
        self._places.update(dict.fromkeys(self._waiting, path))
        self._waiting, self._waiting_bytes = {}, 0

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay in their process.
        return {**self.__dict__, "_files": {}}


def text_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def files_fingerprint(paths: Iterable[Path]) -> str:
    """Tells files apart by name, size, beginning and a sample of their content."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name}/{size}/".encode())
        with open(path, "rb") as file:
            digest.update(file.read(HEAD_BYTES))
            for number in range(SAMPLED_BLOCKS if size > HEAD_BYTES else 0):
                file.seek(HEAD_BYTES + (size - HEAD_BYTES) * number // SAMPLED_BLOCKS)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
