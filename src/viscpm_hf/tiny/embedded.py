"""The demo model that comes with the package: `viscpm-tiny`, trained by `recipes/tiny` on the world of `shapes`.

Its folders lie in `tiny_models/`; the name `viscpm-tiny` stands for them wherever a model is asked for.
"""

from __future__ import annotations

import os
from pathlib import Path


EMBEDDED_NAME = "viscpm-tiny"
KINDS = ("chat", "paint")

FOLDER = Path(__file__).parents[1] / "tiny_models"


def tiny(kind: str) -> str:
    """The folder of the embedded model, for `from_pretrained`.

    Args:
        kind: `"chat"` (`AutoModelForImageTextToText`) or `"paint"` (`DiffusionPipeline`).

    Raises:
        ValueError: for another kind.
        FileNotFoundError: if this installation was made without the model.
    """
    if kind not in KINDS:
        raise ValueError(
            f'{EMBEDDED_NAME} comes as {" and ".join(KINDS)}, not as {kind!r}: tiny("chat") or tiny("paint").'
        )
    folder = FOLDER / kind
    if not folder.is_dir():
        raise FileNotFoundError(
            f"This installation of viscpm-hf has no {EMBEDDED_NAME} for {kind}: there is no folder {folder}. "
            "Install the package anew, or train the model with `make tiny`."
        )
    return os.fspath(folder)


def resolve_model(name_or_path: str | os.PathLike, kind: str) -> str | os.PathLike:
    """`name_or_path`, or the embedded model's folder for `"viscpm-tiny"`; a folder of that name is `./viscpm-tiny`.

    Raises:
        ValueError, FileNotFoundError: see [`tiny`].
    """
    return tiny(kind) if name_or_path == EMBEDDED_NAME else name_or_path
