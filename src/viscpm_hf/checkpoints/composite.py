"""Originals of a tower, a resampler and a stock language model by our names: tensors, shapes and sizes alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..families.family import FAMILIES
from .headers import TensorHeader
from .key_matching import KeyMatcher, shape_after
from .location import Original
from .original import WEIGHT_DTYPES, CheckpointProblems, dtype_of, num_layers


def converted(model_type: str, originals: Mapping[str, Any], apply: Callable[[str, Any], Any]) -> dict[str, Any]:
    """What belongs to original names -> the same by ours. Names that the map doesn't have are kept.

    Args:
        originals: tensors, or shapes.
        apply: an operation of the key maps, and what it is done to.
    """
    matcher = KeyMatcher(FAMILIES[model_type].key_maps[0])
    result: dict[str, Any] = {}
    for name, value in originals.items():
        if matcher.dropped_reason(name) is not None:
            continue
        matches, shape = matcher.match_all(name), getattr(value, "shape", value)
        for target, entry in matches:
            fits = math.prod(shape_after(entry.operation, shape)) * len(matches) == math.prod(shape)
            # What has a strange shape is kept as it is: the comparison with the model names it.
            result[target] = apply(entry.operation, value) if fits else value
        if not matches:
            result[name] = value
    return result


def converted_shapes(model_type: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes by original names -> by ours."""
    return converted(model_type, shapes, shape_after)


def converted_headers(model_type: str, headers: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """What files say of original tensors -> what they would say of ours."""

    def apply(operation: str, header: TensorHeader) -> TensorHeader:
        return TensorHeader(header.name, header.dtype, tuple(shape_after(operation, header.shape)))

    return converted(model_type, headers, apply)


def check_converted(tensors: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> CheckpointProblems:
    """Compares tensors, or headers, by our names with the names and shapes that a model has."""
    fitting = {name: tensor for name, tensor in tensors.items() if name in expected and tensor.shape == expected[name]}
    return CheckpointProblems(
        missing=[name for name in expected if name not in tensors],
        unexpected=[name for name in tensors if name not in expected],
        misshaped=[
            f"{name} is {tuple(tensor.shape)} instead of {tuple(expected[name])}"
            for name, tensor in tensors.items()
            if name in expected and name not in fitting
        ],
        mistyped=[
            f"{name} is of {dtype_of(tensor)}"
            for name, tensor in fitting.items()
            if dtype_of(tensor) not in WEIGHT_DTYPES
        ],
    )


def vision_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    patches = next((shapes[name] for name in _PATCHES if len(shapes.get(name, ())) == 4), None)
    positions = next((shapes[name] for name in _POSITIONS if len(shapes.get(name, ())) >= 2), None)
    if patches is not None:
        sizes["hidden_size"], sizes["patch_size"] = patches[0], patches[-1]
        if positions is not None:
            # A square of patches, or one and a class token.
            sizes["image_size"] = int(positions[-2] ** 0.5) * patches[-1]
    for prefix in ("vision_tower.encoder.layers.", "vision_tower.layers."):
        layers = num_layers(shapes, prefix)
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
