"""Configurations of folders here, and models of their shapes.

Whatever a `config.json` holds: no code of the folder is run, and what makes no sense is one sentence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from ..plain_text import plain
from .errors import ConversionError


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ImportError, MemoryError, ConversionError):
        raise
    except Exception as error:  # noqa: BLE001, the libraries' classes raise anything for values that they don't expect
        raise ConversionError(f"{what} makes no sense: {plain(error, 500)}") from error


def read_config(folder: str | os.PathLike) -> PreTrainedConfig:
    """The configuration of a folder.

    Raises:
        ConversionError: if its values make no sense, or its type is of code that isn't installed.
        OSError: if there is none, or it can't be read.
    """
    with _explained(f"The configuration {Path(folder) / 'config.json'}"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def without_weights(build: Callable[[], Any]) -> Any:
    """A model whose weights take no memory, as `build` makes it of a configuration.

    Raises:
        ConversionError: if no model can be made of it.
    """
    with _explained("The configuration"), torch.device("meta"):
        return build()
