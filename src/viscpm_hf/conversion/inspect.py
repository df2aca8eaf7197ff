"""What is this checkpoint? Answered from names, shapes and configurations; no weight is read."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path

from ..checkpoints.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFolder
from ..checkpoints.errors import ConversionError, OriginalCheckpointError
from ..checkpoints.headers import TensorHeader, safetensors_header, weight_files
from ..checkpoints.json_files import load_json
from ..checkpoints.location import (
    ADAPTER,
    DIFFUSERS_FOLDER,
    ORIGINAL_FOLDER,
    Location,
    find_original,
    headers_of,
    locate,
    original_files,
    vocab_file,
)
from ..checkpoints.original import (
    CHAT,
    ORIGINAL_SUFFIXES,
    PAINT,
    VAE_NAMES,
    checkpoint_kind,
    state_dict_header,
)
from ..checkpoints.stored_quantization import stored_quantization
from ..checkpoints.visualcla_adapter import ADAPTER_FILES, read_adapter
from ..families.family import FAMILIES
from ..plain_text import plain
from .comparison import compare_folder, compare_named, compare_original, config_of, shapes_before
from .inspection import KINDS, Inspection, convert_command, inspection, merge_command, sizes_of


DIFFUSION_PARTS = ("UNet", "VAE")


def inspect(
    source: str | os.PathLike,
    *,
    llm_config: str | os.PathLike | None = None,
    vision_config: str | os.PathLike | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Inspection:
    """Says what a checkpoint is, without reading its weights.

    Args:
        source: a file, a folder, or a Hub id. Of a Hub repository only the small files are fetched.
        llm_config, vision_config: the original's JSON files, if they aren't beside the weights.
        revision, token, cache_dir: of the Hub.

    Raises:
        OriginalCheckpointError: if it is no checkpoint of VisCPM or CPM-Bee, or a damaged one.
        OSError: if it isn't there or can't be read.
    """
    adapter = AdapterFolder.find(source)
    if adapter is not None and find_original(source) is None:  # VisualCLA's release is an adapter, too
        return _inspect_peft_adapter(adapter, os.fspath(source))
    location = locate(source, revision, token, with_weights=False, cache_dir=cache_dir)
    if location.is_converted:
        return _inspect_converted(location)
    if location.kind is not None:  # of all others only the tensors tell
        return _inspect_adapter(location) if location.original.layout == ADAPTER else _inspect_named(location)
    files = original_files(location.path) if location.layout == ORIGINAL_FOLDER else [location.path]
    models = [file for file in files if file.name not in VAE_NAMES]
    if len(models) > 1:
        return _inspect_alternatives(location, models)
    if not models:
        return _inspect_without_weights(location)
    return _inspect_original(location, models[0], llm_config, vision_config)


# ---------------------------------------------------------------------------------------------------------- original


def _inspect_original(location: Location, weights: Path, llm_config, vision_config) -> Inspection:
    headers = state_dict_header(weights)
    kind = checkpoint_kind(headers)
    if kind is None:
        raise OriginalCheckpointError(
            f"{weights} is no VisCPM or CPM-Bee checkpoint: its {len(headers)} tensors have other names "
            f"({', '.join(list(headers)[:3])})."
        )
    parts = [(FAMILIES[kind].part_of(name), header) for name, header in headers.items()]
    found = compare_original(location, kind, headers, llm_config, vision_config)
    missing = list(found.missing)
    try:
        vocab_file(location, None)
    except FileNotFoundError:
        missing.append("vocab.txt")
    if kind == PAINT and not any((location.folder / name).exists() for name in ("vae", "vae.bin")):
        missing.append("vae/ (the original file has none; openbmb/VisCPM-Paint has it in a folder)")
    return inspection(
        location,
        kind,
        {weights.name: weights.stat().st_size},
        parts,
        found.config,
        missing=missing,
        surplus=found.surplus,
        problems=found.problems,
        next_command=convert_command(location.name.rstrip("/"), missing),
    )


def _inspect_named(location: Location) -> Inspection:
    """An original folder whose configuration says of which system it is, or of a Hub repository that alone."""
    original = location.original
    missing = _missing_tokenizer(location)
    files: dict[str, int] = {}
    headers: dict[str, TensorHeader] = {}
    problems: list[str] = []
    try:
        files = {path.relative_to(location.path).as_posix(): path.stat().st_size for path in original.weight_files}
        headers = original.headers
    except FileNotFoundError as error:
        missing.append(str(error))
    except (ConversionError, OriginalCheckpointError) as error:
        problems.append(str(error))
    found = compare_named(original, headers)
    return inspection(
        location,
        original.kind,
        files,
        [(original.family.part_of(name), header) for name, header in headers.items()],
        found.config,
        is_sharded=len(files) > 1 + len(original.part_folders),
        missing=missing + found.missing,
        surplus=found.surplus,
        problems=problems + found.problems,
        next_command=convert_command(location.name.rstrip("/"), []),
    )


BASES = (
    "text_model (Chinese-Alpaca-Plus-7B, which the adapter changes)",
    "vision_model (openai/clip-vit-large-patch14, likewise)",
)


def _inspect_adapter(location: Location) -> Inspection:
    """VisualCLA's changes alone: what they are changes to is missing."""
    original = location.original
    missing = [*BASES, *_missing_tokenizer(location)]
    files = {name: (location.path / name).stat().st_size for name in ADAPTER_FILES if (location.path / name).is_file()}
    headers: dict[str, TensorHeader] = {}
    problems = []
    try:
        adapter = read_adapter(location.path, headers_of)
        headers = {name: replace(header, name=name) for name, header in adapter.own.items()}
        for name, change in adapter.changes.items():
            headers |= {
                f"{name}.{side}": replace(half, name=name) for side, half in (("A", change.a), ("B", change.b))
            }
    except FileNotFoundError as error:
        missing.append(str(error))
    except OriginalCheckpointError as error:
        problems.append(str(error))
    return inspection(
        location,
        original.kind,
        files,
        [(original.family.part_of(name), header) for name, header in headers.items()],
        config_of(original),
        missing=missing,
        problems=problems,
        next_command=merge_command(location.name),
    )


TOKENIZERS = ("tokenizer.model", "tokenizer.json")


def _missing_tokenizer(location: Location) -> list[str]:
    has_one = any((location.path / name).is_file() for name in TOKENIZERS)
    return [] if has_one else [f"tokenizer ({' or '.join(TOKENIZERS)})"]


def _inspect_alternatives(location: Location, files: list[Path]) -> Inspection:
    """A folder of which one file has to be chosen."""
    kinds = {}
    for file in files:
        try:
            kinds[file.name] = checkpoint_kind(state_dict_header(file)) or "no VisCPM or CPM-Bee checkpoint"
        except OriginalCheckpointError as error:
            kinds[file.name] = f"unusable: {error}"
    problems = [f"{name}: {kind}" for name, kind in kinds.items() if kind not in KINDS]
    known = {kind for kind in kinds.values() if kind in KINDS}
    usable = next((file.name for file in files if kinds[file.name] in KINDS), files[0].name)
    sizes = {file.name: file.stat().st_size for file in files}
    return Inspection(
        source=location.name,
        kind=known.pop() if len(known) == 1 else None,
        layout=location.layout,
        files=sizes,
        problems=problems,
        alternatives=[file.name for file in files],
        next_command=shlex.join(["viscpm-hf", "inspect", f"{location.name.rstrip('/')}/{usable}"]),
    )


def _inspect_without_weights(location: Location) -> Inspection:
    """A folder, or a Hub repository, of which only the configuration is at hand."""
    original = location.original
    config = None if original is None else config_of(original)
    kind = CHAT if original is not None and original.kind == CHAT else None
    return Inspection(
        source=location.name,
        kind=kind,
        layout=location.layout,
        files={},
        sizes=sizes_of(config),
        missing=[f"weights ({' or '.join(ORIGINAL_SUFFIXES)})"],
        next_command=convert_command(location.name, []),
    )


# ----------------------------------------------------------------------------------------------------------- adapters


def _inspect_peft_adapter(adapter: AdapterFolder, name: str) -> Inspection:
    weights, missing, problems, specs = adapter.path / ADAPTER_WEIGHTS, [], [], []
    files = {ADAPTER_WEIGHTS: weights.stat().st_size} if weights.is_file() else {}
    if files:
        try:
            specs = list(safetensors_header(weights).values())
        except ConversionError as error:
            problems.append(str(error))
    else:
        missing.append(ADAPTER_WEIGHTS)
    if adapter.base is None:
        missing.append("the name of the model that it was trained on (base_model_name_or_path)")
    config = load_json(adapter.path / ADAPTER_CONFIG)
    dtypes: Counter[str] = Counter()
    for spec in specs:
        dtypes[spec.dtype] += spec.numel
    count = sum(dtypes.values())
    return Inspection(
        source=name,
        kind=None,
        layout=f"{plain(config.get('peft_type') or 'PEFT').replace('LORA', 'LoRA')} adapter",
        files=files,
        parameters={"adapter": count} if count else {},
        dtypes=dict(dtypes),
        sizes={key: config[key] for key in ("r", "lora_alpha") if isinstance(config.get(key), int)},
        missing=missing,
        problems=problems,
        system=f"changes to {plain(adapter.base)}" if adapter.base else "changes to another model",
        next_command=shlex.join(["viscpm-hf", "chat", name, "IMAGE"]) if adapter.base else "",
    )


# --------------------------------------------------------------------------------------------------------- converted


def _inspect_converted(location: Location) -> Inspection:
    is_paint = location.layout == DIFFUSERS_FOLDER
    folders = {"": "model"}
    if is_paint:
        folders = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    files, stored, missing, problems = {}, [], [], []
    is_sharded = False
    for folder, name in folders.items():
        try:
            names = weight_files(location.path / folder, name)
            is_sharded |= len(names) > 1
            for file in names:
                path = location.path / folder / file
                files[os.path.join(folder, file)] = path.stat().st_size
                stored += [(folder, header) for header in safetensors_header(path).values()]
        except FileNotFoundError as error:
            missing.append(str(error))
        except ConversionError as error:
            problems.append(str(error))
    is_whole = not (missing or problems)
    quantization = stored_quantization(location.path)
    headers = {folder: {it.name: it for place, it in stored if place == folder} for folder in folders}
    found = compare_folder(location.path, location.kind, headers if is_whole and quantization is None else None)
    parts = [(_converted_part(folder, header.name), header) for folder, header in stored]
    if quantization is not None and is_whole:
        parts, missing = _as_before(parts, location)
    name = shlex.quote(location.name)
    chats = FAMILIES[location.kind].answers
    if is_paint:
        command = f"viscpm-hf paint {name} PROMPT -o PNG"
    else:
        command = f"viscpm-hf chat {name} IMAGE" if chats else f"viscpm-hf publish {name} REPO_ID --dry-run"
    return inspection(
        location,
        location.kind,
        files,
        parts,
        found.config,
        is_sharded=is_sharded,
        missing=missing,
        problems=problems + found.problems,
        quantization=quantization,
        next_command=command if is_whole else "",
    )


def _as_before(
    parts: list[tuple[str, TensorHeader]], location: Location
) -> tuple[list[tuple[str, TensorHeader]], list[str]]:
    """A quantised model's weights with the shapes that they had before, and the names of those that are missing."""
    found = {header.name for part, header in parts if part not in DIFFUSION_PARTS}
    shapes = shapes_before(location.path, location.kind, found)
    plain = [
        (part, header if part in DIFFUSION_PARTS else replace(header, shape=shapes[header.name]))
        for part, header in parts
        if part in DIFFUSION_PARTS or header.name in shapes
    ]
    return plain, [name for name in shapes if name not in found]


def _converted_part(folder: str, name: str) -> str:
    if folder == "text_encoder":
        return "language model" if name.startswith("model.") else "projection"
    if folder:
        return {"unet": "UNet", "vae": "VAE"}[folder]
    if "vision_tower." in name:
        return "vision tower"
    if name.startswith("resampler."):
        return "resampler"
    return "projector" if "multi_modal_projector." in name else "language model"
