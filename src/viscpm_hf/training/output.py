"""What a run leaves: checkpoints that are whole, and a result that appears when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..checkpoints.headers import safetensors_header
from ..checkpoints.json_files import load_json


logger = logging.get_logger(__name__)

CHECKPOINTS = "checkpoints"
PARTIAL = ".partial"

# Of torch.save: an archive, whose end is where its list of records is.
PICKLED = (".pt", ".pth", ".bin")

# Written last, or replaced last: by these a folder is known as a model or an adapter.
MARKS = ("config.json", "adapter_config.json", "model_index.json", "pytorch_lora_weights.safetensors")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; one that was cut off in the middle of writing is passed over."""
    numbered = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.rpartition("-")[2]
        if number.isdecimal():
            numbered.append((int(number), path))
    for _, path in sorted(numbered, reverse=True):
        reason = _cut_file(path)
        if reason is None:
            return path
        logger.warning("%s is not whole (%s); the checkpoint before it counts", path, reason)
    return None


def _cut_file(checkpoint: Path) -> str | None:
    """The first file of a checkpoint that was not written to its end; None if it is whole."""
    if not (checkpoint / TRAINER_STATE_NAME).is_file():  # the trainer writes it last
        return f"no {TRAINER_STATE_NAME}"
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix == ".json" and path.is_file() and not isinstance(load_json(path), (dict, list)):
                return path.name
            if path.suffix == ".safetensors":
                safetensors_header(path)
            elif path.suffix in PICKLED and path.is_file() and not zipfile.is_zipfile(path):
                return path.name
        except (OSError, ValueError):
            return path.name
    return None


@contextlib.contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """A folder to write into, whose files move to `output` when all are there; what else `output` holds stays.

    The file by which a folder is known as a model moves last, so that an interruption leaves no folder that looks
    like one and isn't.
    """
    partial = output / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for mark in MARKS:
            (output / mark).unlink(missing_ok=True)
        for path in sorted(partial.iterdir(), key=lambda path: path.name in MARKS):
            target = output / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new_folder(output: Path) -> None:
    """Raises `ValueError` for an output that exists with something in it."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and isn't an empty folder; choose another place.")
