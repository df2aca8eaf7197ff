"""Where a checkpoint's files are: a file, a folder or a Hub id, in the original's layout or in ours.

Commands, which want all of a checkpoint here, ask [`locate`]; `from_pretrained`, which knows our layout itself and
downloads no more than it loads, asks [`find_original`].
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from ..families.diffusion_shapes import UNET_CONFIG
from ..families.family import BEIT3, CHAT, CPM_BEE, FAMILIES, MINICPMV, PAINT, VISUALCLA, Family
from ..modeling.original_vision_resampler import refuse_later_minicpmv
from ..tiny.embedded import EMBEDDED_NAME, check_model_name
from .adapters import AdapterFolder
from .errors import OriginalCheckpointError
from .headers import TensorHeader, check_inside, safetensors_header
from .json_files import load_json
from .original import (
    DIFFUSION_CONFIG_NAME,
    LLM_SIZE_KEYS,
    ORIGINAL_CONFIG_NAMES,
    ORIGINAL_SUFFIXES,
    ORIGINAL_WEIGHTS_NAME,
    VAE_NAMES,
    VISION_CONFIG_NAME,
    VOCAB_NAME,
    load_state_dict,
    read_json,
    state_dict_header,
)


if TYPE_CHECKING:
    import torch


ORIGINAL_FILE, ORIGINAL_FOLDER = "original file", "original folder"
TRANSFORMERS_FOLDER, DIFFUSERS_FOLDER = "transformers folder", "diffusers folder"
# What a conversion did, beside its result.
MANIFEST_NAME = "conversion.json"
CONVERTED = (TRANSFORMERS_FOLDER, DIFFUSERS_FOLDER)

PAINT_MODEL_TYPE = FAMILIES[PAINT].model_type

# `owner/name`, as the Hub allows them, and a file within, or one of the released alternatives (`families`).
HUB_ID = re.compile(r"(?P<id>[\w][\w.-]*/[\w][\w.-]*)(/(?P<file>[^/]+\.(bin|pt|pth))|:(?P<release>[\w.-]+))?")
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
    """What the configuration says: of converted folders, and of originals whose model type is ours. Of VisCPM's
    original files only the tensors tell."""
    original: Original | None = None
    """What [`find_original`] would find; None for ours, and for a folder that has no configuration."""

    @property
    def is_converted(self) -> bool:
        return self.layout in CONVERTED

    @property
    def folder(self) -> Path:
        return self.path.parent if self.layout == ORIGINAL_FILE else self.path


def locate(
    source: str | os.PathLike,
    revision: str | None = None,
    token: str | bool | None = None,
    with_weights: bool = True,
    cache_dir: str | os.PathLike | None = None,
) -> Location:
    """Finds a checkpoint; only what isn't on this machine, and is no path, is asked of the Hub.

    Args:
        source: a file, a folder, a Hub id, or for one of a repository's alternatives `owner/name:v1.1`, by the name
            of its release, or `owner/name/file.bin`.
        revision, token, cache_dir: of the Hub.
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
        is_path = match is not None and match["file"] and Path(name).parts[0] in os.listdir()
        if match is None or match["id"].endswith(ORIGINAL_SUFFIXES) or is_path:
            check_model_name(name)
            raise FileNotFoundError(f"There is no checkpoint at {name}.")
        where = {"revision": revision, "token": token, "cache_dir": cache_dir}
        path = _download(match["id"], match["file"], match["release"], where, with_weights)
    if path.is_file():
        return Location(name, path, ORIGINAL_FILE)
    if not os.access(path, os.R_OK | os.X_OK):
        raise PermissionError(f"The folder {path} can't be read: permission denied.")
    return location_of(path, name)


def location_of(folder: Path, name: str | None = None) -> Location:
    """What a folder holds. `name` is what the user calls it."""
    name = os.fspath(folder) if name is None else name
    if json_object(folder / "text_encoder" / "config.json").get("model_type") == PAINT_MODEL_TYPE:
        return Location(name, folder, DIFFUSERS_FOLDER, PAINT)
    config = json_object(folder / "config.json")
    kind = config.get("model_type")
    if isinstance(kind, (list, dict)):
        raise OriginalCheckpointError(f"{folder / 'config.json'} names no model type but a {type(kind).__name__}.")
    own = next((own for own, family in FAMILIES.items() if family.model_type == kind), None)
    original = original_from(config, os.fspath(folder))
    if original is None and own not in (None, PAINT, BEIT3):  # of the last two neither stands alone
        return Location(name, folder, TRANSFORMERS_FOLDER, own)
    if original is not None or original_files(folder):
        named = original.kind if original is not None and original.family.shares_model_type else None
        return Location(name, folder, ORIGINAL_FOLDER, named, original)
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


def diffusers_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of a diffusers model; None if the folder has none."""
    config = json_object(folder / "config.json")
    return config if "_class_name" in config else None


def original_unet_config(location: Location) -> Mapping[str, Any]:
    """The configuration of an original file's UNet; the released one's if there is none."""
    given = json_object(location.folder / DIFFUSION_CONFIG_NAME)
    return given.get("unet") or diffusers_config(location.folder / "unet") or UNET_CONFIG


def original_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in ORIGINAL_SUFFIXES and file.is_file())


def only_original_file(folder: Path, lacked: str) -> Path:
    """The one original file of a folder that has no `lacked`.

    Raises:
        OriginalCheckpointError: if there is none, or several that are alternatives.
    """
    files = [file for file in original_files(folder) if file.name not in VAE_NAMES]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise OriginalCheckpointError(
            f"{folder} has no {lacked}, so it should hold one original .pt or .bin file; it holds: {names}. Give the "
            "path of the file."
        )
    return files[0]


def original_weight_files(location: Location, except_for: Path | None = None) -> list[Path]:
    """The files of weights of an original location: one, or the shards that an index names; see [`original_weights`].

    Raises:
        OriginalCheckpointError: if there are none, or alternatives.
        FileNotFoundError: if a shard is missing.
    """
    is_sharded = any((location.path / name).is_file() for name in WEIGHT_NAMES if name != ORIGINAL_WEIGHTS_NAME)
    return weight_paths(location.path) if is_sharded else [original_weights(location, except_for)]


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


def repository_of(source: str | os.PathLike) -> str | os.PathLike:
    """`source`, or the Hub's repository that one of its alternatives (`owner/name:v1.1`) is of."""
    match = None if os.path.exists(source) else HUB_ID.fullmatch(os.fspath(source))
    return source if match is None or match["id"] == os.fspath(source) else match["id"]


def chosen_file(source: str | os.PathLike, **hub: Any) -> str | os.PathLike:
    """`source`, or the file on this machine that one of a Hub repository's alternatives is; `hub` as of [`locate`]."""
    match = None if os.path.exists(source) else HUB_ID.fullmatch(os.fspath(source))
    is_chosen = match is not None and (match["file"] or match["release"])
    if not is_chosen or Path(source).parts[0] in os.listdir():  # a path, and mistyped
        return source
    return locate(source, **hub).path


def release_file(repo_id: str, config: Mapping[str, Any], release: str) -> str:
    """The file of a repository's alternative.

    Raises:
        OriginalCheckpointError: if the repository has none of that name.
    """
    kind = kind_of(config)
    releases = {} if kind is None else FAMILIES[kind].releases
    if release not in releases:
        known = ", ".join(f"{repo_id}:{name}" for name in releases) or "it has one file of weights"
        raise OriginalCheckpointError(f"{repo_id} has no release {release!r} ({known}).")
    return variant_name(ORIGINAL_WEIGHTS_NAME, releases[release])


def _download(repo_id: str, file: str | None, release: str | None, where: dict[str, Any], with_weights: bool) -> Path:
    try:
        small = list(SMALL_FILES)
        if not with_weights:
            small = [pattern for pattern in small if pattern != "vae/*"]
        folder = Path(snapshot_download(repo_id, allow_patterns=small, **where))
        where["revision"] = commit_of(folder) or where["revision"]  # what follows is of the same commit, or here
        kind = kind_of(json_object(folder / "config.json"))
        if file is not None and kind is not None and FAMILIES[kind].shares_model_type:
            raise OriginalCheckpointError(f"{repo_id} has one set of weights: leave /{file} out.")
        if release is not None:
            file = release_file(repo_id, json_object(folder / "config.json"), release)
        if not with_weights:
            return folder
        if file is not None:
            return Path(hf_hub_download(repo_id, file, **where))
        if layout_is_converted(folder):
            return Path(snapshot_download(repo_id, **where))
        if kind is not None and FAMILIES[kind].shares_model_type:
            return Path(snapshot_download(repo_id, ignore_patterns=OTHER_FORMATS, **where))
        return Path(hf_hub_download(repo_id, _only_original(repo_id, folder, where), **where)).parent
    except (HfHubHTTPError, EntryNotFoundError, OSError) as error:  # offline mode's errors are among them
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(
            f"{repo_id} is neither a path here nor a repository that can be had from the Hub or its cache ({reason})."
        ) from error


def layout_is_converted(folder: Path) -> bool:
    try:
        return location_of(folder).is_converted
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
        kind = kind_of(json_object(folder / "config.json"))
        releases = [f"{repo_id}:{name}" for name in (FAMILIES[kind].releases if kind is not None else ())]
        raise OriginalCheckpointError(
            f"{repo_id} has {len(names)} files that are alternatives, not shards: {', '.join(names) or 'none'}. "
            f"Choose one: {', '.join([f'{repo_id}/FILE', *releases])}"
        )
    return names[0]


# ------------------------------------------------------------------------------------------------ for from_pretrained

WHOLE, MERGED, ADAPTER = "whole", "merged", "adapter"
ADAPTER_CONFIG_NAME = "adapter_config.json"
# VisualCLA merged by its authors' script has its language model and its vision tower in folders of their own.
TEXT_FOLDER, VISION_FOLDER = "text_encoder", "vision_encoder"
# Copies of weights for other libraries, which some repositories have beside ours.
OTHER_FORMATS = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf"]
# As transformers looks for them.
WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Where a repository's files come from, as the Hub's functions take it.
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


@dataclass(frozen=True)
class Original:
    """A checkpoint in an original's layout. Its files are looked for when they are needed."""

    name: str
    """A folder or a Hub id, as the user gave it."""
    folder: Path
    """Where its `config.json` is, and whatever else has been downloaded."""
    kind: str
    config: Mapping[str, Any]
    """Its `config.json`."""
    hub: Mapping[str, Any] = field(default_factory=dict)
    """`HUB_ARGUMENTS` and `variant`."""
    weights: tuple[Path, ...] | None = None
    """Files of weights that were chosen; None for those that a repository has by their usual names."""
    vocab: Path | None = None
    _json: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def family(self) -> Family:
        return FAMILIES[self.kind]

    @cached_property
    def layout(self) -> str:
        """`"whole"`; of VisualCLA also `"merged"`, or `"adapter"`: changes to two bases."""
        if self.kind != VISUALCLA:
            return WHOLE
        if self.file(ADAPTER_CONFIG_NAME) is not None:
            return ADAPTER
        is_merged = any(self.file(f"{part}/config.json") is not None for part in (TEXT_FOLDER, VISION_FOLDER))
        return MERGED if is_merged else WHOLE

    def file(self, name: str) -> Path | None:
        """One of the checkpoint's files, downloaded if need be; None if it has none of that name."""
        if os.path.isdir(self.name) or (self.folder / name).is_file():
            path = self.folder / name
            return path if path.is_file() else None
        found = find_repository_file(self.name, name, **self.hub)
        return None if found is None else Path(found)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file's object; empty if there is no such file. It is read once."""
        if name not in self._json:
            path = self.file(name)
            self._json[name] = {} if path is None else read_json(path, f"The file {name}")
        return self._json[name]

    @cached_property
    def part_folders(self) -> list[Path]:
        """Of a merged VisualCLA, where its language model and its vision tower are; else none."""
        if self.layout != MERGED:
            return []
        folder = download_repository(self.name, self.hub)
        for name in (TEXT_FOLDER, VISION_FOLDER):
            if not (folder / name).is_dir():
                raise FileNotFoundError(f"{folder} lacks {name}/, one of the parts of a merged VisualCLA.")
        return [folder / TEXT_FOLDER, folder / VISION_FOLDER]

    @cached_property
    def weight_files(self) -> list[Path]:
        """The files of weights, one or all shards, parts' last, downloaded if need be; see [`weight_paths`]."""
        if self.weights is not None:
            return list(self.weights)
        parts = [path for folder in self.part_folders for path in weight_paths(folder)]

        def find(name: str) -> Path | None:
            if os.path.isdir(self.name):
                return self.file(name)
            found = find_repository_file(self.name, name, is_needed=True, **self.hub)
            return None if found is None else Path(found)

        return [*weight_paths(self.folder, self.hub.get("variant"), find, self.name), *parts]

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by their original names, mapped: none is read before it is used."""
        return self._all_of(tensors_of)

    @cached_property
    def headers(self) -> dict[str, TensorHeader]:
        """What the files of weights say of [`tensors`], without torch."""
        return self._all_of(headers_of)

    def _all_of(self, read: Callable[[list[Path]], dict[str, Any]]) -> dict[str, Any]:
        if not self.part_folders:
            return read(self.weight_files)
        text, vision = self.part_folders
        own = [path for path in self.weight_files if path.parent not in self.part_folders]
        return {**text_tensors(text, read), **vision_tensors(vision, read), **read(own)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Shapes of the tensors; None if the weights aren't on this machine, or are changes to others'."""
        if self.layout == ADAPTER or (self.layout == MERGED and not os.path.isdir(self.name)):
            return None
        if "tensors" not in self.__dict__ and self.weights is None and not os.path.isdir(self.name):
            if not any((self.folder / name).is_file() for name in WEIGHT_NAMES):
                return None
        try:
            return {name: tensor.shape for name, tensor in self.tensors.items()}
        except FileNotFoundError:
            return None


def find_original(name_or_path: Any, /, **kwargs: Any) -> Original | None:
    """What a folder or Hub id is, if it is in an original's layout; None for anything else.

    A Hub repository is asked for its `config.json` alone.

    Args:
        name_or_path: also an [`Original`], which is returned.
        kwargs: `HUB_ARGUMENTS` and `variant`; all others are ignored.

    Raises:
        ValueError: for a later MiniCPM-V, which has the model type alone in common.
    """
    if isinstance(name_or_path, Original):
        return name_or_path
    if isinstance(name_or_path, Location):
        return name_or_path.original
    if not isinstance(name_or_path, (str, os.PathLike)) or os.path.isfile(name_or_path):
        return None
    hub = {key: kwargs[key] for key in (*HUB_ARGUMENTS, "variant") if kwargs.get(key) is not None}
    if not os.path.isdir(name_or_path) and os.fspath(name_or_path) != EMBEDDED_NAME:
        check_model_name(name_or_path)
    # A Hub id is asked for the one file that its loading begins with anyway.
    names = ORIGINAL_CONFIG_NAMES if os.path.isdir(name_or_path) else ORIGINAL_CONFIG_NAMES[:1]
    candidates = (find_repository_file(name_or_path, name, **hub) for name in names)
    found = next((path for path in candidates if path is not None), None)
    if found is None:
        return None
    config = json_object(Path(found))  # of a damaged one transformers has its own words
    return original_from(config, os.fspath(name_or_path), Path(found).parent, hub)


def original_from(
    config: Mapping[str, Any], name: str, folder: Path | None = None, hub: Mapping[str, Any] | None = None
) -> Original | None:
    """What a `config.json` makes of a checkpoint; None if it is none of an original's.

    Args:
        name: of the checkpoint.
        folder: where the file is; if None, `name`, and of a Hub repository what the cache has.
        hub: see [`find_original`].

    Raises:
        ValueError: as [`find_original`].
    """
    kind = kind_of(config)
    if kind is None:
        return None
    if kind == MINICPMV:
        refuse_later_minicpmv(config)
    if hub is None:
        hub = {} if os.path.isdir(name) else {"local_files_only": True}
    return Original(name, Path(name) if folder is None else folder, kind, config, hub)


def original_of(
    weights: Path,
    config_path: str | os.PathLike | None = None,
    vision_config_path: str | os.PathLike | None = None,
    vocab_path: str | os.PathLike | None = None,
) -> Original:
    """A file of VisCPM-Chat's with what lies beside it, or elsewhere.

    Raises:
        FileNotFoundError: if there is no vocabulary, or a file that was given isn't there.
    """
    location = Location(os.fspath(weights), weights, ORIGINAL_FILE)
    vocab = Path(vocab_path) if vocab_path is not None else weights.parent / VOCAB_NAME
    if not vocab.is_file():
        raise FileNotFoundError(
            f"There is no vocabulary at {vocab}. The checkpoint's {VOCAB_NAME} belongs beside it, or give its path as "
            "vocab_path."
        )
    config: dict[str, Any] = {}
    for file in (llm_config_file(location, config_path), vision_config_file(location, vision_config_path)):
        if file is not None:
            config |= read_json(file, "The configuration")
    return Original(os.fspath(weights.parent), weights.parent, CHAT, config, weights=(weights,), vocab=vocab)


def kind_of(config: Mapping[str, Any]) -> str | None:
    """Which system an original `config.json` is of; None if it is none of an original's."""
    model_type = config.get("model_type")
    shared = next((kind for kind, family in FAMILIES.items() if family.model_type == model_type), None)
    if shared is not None:
        is_original = FAMILIES[shared].shares_model_type and "resampler_config" not in config
        return shared if is_original else None
    if model_type is None and sum(key in config for key in LLM_SIZE_KEYS) < 2:
        return None
    kind = next((kind for kind, family in FAMILIES.items() if model_type in family.original_types), None)
    if kind == CPM_BEE or model_type is None:  # CPM-Bee's file, of whichever system it is part
        if "unet_cross_attention_dim" in config:
            return PAINT
        return CHAT if "query_num" in config or "vision_dim" in config else CPM_BEE
    return kind


def hub_arguments(**given: Any) -> dict[str, Any]:
    """Those that are given: the libraries' own defaults are for the rest."""
    return {name: value for name, value in given.items() if value is not None}


def is_of_the_hub(model: str | os.PathLike) -> bool:
    """Whether a model, or the one that an adapter is of, is no path here and not the embedded one."""
    adapter = AdapterFolder.find(model)
    model = model if adapter is None or adapter.base is None else adapter.base
    return model != EMBEDDED_NAME and not os.path.exists(model)


def hub_arguments_for(*models: str | os.PathLike | None, **given: Any) -> dict[str, Any]:
    """As [`hub_arguments`], for these models.

    Raises:
        ValueError: if there are some, and no model is of the Hub.
    """
    found = hub_arguments(**given)
    if found and not any(model is not None and is_of_the_hub(model) for model in models):
        here = ", ".join(os.fspath(model) for model in models if model is not None)
        options = ", ".join(f"{name} (--{name.replace('_', '-')})" for name in found)
        raise ValueError(f"{options} is of a Hub repository, which {here} is not: leave it out.")
    return found


def find_repository_file(name_or_path: str | os.PathLike, filename: str, /, is_needed: bool = False, **kwargs):
    """The path of a folder's or Hub repository's file, downloaded if need be; None if it has none.

    Args:
        is_needed: whether a repository that can't be reached is an error.
        kwargs: `HUB_ARGUMENTS`; all others are ignored.
    """
    if os.path.isdir(name_or_path):
        path = os.path.join(name_or_path, kwargs.get("subfolder") or "", filename)
        return path if os.path.isfile(path) else None
    from transformers.utils.hub import cached_file

    try:
        return cached_file(
            name_or_path,
            filename,
            **{key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None},
            _raise_exceptions_for_gated_repo=is_needed,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=is_needed,
        )
    except (OSError, ValueError):
        if is_needed:
            raise
        return None  # transformers reports it when it looks itself


def at_commit(name_or_path: str | os.PathLike, **hub: Any) -> dict[str, Any]:
    """The Hub's arguments with the commit that a repository is at as the revision: all that is loaded with them is of
    one commit, and what is here is asked for no more. Of a path they are as given."""
    is_here = os.path.exists(name_or_path)
    found = None if is_here else find_repository_file(name_or_path, ORIGINAL_CONFIG_NAMES[0], **hub)
    commit = None if found is None else commit_of(found)
    return hub if commit is None else {**hub, "revision": commit}


def commit_of(path: str | os.PathLike) -> str | None:
    """The commit of the Hub's repository that a path in its cache is of; None for any other."""
    from transformers.utils.hub import extract_commit_hash

    return extract_commit_hash(os.path.join(path, "file"), None)  # which looks at what is above the last name


def download_repository(repo_id: str | os.PathLike, hub_kwargs: Mapping[str, Any]) -> Path:
    """A Hub repository's files on this machine; a folder is returned as it is."""
    if os.path.isdir(repo_id):
        return Path(repo_id)
    known = ("cache_dir", "force_download", "token", "revision", "local_files_only")
    options = {key: hub_kwargs[key] for key in known if hub_kwargs.get(key) is not None}
    return Path(snapshot_download(os.fspath(repo_id), ignore_patterns=OTHER_FORMATS, **options))


def model_folder(name: str | os.PathLike, hub: Mapping[str, Any]) -> Path:
    """A model's folder, or that of a Hub repository's files on this machine.

    Raises:
        OriginalCheckpointError: for a file.
        FileNotFoundError: for a path that isn't there.
    """
    path = Path(name).expanduser()
    if path.is_file():
        raise OriginalCheckpointError(f"{path} is a file; give the model's folder, with its configuration.")
    if not path.is_dir() and os.fspath(name).count("/") != 1:
        raise FileNotFoundError(f"There is no folder {path}.")
    return path if path.is_dir() else download_repository(name, hub)


# ------------------------------------------------------------------------------------------------------------ tensors


def weight_paths(
    folder: Path,
    variant: str | None = None,
    find: Callable[[str], Path | None] | None = None,
    name: str | None = None,
) -> list[Path]:
    """The files of a folder's weights, one or all shards.

    Args:
        variant: `"v1"` for `pytorch_model.v1.bin`, as of `from_pretrained`.
        find: finds, or fetches, a file by its name; the folder's own unless given.
        name: of the checkpoint, for errors.

    Raises:
        ValueError: for an index that is none, or leads outside.
        FileNotFoundError: if there are no weights, several that are alternatives, or a shard is missing.
    """

    def beside(file: str) -> Path | None:
        return folder / file if (folder / file).is_file() else None

    find, name = find or beside, name or os.fspath(folder)
    for usual in WEIGHT_NAMES:
        found = find(variant_name(usual, variant))
        if found is None:
            continue
        if not usual.endswith(".json"):
            return [found]
        weight_map = read_json(found, "The index of weights").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise OriginalCheckpointError(f"{found} is no index of weights: it has no weight_map.")
        shards = {}
        for shard in dict.fromkeys(weight_map.values()):
            check_inside(found.parent, shard, found, is_there=False)
            shards[shard] = find(shard)
            if shards[shard] is None:
                raise FileNotFoundError(f"{name} lacks {shard}, one of the files that its index names.")
            check_inside(shards[shard].parent, shard, found)
        return list(shards.values())
    files = [file for file in original_files(folder) if file.name not in VAE_NAMES and variant is None]
    if len(files) == 1:
        return files
    wanted = " or ".join(variant_name(usual, variant) for usual in WEIGHT_NAMES[::2])
    names = ", ".join(file.name for file in files) or "none"
    raise FileNotFoundError(
        f"{name} has {len(files)} files of weights instead of one ({names}): it takes {wanted}, or shards with their "
        "index."
    )


def variant_name(name: str, variant: str | None) -> str:
    """`pytorch_model.bin` of the variant `v1` is `pytorch_model.v1.bin`."""
    stem, dot, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}{dot}{suffix}"


def tensors_of(files: list[Path]) -> dict[str, torch.Tensor]:
    """All tensors of these files, mapped: none is read before it is used.

    Raises:
        ValueError: for damaged files, ones that hold more than tensors, or a name that is in two of them.
    """
    from .tensor_files import mapped_tensors

    return _of_files(files, mapped_tensors, load_state_dict)


def headers_of(files: list[Path]) -> dict[str, TensorHeader]:
    """What these files say of their tensors.

    Raises:
        ValueError: as [`tensors_of`].
    """
    return _of_files(files, safetensors_header, state_dict_header)


def _of_files(files: list[Path], read_safetensors: Callable, read_archive: Callable) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for file in files:
        own = read_safetensors(file) if file.suffix == ".safetensors" else read_archive(file)
        twice = next((name for name in own if name in tensors), None)
        if twice is not None:
            raise OriginalCheckpointError(f"{file.parent} has {twice} twice; the second time in {file.name}.")
        tensors |= own
    return tensors


# VisualCLA's names of its whole model begin with these; those of its parts' own files don't.
TEXT_PREFIX, VISION_PREFIX = "text_model.", "vision_model."


def text_tensors(folder: Path, read: Callable[[list[Path]], dict[str, Any]] = tensors_of) -> dict[str, Any]:
    """A language model's folder, by the names of the whole VisualCLA; `read` may be [`headers_of`]."""
    return {TEXT_PREFIX + name: tensor for name, tensor in read(weight_paths(folder)).items()}


def vision_tensors(folder: Path, read: Callable[[list[Path]], dict[str, Any]] = tensors_of) -> dict[str, Any]:
    """A vision tower's folder, or a whole CLIP's, likewise."""
    tensors = read(weight_paths(folder))
    if any(name.startswith(VISION_PREFIX) for name in tensors):
        return {VISION_PREFIX + name: tensor for name, tensor in tensors.items() if name.startswith(VISION_PREFIX)}
    return {2 * VISION_PREFIX + name: tensor for name, tensor in tensors.items()}
