"""What a checkpoint consists of, and which of its tensors goes where, decided before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import GENERATION_CONFIG_NAME

from ..checkpoints.configurations import read_config
from ..checkpoints.errors import ConversionError, OriginalCheckpointError
from ..checkpoints.key_matching import KeyMatcher, shape_after, shape_before
from ..checkpoints.location import (
    ADAPTER,
    TEXT_PREFIX,
    VISION_PREFIX,
    Location,
    file_beside,
    json_object,
    llm_config_file,
    original_weight_files,
    tensors_of,
    vision_config_file,
    vocab_file,
)
from ..checkpoints.original import (
    CHAT,
    PAINT,
    chat_config,
    checkpoint_kind,
    key_map_of,
    read_json,
    text_config,
)
from ..checkpoints.readers import reader_of
from ..checkpoints.tensor_files import SafetensorsFolder, TensorSpec
from ..checkpoints.transfer import TensorTransfer
from ..families.family import FAMILIES
from ..families.key_maps import KEEP, THIRDS, TOKEN_ROWS
from ..modeling.token_ids_cpm_bee import padded_vocab_size
from .inspection import merge_command
from .plan import (
    EXTRAS_NAME,
    TRANSFORMERS_WEIGHTS,
    Checkpoint,
    ConversionPlan,
    FilePlan,
    Part,
    check_vocabulary,
    extra_tensors,
    spec_of,
)


# -------------------------------------------------------------------------------------------------- original -> ours


def open_original(
    location: Location,
    llm_config: str | os.PathLike | None = None,
    vision_config: str | os.PathLike | None = None,
    diffusion_config: str | os.PathLike | None = None,
    vae: str | os.PathLike | None = None,
    vocab: str | os.PathLike | None = None,
) -> Checkpoint:
    """Maps an original checkpoint and checks that it is complete.

    Raises:
        OriginalCheckpointError: if it isn't, or its configurations are of another one.
        FileNotFoundError: if a file is missing.
    """
    if location.kind is not None:  # of all others only the tensors tell
        given = {"llm_config": llm_config, "vision_config": vision_config, "diffusion_config": diffusion_config}
        return _open_named(location, given | {"vae": vae, "vocab": vocab})
    vae_file = Path(vae) if vae is not None else None
    files = original_weight_files(location, except_for=vae_file)
    weights, tensors = files[0], tensors_of(files)
    kind = checkpoint_kind(tensors)
    if kind is None:
        raise OriginalCheckpointError(
            f"{weights} is no VisCPM or CPM-Bee checkpoint: its {len(tensors)} tensors have other names "
            f"({', '.join(list(tensors)[:3])})."
        )
    llm_file, vision_file = llm_config_file(location, llm_config), vision_config_file(location, vision_config)
    llm = read_json(llm_file, "The configuration") if llm_file is not None else {}
    vision = read_json(vision_file, "The vision configuration") if vision_file is not None else {}
    original_configs = {"config.json": llm}
    if kind == CHAT and vision:
        original_configs["vision.json"] = vision
    generation_file = location.folder / GENERATION_CONFIG_NAME
    if generation_file.is_file():
        original_configs[GENERATION_CONFIG_NAME] = read_json(generation_file, "The generation configuration")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    words = vocab_file(location, vocab)
    if kind == PAINT:
        from .paint import open_original_paint

        return open_original_paint(
            location, weights, tensors, shapes, llm, words, original_configs, diffusion_config, vae_file
        )
    if vae is not None or diffusion_config is not None:
        raise OriginalCheckpointError(f"{weights} is a {kind.replace('_', '-')} checkpoint: it has no VAE, no UNet.")

    config = chat_config(llm, vision, shapes) if kind == CHAT else text_config(llm, shapes)
    reader_of(kind).state_dict(tensors, FAMILIES[kind].model_class, config, weights)
    check_vocabulary(words, config)
    part = Part("", TRANSFORMERS_WEIGHTS, key_map_of(kind, tensors))
    return Checkpoint(location, kind, tensors, [part], files, config, words, original_configs)


def _open_named(location: Location, given: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint whose own configuration says of which system it is; all that belongs to it is in its folder."""
    original = location.original
    surplus = [name for name, value in given.items() if value is not None]
    if surplus:
        raise OriginalCheckpointError(
            f"{', '.join(surplus)} is for files of VisCPM and CPM-Bee, and {location.name} is none: leave it out."
        )
    if original.layout == ADAPTER:
        raise OriginalCheckpointError(
            f"{location.name} is VisualCLA's adapter alone, which holds changes to two base models; merge it with "
            f"them: {merge_command(location.name)}"
        )
    prefixes = {location.path: "", **dict(zip(original.part_folders, (TEXT_PREFIX, VISION_PREFIX), strict=False))}
    places = {}
    for path in original.weight_files:
        file, prefix = path.relative_to(location.path).as_posix(), prefixes[path.parent]
        for key in tensors_of([path]):
            # CLIP's tensors may lack the word that its whole model has before them.
            name = next((name for name in (prefix + key, 2 * prefix + key) if name in original.tensors), None)
            if name is not None:
                places[name] = (file, key)
    checkpoint = checkpoint_of(Checkpoint, location, original.tensors, original.weight_files, places=places)
    # All that lies beside the weights and isn't written anew from them, to be given back on the way back.
    for folder in prefixes:
        for path in sorted(folder.glob("*.json")):
            checkpoint.original_configs[path.relative_to(location.path).as_posix()] = json_object(path)
    return checkpoint


def checkpoint_of(
    checkpoint_class: type[Checkpoint],
    location: Location,
    tensors: Mapping[str, torch.Tensor],
    weight_files: list[Path],
    **own: Any,
) -> Checkpoint:
    """A checkpoint of original tensors with the configuration that they need, checked; `own` are fields of its class.

    Raises:
        OriginalCheckpointError: if tensors are missing, unknown, or of another shape.
    """
    original, family = location.original, location.original.family
    part = Part("", TRANSFORMERS_WEIGHTS, family.key_maps[0])
    configs = {"config.json": dict(original.config)}
    checkpoint = checkpoint_class(location, original.kind, tensors, [part], weight_files, None, None, configs, **own)
    empty = checkpoint.empty_tensors()
    shapes = {name: tensor.shape for name, tensor in empty.items()}
    checkpoint.config = reader_of(original.kind).config(original, shapes=shapes)
    reader_of(original.kind).state_dict(empty, family.model_class, checkpoint.config, location.path)
    return checkpoint


def plan_conversion(checkpoint: Checkpoint, dtype: torch.dtype | None, max_shard_bytes: int) -> ConversionPlan:
    """From the original's names to ours."""
    files: list[FilePlan] = []
    left = checkpoint.specs()
    for part in checkpoint.parts:
        matcher = KeyMatcher(part.key_map)
        transfers = []
        for name in list(left):
            own_name = name.removeprefix(part.source_prefix)
            if not name.startswith(part.source_prefix) or matcher.dropped_reason(own_name) is not None:
                continue
            matches = matcher.match_all(own_name)
            if matches:
                source = left.pop(name)
                transfers += [_transfer(source, target, entry.operation, dtype) for target, entry in matches]
        files += _shards(part, transfers, max_shard_bytes)
    dropped, extras = {}, []
    for name, spec in left.items():
        reasons = (KeyMatcher(part.key_map).dropped_reason(name) for part in checkpoint.parts)
        dropped[name] = next((reason for reason in reasons if reason), "unknown")
        extras.append(TensorTransfer(spec, spec))
    if extras:
        files.append(FilePlan(EXTRAS_NAME, tuple(extras), is_model=False))
    return ConversionPlan(tuple(files), dropped, dtype)


def _transfer(source: TensorSpec, target: str, operation: str, dtype: torch.dtype | None) -> TensorTransfer:
    shape = tuple(shape_after(operation, torch.Size(source.shape)))
    new_dtype = dtype if dtype is not None and source.dtype.is_floating_point else source.dtype
    return TensorTransfer(source, TensorSpec(target, new_dtype, shape), operation)


def _shards(part: Part, transfers: list[TensorTransfer], max_bytes: int) -> list[FilePlan]:
    """Divides a part's tensors, in their order, into files of at most `max_bytes`; a bigger tensor has its own."""
    groups: list[list[TensorTransfer]] = [[]]
    size = 0
    for transfer in transfers:
        if groups[-1] and size + transfer.target.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(transfer)
        size += transfer.target.nbytes
    prefix = f"{part.folder}/" if part.folder else ""
    if len(groups) == 1:
        return [FilePlan(f"{prefix}{part.weights_name}.safetensors", tuple(groups[0]))]
    return [
        FilePlan(f"{prefix}{part.weights_name}-{number:05}-of-{len(groups):05}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


# -------------------------------------------------------------------------------------------------- ours -> original


def open_converted(location: Location) -> Checkpoint:
    """Maps a converted folder.

    Raises:
        ConversionError, OSError: if it is damaged or incomplete.
    """
    family = FAMILIES[location.kind]
    words = file_beside(location, None, ("vocab.txt", "tokenizer/vocab.txt"), "vocabulary")
    if words is None and not family.shares_model_type:
        raise FileNotFoundError(f"{location.name} has no vocab.txt.")
    if location.kind == PAINT:
        from .paint import open_converted_paint

        return open_converted_paint(location, words)
    config = read_config(location.path)
    weights = SafetensorsFolder(location.path, TRANSFORMERS_WEIGHTS)
    part = Part("", TRANSFORMERS_WEIGHTS, family.key_maps[0])
    tensors, extras = weights.state_dict(), extra_tensors(location.path)
    files = [location.path / file for file in weights.files]
    return Checkpoint(location, location.kind, {**tensors, **extras}, [part], files, config, words)


def plan_original(
    checkpoint: Checkpoint, dtype: torch.dtype | None, manifest: Mapping[str, Any], weights_name: str
) -> ConversionPlan:
    """From our names to the original's.

    Without `dtype` every tensor gets the dtype that it had in the original file. Several original files are had back
    as several.
    """
    known = {entry["target"]: entry for entry in _entries(manifest)}
    dropped_before = {entry["source"]: entry for entry in _entries(manifest, "dropped")}
    done: set[str] = set()
    files: dict[str, dict[str, TensorTransfer]] = {}

    def add(name: str, before: Mapping[str, Any], target: TensorSpec, operation: str = KEEP) -> None:
        done.add(name)
        file = files.setdefault(before.get("source_file", weights_name), {})
        target = replace(target, name=before.get("source_key", target.name))
        if operation in THIRDS and target.name in file:
            first = file[target.name]
            rows = first.target.shape[0] + target.shape[0]
            target = replace(first.target, shape=(rows, *target.shape[1:]))
            file[target.name] = replace(first, target=target, others=(*first.others, name))
        else:
            source = spec_of(name, checkpoint.tensors[name])
            file[target.name] = TensorTransfer(source, target, operation, is_reverted=operation != KEEP)

    for part in checkpoint.parts:
        matcher = KeyMatcher(part.key_map)
        found = {
            name: match
            for name in checkpoint.tensors
            if name.startswith(part.source_prefix)
            and name not in done
            and (match := matcher.match_target(name.removeprefix(part.source_prefix))) is not None
        }
        # The thirds of a tensor in their order, whatever order the files have them in.
        for name, (original, entry) in sorted(found.items(), key=lambda item: _third(item[1][1].operation)):
            tensor = checkpoint.tensors[name]
            before = known.get(name.removeprefix(part.source_prefix), {})
            new_dtype = dtype or (getattr(torch, before["source_dtype"]) if "source_dtype" in before else tensor.dtype)
            shape = tuple(shape_before(entry.operation, tensor.shape))
            if entry.operation == TOKEN_ROWS:
                shape = (num_words_of(checkpoint), *shape[1:])
            add(name, before, TensorSpec(original, new_dtype, shape), entry.operation)
    for name, tensor in checkpoint.tensors.items():
        if name not in done and (name in dropped_before or _is_extra(name, checkpoint.parts)):
            add(name, dropped_before.get(name, {}), spec_of(name, tensor))
    strange = [name for name in checkpoint.tensors if name not in done]
    if strange:
        raise ConversionError(
            f"{checkpoint.location.name} has {len(strange)} tensors that the original doesn't know "
            f"({', '.join(strange[:3])}): was it saved with an adapter, or quantised?"
        )
    plans = tuple(FilePlan(file, tuple(transfers.values())) for file, transfers in files.items())
    return ConversionPlan(plans, {}, dtype)


def _third(operation: str) -> int:
    return THIRDS.index(operation) if operation in THIRDS else 0


def num_words_of(checkpoint: Checkpoint) -> int:
    """Rows of the original's embedding.

    Raises:
        ConversionError: if tokens were added, for which an original file has no place.
    """
    config = checkpoint.config.get_text_config(decoder=True)
    num_added = config.vocab_size - padded_vocab_size(config.num_words)
    if num_added:
        raise ConversionError(
            f"{checkpoint.location.name} has {num_added:,} tokens more than its vocabulary of {config.num_words:,} "
            "words and their slots: tokens were added, which the original's format can't hold. Resize the embedding "
            f"to {padded_vocab_size(config.num_words):,} rows first."
        )
    return config.num_words


def _entries(manifest: Mapping[str, Any], key: str = "tensors") -> Iterable[dict[str, Any]]:
    entries = manifest.get(key)
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _is_extra(name: str, parts: list[Part]) -> bool:
    return any(KeyMatcher(part.key_map).dropped_reason(name) for part in parts)
