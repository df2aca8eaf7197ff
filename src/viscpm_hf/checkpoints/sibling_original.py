"""Original folders of the siblings: what they are, their tensors by our names, and whether all are there.

OmniLMM and MiniCPM-V are one file or several shards. VisualCLA comes in two forms: `merged`, with its language model
and its vision tower in folders of their own, or the `adapter` of the release, which needs both bases
(`siblings.adapter`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..families.family import FAMILIES
from ..modeling.configuration_vision_resampler import VisionResamplerConfig
from .errors import OriginalCheckpointError
from .location import MERGED, TEXT_FOLDER, VISION_FOLDER, Original, download_repository, tensors_of, weight_paths
from .original import WEIGHT_DTYPES, CheckpointProblems, _num_layers
from .weight_transforms import KeyMatcher, apply_operation, shape_after


# Names of the whole model begin with these; those of its parts' own files don't.
TEXT_PREFIX, VISION_PREFIX = "text_model.", "vision_model."


# ------------------------------------------------------------------------------------------------------------ tensors


def folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's `model` or `pytorch_model` files, mapped: none is read before it is used.

    Raises:
        ValueError: for damaged files, or ones that hold more than tensors.
        OSError: if there are none.
    """
    return tensors_of(weight_paths(folder))


def text_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """A language model's folder, by the names of the whole VisualCLA."""
    return {TEXT_PREFIX + name: tensor for name, tensor in folder_tensors(folder).items()}


def vision_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """A vision tower's folder, or a whole CLIP's, by the names of the whole VisualCLA."""
    tensors = folder_tensors(folder)
    if any(name.startswith(VISION_PREFIX) for name in tensors):
        return {VISION_PREFIX + name: tensor for name, tensor in tensors.items() if name.startswith(VISION_PREFIX)}
    return {2 * VISION_PREFIX + name: tensor for name, tensor in tensors.items()}


def original_tensors(original: Original) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint that is whole or merged, by their original names, mapped."""
    if original.layout != MERGED:
        return original.tensors
    folder = download_repository(original.name, original.hub)
    for name in (TEXT_FOLDER, VISION_FOLDER):
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder} lacks {name}/, one of the parts of a merged VisualCLA.")
    return {**text_tensors(folder / TEXT_FOLDER), **vision_tensors(folder / VISION_FOLDER), **original.tensors}


def converted_tensors(model_type: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Original tensors -> ours; nearly all are views of them. Names that the map doesn't have are kept."""
    matcher = KeyMatcher(FAMILIES[model_type].key_maps[0])
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


def converted_shapes(model_type: str, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Shapes by original names -> by ours."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {name: tensor.shape for name, tensor in converted_tensors(model_type, empty).items()}


# ------------------------------------------------------------------------------------------------------------- sizes


def with_stored_sizes(
    config: VisionResamplerConfig, shapes: Mapping[str, torch.Size], original: Original
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
    placeholder = FAMILIES[config.model_type].placeholder
    if placeholder is not None:
        token, distance = placeholder
        known = added_token_id(original, token)
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


def added_token_id(original: Original, token: str) -> int | None:
    """The id of a token that was added to a vocabulary, from whichever file of the tokenizer has it."""
    if token in (ids := original.json("added_tokens.json")):
        return ids[token]
    for index, entry in (original.json("tokenizer_config.json").get("added_tokens_decoder") or {}).items():
        if entry.get("content") == token:
            return int(index)
    for entry in original.json("tokenizer.json").get("added_tokens") or ():
        if entry.get("content") == token:
            return entry.get("id")
    return None


# ------------------------------------------------------------------------------------------------------------ loading


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
