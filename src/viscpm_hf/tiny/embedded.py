"""The demo model that comes with the package: `viscpm-tiny`, trained by `recipes/tiny` on the world of `shapes`.

Its folders lie in `tiny_models/`; the name `viscpm-tiny` stands for them wherever a model is asked for.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from ..plain_text import plain


EMBEDDED_NAME = "viscpm-tiny"
KINDS = ("chat", "paint")
LICENCE = "Apache-2.0"

# Of a name that is meant to be that of the embedded model.
LIKENESS = 0.8
FILE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".gguf", ".json", ".txt", ".zip", ".onnx", ".h5")
# Also one of its releases, or one of its files of weights.
HUB_ID = re.compile(r"(?P<owner>[\w][\w.-]*)/[\w][\w.-]*((?P<file>/[^/]+\.(bin|pt|pth))|:[\w.-]+)?")

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
        ValueError, FileNotFoundError: see [`tiny`] and [`check_model_name`].
    """
    if name_or_path == EMBEDDED_NAME:
        return tiny(kind)
    if isinstance(name_or_path, str):  # a Path is one, whatever it is called
        check_model_name(name_or_path)
    return name_or_path


def check_model_name(name_or_path: str | os.PathLike) -> None:
    """
    Raises:
        FileNotFoundError: for what isn't here and is no name of a repository either, so that no server is asked for a
            mistyped path.
    """
    name = os.fspath(name_or_path)
    if os.path.lexists(os.path.expanduser(name)):
        return
    bare = name.strip().rstrip("/").lower()
    if "/" not in bare and difflib.SequenceMatcher(None, bare, EMBEDDED_NAME).ratio() >= LIKENESS:
        raise FileNotFoundError(f"There is no model {plain(name)!r}: the embedded one is called {EMBEDDED_NAME}.")
    match = HUB_ID.fullmatch(name)
    # `folder/model.bin`, and a file that isn't in a folder that is here, are no repository's.
    has_file = match is not None and match["file"] and not os.path.lexists(match["owner"])
    if bare.endswith(FILE_SUFFIXES) and not has_file:
        raise FileNotFoundError(f"There is no checkpoint at {plain(name)}: no such file.")
    if match is None:
        raise FileNotFoundError(
            f"There is no checkpoint at {plain(name)}: no file or folder, and a repository is called OWNER/NAME."
        )
