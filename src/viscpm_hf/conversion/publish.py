"""A converted folder goes to the Hub, once it is what it should be."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from yaml import YAMLError

from ..checkpoints.errors import ConversionError
from ..checkpoints.location import DIFFUSERS_FOLDER, MANIFEST_NAME, json_object, locate
from ..checkpoints.tensor_files import crc32_of
from .publishable import CARD_NAME, publishable_files
from .verify import check_transformers_folder
from .workspace import PARTIAL_SUFFIX


REPO_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True)
class Publication:
    """What was, or with `is_dry_run` would be, uploaded."""

    folder: Path
    repo_id: str
    files: dict[str, int] = field(default_factory=dict)
    """Names and sizes in bytes."""
    is_private: bool = False
    is_dry_run: bool = False
    url: str | None = None

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values())


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    include: Iterable[str] = (),
    api: HfApi | None = None,
) -> Publication:
    """Checks a converted folder and uploads it.

    Args:
        folder: what `convert` wrote.
        repo_id: `owner/name`; created if it isn't there.
        private: whether a new repository is.
        dry_run: only check, and list what would be uploaded.
        token: of the Hub; the one that is logged in with if None.
        commit_message: of the upload.
        include: files to upload beside those of a converted folder, by their names in it. Hidden ones, pickles and
            what may hold a secret are refused all the same.
        api: in place of huggingface_hub's own.

    Raises:
        ConversionError: if the folder isn't fit to be published; nothing is uploaded then.
        OSError: if files can't be read, or the upload fails.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise ConversionError(f"A repository is OWNER/NAME, got {repo_id!r}.")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    files = check_folder(folder, include)
    publication = Publication(folder, repo_id, files, private, is_dry_run=dry_run)
    if dry_run:
        return publication
    api = api or HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=[glob.escape(name) for name in sorted(files)],  # names, which may look like patterns
        commit_message=commit_message or "Upload a converted VisCPM checkpoint",
    )
    return Publication(folder, repo_id, files, private, url=str(getattr(commit, "repo_url", commit)))


def check_folder(folder: Path, include: Iterable[str] = ()) -> dict[str, int]:
    """The files of a folder that is fit to be published, with their sizes.

    Raises:
        ConversionError: if it isn't, with the reason.
    """
    if folder.name.endswith(PARTIAL_SUFFIX):
        raise ConversionError(f"{folder} is an unfinished conversion.")
    location = locate(folder)
    if not location.is_converted:
        raise ConversionError(
            f"{folder} is in the original's layout: convert it first (viscpm-hf convert {folder} OUT)."
        )
    files = publishable_files(folder, include)
    _check_card(folder)
    _check_weights(folder)
    if location.layout == DIFFUSERS_FOLDER:
        from .paint import check_paint_folder

        check_paint_folder(folder)
    else:
        check_transformers_folder(folder)
    return files


def _check_card(folder: Path) -> None:
    card_file = folder / CARD_NAME
    if not card_file.is_file():
        raise ConversionError(f"{folder} has no model card ({CARD_NAME}).")
    try:
        data: Any = ModelCard.load(card_file).data
    except (ValueError, AttributeError, TypeError, YAMLError) as error:
        raise ConversionError(f"{card_file} can't be read as a model card: {error}.") from error
    if not data.get("license"):
        raise ConversionError(f"{card_file} names no licence: the weights' licence belongs in its first lines.")


def _check_weights(folder: Path) -> None:
    """Compares the files with what `conversion.json` says of them, if they are its own."""
    files = json_object(folder / MANIFEST_NAME).get("files")
    for name, known in files.items() if isinstance(files, dict) else ():
        path = folder / name
        if not isinstance(known, dict) or "crc32" not in known:
            continue  # of a quantised checkpoint
        if path.is_file() and path.stat().st_size == known.get("size") and crc32_of(path) != known["crc32"]:
            raise ConversionError(
                f"{path} isn't what was converted: its checksum is another than in {MANIFEST_NAME}. Convert again."
            )
