"""Does a checkpoint hold what its configuration says? Asked of names and shapes.

A checkpoint that is as it should be is told by the sizes alone (`families.model_shapes`), in a fraction of the time
that torch and transformers take to be imported. Whatever is out of the ordinary is compared with the models
themselves, made without weights, which know every configuration, and in which order their tensors are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..checkpoints.composite import (
    added_token_id,
    check_converted,
    converted_headers,
    converted_shapes,
    vision_sizes,
)
from ..checkpoints.errors import ConversionError
from ..checkpoints.headers import TensorHeader
from ..checkpoints.json_files import load_json
from ..checkpoints.location import (
    Location,
    Original,
    diffusers_config,
    llm_config_file,
    original_unet_config,
    vision_config_file,
)
from ..checkpoints.original import (
    CHAT,
    PAINT,
    chat_config,
    chat_sizes,
    check_state_dict,
    key_map_of,
    paint_parts,
    read_json,
    text_config,
    text_encoder_config,
    text_encoder_sizes,
    text_sizes,
)
from ..families import key_maps
from ..families.diffusion_shapes import unet_shapes, vae_shapes
from ..families.family import COMPOSITE_FORM
from ..families.known_sizes import known_sizes, usual_values
from ..families.model_shapes import Shapes, model_shapes
from ..modeling.configuration_limits import check_layers
from ..modeling.original_vision_resampler import IN_OUR_WORDS


TEXT_ENCODER = "text_encoder"
DIFFUSION_SHAPES = {"unet": unet_shapes, "vae": vae_shapes}

Headers = Mapping[str, TensorHeader]


@dataclass(frozen=True)
class Compared:
    """What a comparison found."""

    config: Any
    """The configuration, or its values alone; None if it makes no sense."""
    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


# -------------------------------------------------------------------------------------------- VisCPM's original files


def original_config(
    location: Location, kind: str, tensors: Mapping[str, Any], llm_config, vision_config
) -> tuple[Any, list[str]]:
    """The configuration, or what is wrong with it."""
    try:
        llm, vision = _original_configs(location, kind, llm_config, vision_config)
        if kind == CHAT:
            return chat_config(llm, vision, _shapes(tensors)), []
        return (text_encoder_config if kind == PAINT else text_config)(llm, _shapes(tensors)), []
    except (ValueError, TypeError) as error:
        return None, [" ".join(str(error).split())]


def _original_configs(location: Location, kind: str, llm_config, vision_config) -> tuple[dict, dict]:
    llm_file, vision_file = llm_config_file(location, llm_config), vision_config_file(location, vision_config)
    llm = read_json(llm_file, "The configuration") if llm_file is not None else {}
    has_vision = kind == CHAT and vision_file is not None
    return llm, read_json(vision_file, "The vision configuration") if has_vision else {}


def _shapes(tensors: Mapping[str, Any]) -> Shapes:
    return {name: tensor.shape for name, tensor in tensors.items()}


def compare_original(location: Location, kind: str, headers: Headers, llm_config, vision_config) -> Compared:
    """An original file, of VisCPM or CPM-Bee, and its configuration."""
    sizes = _known_original(location, kind, headers, llm_config, vision_config)
    if sizes is not None and _is_as_known(location, kind, headers, sizes):
        return Compared(sizes)
    from .verify import original_problems

    config, problems = original_config(location, kind, headers, llm_config, vision_config)
    if config is None:
        return Compared(None, problems=problems)
    if kind == PAINT:
        from .paint import check_original_paint

        found = check_original_paint(location, config, headers)
    else:
        found = original_problems(kind, headers, config)
    return Compared(config, found.missing, found.unexpected, problems + found.misshaped + found.mistyped)


def _known_original(
    location: Location, kind: str, headers: Headers, llm_config, vision_config
) -> SimpleNamespace | None:
    shapes = _shapes(headers)
    try:
        llm, vision = _original_configs(location, kind, llm_config, vision_config)
        if kind == CHAT:
            text, tower = chat_sizes(llm, vision, shapes)
            return known_sizes(kind, {"text_config": text, "vision_config": tower})
        return known_sizes(kind, (text_encoder_sizes if kind == PAINT else text_sizes)(llm, shapes))
    except (ValueError, TypeError):
        return None


def _is_as_known(location: Location, kind: str, headers: Headers, sizes: SimpleNamespace) -> bool:
    expected = model_shapes(kind, sizes)
    if kind != PAINT:
        return not check_state_dict(headers, key_map_of(kind, headers), expected)
    unet = unet_shapes(original_unet_config(location))
    of_encoder, of_unet = paint_parts(headers)
    return (
        unet is not None
        and not check_state_dict(of_encoder, key_maps.PAINT_TEXT_ENCODER, expected)
        and not check_state_dict(of_unet, key_maps.PAINT_UNET, unet)
    )


# ------------------------------------------------------------------------------------------------ siblings' originals


def config_of(original: Original) -> Any:
    """The configuration, or its values alone, of an original whose weights aren't looked at.

    Raises:
        ValueError: if it makes no sense.
    """
    sizes = _known_named(original, {})
    if sizes is not None:
        return sizes
    from ..checkpoints.readers import reader_of

    return reader_of(original.kind).config(original)


def compare_named(original: Original, headers: Headers) -> Compared:
    """An original whose configuration says of which system it is; there may be no headers."""
    converted = converted_headers(original.kind, headers)
    sizes = _known_named(original, headers)
    if sizes is not None and not (headers and check_converted(converted, model_shapes(original.kind, sizes))):
        return Compared(sizes)
    from ..checkpoints.readers import problems_of, reader_of

    try:
        config = reader_of(original.kind).config(original, shapes=_shapes(headers) or None)
    except ValueError as error:
        return Compared(None, problems=[" ".join(str(error).split())])
    if not headers:
        return Compared(config)
    found = problems_of(converted, original.family.model_class, config)
    return Compared(config, found.missing, found.unexpected, [*found.misshaped, *found.mistyped])


def _known_named(original: Original, headers: Headers) -> SimpleNamespace | None:
    kind, config = original.kind, dict(original.config)
    if kind not in IN_OUR_WORDS or original.family.form != COMPOSITE_FORM:
        return None
    try:
        check_layers(config)
        ours = config if "resampler_config" in config else IN_OUR_WORDS[kind](config)
        if usual_values(kind, ours) is None:  # what the tensors know better is looked at, too
            return None
        if headers:
            shapes = converted_shapes(kind, _shapes(headers))
            embedding = shapes.get("language_model.model.embed_tokens.weight")
            if embedding is not None:
                ours["text_config"] = {**ours["text_config"], "vocab_size": embedding[0]}
            ours["vision_config"] = {**ours["vision_config"], **vision_sizes(shapes)}
            if original.family.placeholder is not None:
                added_token_id(original, original.family.placeholder[0])  # which may be unreadable
        return known_sizes(kind, ours)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
        return None


# --------------------------------------------------------------------------------------------------- converted folders


def compare_folder(folder: Path, kind: str, stored: Mapping[str, Headers] | None) -> Compared:
    """A converted folder.

    Args:
        stored: headers of the weights by the folders of their models, `""` being the folder itself; None for no
            comparison.

    Raises:
        ConversionError, OSError: if a configuration can't be read, or makes no sense.
    """
    part = TEXT_ENCODER if kind == PAINT else ""
    sizes = _known_folder(folder / part, kind)
    if sizes is not None and (stored is None or _is_folder_as_known(folder, kind, sizes, stored)):
        return Compared(sizes)
    from ..checkpoints.configurations import read_config

    config = read_config(folder / part)
    if stored is None:
        return Compared(config)
    try:
        if kind == PAINT:
            from .paint import check_paint_folder

            check_paint_folder(folder)
        else:
            from .verify import check_transformers_folder

            check_transformers_folder(folder)
    except (ConversionError, OSError) as error:
        return Compared(config, problems=[str(error)])
    return Compared(config)


def _known_folder(folder: Path, kind: str) -> SimpleNamespace | None:
    try:
        config = load_json(folder / "config.json")
    except (ValueError, OSError):
        return None
    return known_sizes(kind, config) if isinstance(config, dict) else None


def _is_folder_as_known(folder: Path, kind: str, sizes: SimpleNamespace, stored: Mapping[str, Headers]) -> bool:
    expected: dict[str, Shapes | None] = {TEXT_ENCODER if kind == PAINT else "": model_shapes(kind, sizes)}
    if kind == PAINT:
        if not (folder / "model_index.json").is_file():
            return False
        for part, shapes_of in DIFFUSION_SHAPES.items():
            config = diffusers_config(folder / part)
            expected[part] = None if config is None else shapes_of(config)
    num_words = getattr(getattr(sizes, "text_config", sizes), "num_words", None)
    return all(
        shapes is not None and shapes == _with_all_rows(stored[part], shapes, num_words)
        for part, shapes in expected.items()
    )


def _with_all_rows(headers: Headers, expected: Shapes, num_words: int | None) -> Shapes:
    """Shapes that are stored; folders of version 0.1 have the rows of words alone, the others are made on loading."""
    shapes = {name: header.shape for name, header in headers.items()}
    for name, shape in expected.items():
        if name.endswith("embed_tokens.weight") and shapes.get(name) == (num_words, *shape[1:]):
            shapes[name] = shape
    return shapes


def shapes_before(folder: Path, kind: str, found: Iterable[str]) -> Shapes:
    """Names of a quantised model's weights and the shapes that they had before; of Paint those of its text encoder.

    Args:
        found: names that are stored; if some are missing, the model itself says in which order.
    """
    part = TEXT_ENCODER if kind == PAINT else ""
    sizes = _known_folder(folder / part, kind)
    if sizes is not None and (shapes := model_shapes(kind, sizes)).keys() <= set(found):
        return shapes
    from ..checkpoints.configurations import read_config
    from .verify import empty_model, stored_shapes

    return stored_shapes(empty_model(read_config(folder / part)))
