"""Where a checkpoint's files are: a file, a folder or a Hub id, in the original's layout or in ours."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from ..modeling.configuration_vision_resampler import MiniCPMVConfig, refuse_later_minicpmv
from .errors import OriginalCheckpointError
from .json_files import load_json
from .original import (
    ORIGINAL_CONFIG_NAMES,
    ORIGINAL_SUFFIXES,
    VAE_NAMES,
    VISION_CONFIG_NAME,
    VOCAB_NAME,
    is_original_config,
)
from .sibling_original import CONFIG_CLASSES, OTHER_FORMATS


ORIGINAL_FILE, ORIGINAL_FOLDER = "original file", "original folder"
TRANSFORMERS_FOLDER, DIFFUSERS_FOLDER = "transformers folder", "diffusers folder"
# What a conversion did, beside its result.
MANIFEST_NAME = "conversion.json"
CONVERTED = (TRANSFORMERS_FOLDER, DIFFUSERS_FOLDER)

CONVERTED_MODEL_TYPES = {"viscpm_chat": "chat", "viscpm_cpm_bee": "cpm_bee"}
PAINT_MODEL_TYPE = "viscpm_paint_text_encoder"

# `owner/name`, as the Hub allows them, and a file within.
HUB_ID = re.compile(r"(?P<id>[\w][\w.-]*/[\w][\w.-]*)(/(?P<file>[^/]+\.(bin|pt|pth)))?")
# What a conversion needs of a repository besides the weights.
SMALL_FILES = (
    "*.json",
    "*.txt",
    "*.jinja",
    "tokenizer.model",
    "vae/*",
    "scheduler/*",
    "text-security-checker/*",
    "*/config.json",
)


@dataclass(frozen=True)
class Location:
    """A checkpoint on this machine."""

    name: str
    """As the user gave it."""
    path: Path
    layout: str
    kind: str | None = None
    """What the configuration says: of converted folders, and of the siblings'. Of VisCPM's original files only the
    tensors tell."""

    @property
    def is_converted(self) -> bool:
        return self.layout in CONVERTED

    @property
    def is_sibling(self) -> bool:
        """Whether it is one of VisCPM's siblings."""
        return self.kind in CONFIG_CLASSES

    @property
    def folder(self) -> Path:
        return self.path.parent if self.layout == ORIGINAL_FILE else self.path


def locate(
    source: str | os.PathLike, revision: str | None = None, token: str | bool | None = None, with_weights: bool = True
) -> Location:
    """Finds a checkpoint; only what isn't on this machine, and is no path, is asked of the Hub.

    Args:
        source: a file, a folder, a Hub id, or `owner/name/file.bin` for one of a repository's alternatives.
        revision, token: of the Hub.
        with_weights: whether a Hub repository's weights are downloaded too.

    Raises:
        FileNotFoundError: if there is no such path, or the Hub (or, offline, its cache) has no such repository.
        OriginalCheckpointError: for a folder with none of the layouts.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if not path.exists():
        # A link that leads nowhere exists all the same, and is no Hub id.
        match = None if path.is_symlink() else HUB_ID.fullmatch(name)
        # `folder/model.bin` looks like a Hub id, and so does a file's name in a folder that is here.
        if match is None or match["id"].endswith(ORIGINAL_SUFFIXES) or (match["file"] and path.parent.is_dir()):
            raise FileNotFoundError(f"There is no checkpoint at {name}.")
        path = _download(match["id"], match["file"], revision, token, with_weights)
    if path.is_file():
        return Location(name, path, ORIGINAL_FILE)
    if not os.access(path, os.R_OK | os.X_OK):
        raise PermissionError(f"The folder {path} can't be read: permission denied.")
    layout, kind = layout_of(path)
    return Location(name, path, layout, kind)


def layout_of(folder: Path) -> tuple[str, str | None]:
    """The layout of a folder, and the kind of a converted one."""
    if json_object(folder / "text_encoder" / "config.json").get("model_type") == PAINT_MODEL_TYPE:
        return DIFFUSERS_FOLDER, "paint"
    config = json_object(folder / "config.json")
    kind = config.get("model_type")
    if isinstance(kind, (list, dict)):
        raise OriginalCheckpointError(f"{folder / 'config.json'} names no model type but a {type(kind).__name__}.")
    if kind in CONVERTED_MODEL_TYPES:
        return TRANSFORMERS_FOLDER, CONVERTED_MODEL_TYPES[kind]
    if kind in CONFIG_CLASSES:
        if "resampler_config" in config:
            return TRANSFORMERS_FOLDER, kind
        if kind == MiniCPMVConfig.model_type:
            refuse_later_minicpmv(config)
        return ORIGINAL_FOLDER, kind
    if original_files(folder) or is_original_config(config):
        return ORIGINAL_FOLDER, None
    raise OriginalCheckpointError(
        f"{folder} holds no VisCPM checkpoint: it has no {' or '.join(ORIGINAL_SUFFIXES)} file of the original, and "
        "no config.json of a converted one."
    )


def json_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty if there is no such file, or none of an object."""
    try:
        content = load_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def original_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in ORIGINAL_SUFFIXES and file.is_file())


def original_weights(location: Location, except_for: Path | None = None) -> Path:
    """The original file of a location.

    Several in one folder are alternatives, not shards, so one has to be chosen.

    Raises:
        OriginalCheckpointError: if there is none, or more than one.
    """
    if location.layout == ORIGINAL_FILE:
        return location.path
    excluded = except_for.resolve() if except_for is not None else None
    files = [
        file for file in original_files(location.path) if file.resolve() != excluded and file.name not in VAE_NAMES
    ]
    if len(files) == 1:
        return files[0]
    if not files:
        raise OriginalCheckpointError(f"{location.name} has no {' or '.join(ORIGINAL_SUFFIXES)} file.")
    listed = ", ".join(f"{file.name} ({file.stat().st_size / 1e9:.1f} GB)" for file in files)
    raise OriginalCheckpointError(
        f"{location.name} has {len(files)} files that are alternatives, not shards: {listed}. Choose one: "
        f"{location.name.rstrip('/')}/{files[0].name}"
    )


def file_beside(location: Location, given: str | os.PathLike | None, names: tuple[str, ...], what: str) -> Path | None:
    """A given file, or the first of `names` in the checkpoint's folder.

    Raises:
        FileNotFoundError: if the given one isn't there.
    """
    if given is not None:
        path = Path(given)
        if not path.exists():
            raise FileNotFoundError(f"There is no {what} at {path}.")
        return path
    return next((location.folder / name for name in names if (location.folder / name).is_file()), None)


def llm_config_file(location: Location, given: str | os.PathLike | None) -> Path | None:
    return file_beside(location, given, ORIGINAL_CONFIG_NAMES, "configuration of the language model")


def vision_config_file(location: Location, given: str | os.PathLike | None) -> Path | None:
    return file_beside(location, given, (VISION_CONFIG_NAME,), "configuration of the vision tower")


def vocab_file(location: Location, given: str | os.PathLike | None) -> Path:
    """Raises `FileNotFoundError` if there is no vocabulary: nothing works without it."""
    path = file_beside(location, given, (VOCAB_NAME,), "vocabulary")
    if path is None:
        raise FileNotFoundError(
            f"There is no {VOCAB_NAME} in {location.folder}. The checkpoint's vocabulary belongs beside its weights, "
            "or give its path (--vocab)."
        )
    return path


def _download(
    repo_id: str, file: str | None, revision: str | None, token: str | bool | None, with_weights: bool
) -> Path:
    where = {"revision": revision, "token": token}
    try:
        small = list(SMALL_FILES)
        if not with_weights:
            small = [pattern for pattern in small if pattern != "vae/*"]
        folder = Path(snapshot_download(repo_id, allow_patterns=small, **where))
        if not with_weights:
            return folder
        if file is not None:
            return Path(hf_hub_download(repo_id, file, **where))
        if layout_is_converted(folder):
            return Path(snapshot_download(repo_id, **where))
        if json_object(folder / "config.json").get("model_type") in CONFIG_CLASSES:
            return Path(snapshot_download(repo_id, ignore_patterns=OTHER_FORMATS, **where))
        return Path(hf_hub_download(repo_id, _only_original(repo_id, folder, where), **where)).parent
    except (HfHubHTTPError, EntryNotFoundError, OSError) as error:  # offline mode's errors are among them
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(
            f"{repo_id} is neither a path here nor a repository that can be had from the Hub or its cache ({reason})."
        ) from error


def layout_is_converted(folder: Path) -> bool:
    try:
        return layout_of(folder)[0] in CONVERTED
    except OriginalCheckpointError:
        return False


def _only_original(repo_id: str, folder: Path, where: dict[str, Any]) -> str:
    """The original file of a repository that isn't converted; of several, the user chooses."""
    cached = [file.name for file in original_files(folder)]
    if cached:
        names = cached
    else:
        from huggingface_hub import HfApi

        names = [
            name
            for name in HfApi().list_repo_files(repo_id, **where)
            if "/" not in name and name.endswith(ORIGINAL_SUFFIXES)
        ]
    if len(names) != 1:
        raise OriginalCheckpointError(
            f"{repo_id} has {len(names)} files that are alternatives, not shards: {', '.join(names) or 'none'}. "
            f"Choose one: {repo_id}/FILE"
        )
    return names[0]
