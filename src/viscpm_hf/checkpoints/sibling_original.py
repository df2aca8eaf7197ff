"""Original folders of the siblings: what they are, their tensors by our names, and whether all are there.

OmniLMM and MiniCPM-V are one file or several shards. VisualCLA comes in two forms: `merged`, with its language model
and its vision tower in folders of their own, or the `adapter` of the release, which needs both bases
(`siblings.adapter`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..families.sibling_key_maps import KEY_MAPS
from ..modeling.configuration_vision_resampler import (
    MiniCPMVConfig,
    OmniLMMConfig,
    VisionResamplerConfig,
    VisualCLAConfig,
)
from .errors import OriginalCheckpointError
from .original import (
    WEIGHT_DTYPES,
    CheckpointProblems,
    _num_layers,
    find_repository_file,
    load_state_dict,
    read_json,
)
from .tensor_files import SafetensorsFolder, check_inside, weight_files
from .weight_transforms import KeyMatcher, apply_operation, shape_after


WHOLE, MERGED, ADAPTER = "whole", "merged", "adapter"
CONFIG_CLASSES: dict[str, type[VisionResamplerConfig]] = {
    config_class.model_type: config_class for config_class in (OmniLMMConfig, MiniCPMVConfig, VisualCLAConfig)
}
ADAPTER_CONFIG_NAME = "adapter_config.json"
TEXT_FOLDER, VISION_FOLDER = "text_encoder", "vision_encoder"
# Names of the whole model begin with these; those of its parts' own files don't.
TEXT_PREFIX, VISION_PREFIX = "text_model.", "vision_model."
# Copies of weights for other libraries, which some repositories have beside ours.
OTHER_FORMATS = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf"]
# Placeholders, and how far from the vocabulary's end they are if no file of the tokenizer tells.
PLACEHOLDERS = {"omnilmm": ("<im_patch>", 9), "visualcla": ("<img_token>", 1)}


@dataclass(frozen=True)
class OriginalSibling:
    """An original checkpoint of one of the siblings on this machine."""

    folder: Path
    model_type: str
    layout: str
    """`"whole"`, `"merged"` or `"adapter"`."""
    original_config: dict[str, Any]


def find_original_sibling(name_or_path: Any, /, *, with_weights: bool = False, **hub_kwargs) -> OriginalSibling | None:
    """The original checkpoint in a folder or Hub repository; None for anything else.

    Args:
        with_weights: whether all of a Hub repository is to be there. Otherwise it is asked for `config.json` alone.

    Raises:
        OSError: if a repository can't be had.
    """
    if not isinstance(name_or_path, (str, os.PathLike)) or os.path.isfile(name_or_path):
        return None
    config_file = find_repository_file(name_or_path, "config.json", **hub_kwargs)
    if config_file is None:
        return None
    try:
        original = read_json(config_file, "The configuration")
    except OriginalCheckpointError:
        return None  # transformers has its own words for it
    model_type = original.get("model_type")
    if model_type not in CONFIG_CLASSES or "resampler_config" in original:
        return None
    folder = Path(config_file).parent
    if with_weights and not os.path.isdir(name_or_path):
        folder = download_repository(name_or_path, hub_kwargs)
    layout = WHOLE
    if model_type == VisualCLAConfig.model_type:
        if (folder / ADAPTER_CONFIG_NAME).is_file():
            layout = ADAPTER
        elif any((folder / name).is_dir() for name in (TEXT_FOLDER, VISION_FOLDER)):
            layout = MERGED
    return OriginalSibling(folder, model_type, layout, original)


def download_repository(repo_id: str | os.PathLike, hub_kwargs: Mapping[str, Any]) -> Path:
    """A Hub repository's files on this machine; a folder is returned as it is."""
    if os.path.isdir(repo_id):
        return Path(repo_id)
    from huggingface_hub import snapshot_download

    known = ("cache_dir", "force_download", "token", "revision", "local_files_only")
    options = {key: hub_kwargs[key] for key in known if hub_kwargs.get(key) is not None}
    return Path(snapshot_download(os.fspath(repo_id), ignore_patterns=OTHER_FORMATS, **options))


# ------------------------------------------------------------------------------------------------------------ tensors


def folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's `model` or `pytorch_model` files, mapped: none is read before it is used.

    Raises:
        ValueError: for damaged files, or ones that hold more than tensors.
        OSError: if there are none.
    """
    paths = weight_paths(folder)
    if paths[0].suffix == ".safetensors":
        return SafetensorsFolder(folder, "model").state_dict()
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        tensors |= load_state_dict(path)
    return tensors


def weight_paths(folder: Path) -> list[Path]:
    """The files of a folder's weights, one or all shards; raises as [`folder_tensors`]."""
    if any((folder / f"model.safetensors{suffix}").is_file() for suffix in ("", ".index.json")):
        return [folder / name for name in weight_files(folder, "model")]
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        weight_map = read_json(index, "The index of weights").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise OriginalCheckpointError(f"{index} is no index of weights: it has no weight_map.")
        names = list(dict.fromkeys(weight_map.values()))
        for name in names:
            check_inside(folder, name, index)
    else:
        names = [file.name for file in sorted(folder.glob("pytorch_model*.bin"))]
        if len(names) != 1:
            raise FileNotFoundError(
                f"{folder} has {len(names)} files of weights instead of one ({', '.join(names) or 'none'}): it takes "
                "model.safetensors or pytorch_model.bin, or shards with their index."
            )
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}, one of the {len(names)} files that its index names.")
    return [folder / name for name in names]


def text_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """A language model's folder, by the names of the whole VisualCLA."""
    return {TEXT_PREFIX + name: tensor for name, tensor in folder_tensors(folder).items()}


def vision_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """A vision tower's folder, or a whole CLIP's, by the names of the whole VisualCLA."""
    tensors = folder_tensors(folder)
    if any(name.startswith(VISION_PREFIX) for name in tensors):
        return {VISION_PREFIX + name: tensor for name, tensor in tensors.items() if name.startswith(VISION_PREFIX)}
    return {2 * VISION_PREFIX + name: tensor for name, tensor in tensors.items()}


def original_tensors(sibling: OriginalSibling) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint that is whole or merged, by their original names, mapped."""
    if sibling.layout != MERGED:
        return folder_tensors(sibling.folder)
    for name in (TEXT_FOLDER, VISION_FOLDER):
        if not (sibling.folder / name).is_dir():
            raise FileNotFoundError(f"{sibling.folder} lacks {name}/, one of the parts of a merged VisualCLA.")
    return {
        **text_tensors(sibling.folder / TEXT_FOLDER),
        **vision_tensors(sibling.folder / VISION_FOLDER),
        **folder_tensors(sibling.folder),
    }


def converted_tensors(model_type: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Original tensors -> ours; nearly all are views of them. Names that the map doesn't have are kept."""
    matcher = KeyMatcher(KEY_MAPS[model_type])
    converted: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if matcher.dropped_reason(name) is not None:
            continue
        matches = matcher.match_all(name)
        for target, entry in matches:
            fits = shape_after(entry.operation, tensor.shape).numel() * len(matches) == tensor.numel()
            # What has a strange shape is kept as it is: the comparison with the model names it.
            converted[target] = apply_operation(entry.operation, tensor) if fits else tensor
        if not matches:
            converted[name] = tensor
    return converted


# ------------------------------------------------------------------------------------------------------------- sizes


def with_stored_sizes(
    config: VisionResamplerConfig, shapes: Mapping[str, torch.Size], folder: Path
) -> VisionResamplerConfig:
    """The configuration with what the tensors, by our names, and the tokenizer's files know better.

    No original `config.json` has the vision tower's sizes, and the vocabulary's size is often the base model's.
    """
    config = copy.deepcopy(config)
    embedding = shapes.get("language_model.model.embed_tokens.weight")
    if embedding is not None:
        config.text_config.vocab_size = embedding[0]
    for name, size in _vision_sizes(shapes).items():
        setattr(config.vision_config, name, size)
    if config.model_type in PLACEHOLDERS:
        token, distance = PLACEHOLDERS[config.model_type]
        known = added_token_id(folder, token)
        config.image_token_id = config.text_config.vocab_size - distance if known is None else known
    return config


def _vision_sizes(shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    patches = next((shapes[name] for name in _PATCHES if len(shapes.get(name, ())) == 4), None)
    positions = next((shapes[name] for name in _POSITIONS if len(shapes.get(name, ())) >= 2), None)
    if patches is not None:
        sizes["hidden_size"], sizes["patch_size"] = patches[0], patches[-1]
        if positions is not None:
            # A square of patches, or one and a class token.
            sizes["image_size"] = int(positions[-2] ** 0.5) * patches[-1]
    for prefix in ("vision_tower.encoder.layers.", "vision_tower.layers."):
        layers = _num_layers(shapes, prefix)
        if layers is not None:
            sizes["num_hidden_layers"] = layers
            feed_forward = shapes.get(f"{prefix}0.mlp.fc1.weight")
            if feed_forward is not None:
                sizes["intermediate_size"] = feed_forward[0]
    return sizes


_PATCHES = (
    "vision_tower.embeddings.patch_embedding.weight",
    "vision_tower.embeddings.patch_embeddings.projection.weight",
)
_POSITIONS = (
    "vision_tower.embeddings.position_embedding.weight",
    "vision_tower.embeddings.position_embeddings",
)


def added_token_id(folder: Path, token: str) -> int | None:
    """The id of a token that was added to a vocabulary, from whichever file of the tokenizer has it."""
    added = folder / "added_tokens.json"
    if added.is_file() and token in (ids := read_json(added, "The list of added tokens")):
        return ids[token]
    config = folder / "tokenizer_config.json"
    if config.is_file():
        decoder = read_json(config, "The tokenizer's configuration").get("added_tokens_decoder") or {}
        for index, entry in decoder.items():
            if entry.get("content") == token:
                return int(index)
    whole = folder / "tokenizer.json"
    if whole.is_file():
        for entry in read_json(whole, "The tokenizer").get("added_tokens") or ():
            if entry.get("content") == token:
                return entry.get("id")
    return None


# ------------------------------------------------------------------------------------------------------------ loading


def completed_config(config: VisionResamplerConfig, sibling: OriginalSibling) -> VisionResamplerConfig:
    """The configuration of an original folder, corrected by its tensors if they are here."""
    if sibling.layout == ADAPTER:
        return config
    try:
        tensors = original_tensors(sibling)
    except FileNotFoundError:  # of a repository that isn't downloaded
        return config
    shapes = {name: tensor.shape for name, tensor in converted_tensors(sibling.model_type, tensors).items()}
    return with_stored_sizes(config, shapes, sibling.folder)


def problems_of(
    tensors: Mapping[str, torch.Tensor], model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> CheckpointProblems:
    """Compares tensors, by our names, with what the model needs."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in model_class(config).state_dict().items()}
    return CheckpointProblems(
        missing=[name for name in expected if name not in tensors],
        unexpected=[name for name in tensors if name not in expected],
        misshaped=[
            f"{name} is {tuple(tensor.shape)} instead of {tuple(expected[name])}"
            for name, tensor in tensors.items()
            if name in expected and tensor.shape != expected[name]
        ],
        mistyped=list(_mistyped(tensors, expected)),
    )


def check_tensors(
    tensors: Mapping[str, torch.Tensor], model_class: type[PreTrainedModel], config: PreTrainedConfig, source: Path
) -> None:
    """Raises [`OriginalCheckpointError`] unless the tensors, by our names, are what the model needs."""
    problems = problems_of(tensors, model_class, config)
    if problems:
        raise OriginalCheckpointError(
            f"{source} doesn't fit its configuration: {problems}. Check that all files are complete, and that the "
            "configuration is this checkpoint's."
        )


def _mistyped(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> Iterable[str]:
    for name, tensor in tensors.items():
        if name in expected and tensor.shape == expected[name] and tensor.dtype not in WEIGHT_DTYPES:
            yield f"{name} is of {str(tensor.dtype).removeprefix('torch.')}"
