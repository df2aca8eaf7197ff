"""JSON files of checkpoints, of bounded size."""

from __future__ import annotations

import json
import os
from typing import Any


# A list of 20,000 tensors takes 6 MB; the released checkpoints' files 0.5 MB, their tokenizers aside.
MAX_JSON_BYTES = 32 * 2**20


def load_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: if it is none, nested too deeply, or too big.
        OSError: if it can't be read.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"it has {os.path.getsize(path):,} bytes, and {MAX_JSON_BYTES:,} is the limit here")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
