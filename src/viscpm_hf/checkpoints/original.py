"""Reading the original's files: what kind of checkpoint, with which sizes, and are all tensors there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..families import key_maps
from ..families.family import CHAT, CPM_BEE, PAINT
from ..plain_text import plain
from .archive import Record, RefusedError, StoredTensor, UnreadableError, check_tensors, read_archive
from .errors import OriginalCheckpointError
from .headers import LFS_ADVICE, TensorHeader, is_lfs_pointer
from .json_files import load_json
from .key_matching import KeyMatcher, shape_after


if TYPE_CHECKING:
    import torch

    from ..modeling.configuration_cpm_bee import CpmBeeConfig
    from ..modeling.configuration_viscpm_chat import VisCPMChatConfig
    from ..modeling.configuration_viscpm_paint import VisCPMPaintTextEncoderConfig


ORIGINAL_SUFFIXES = (".pt", ".bin", ".pth")
ORIGINAL_WEIGHTS_NAME = "pytorch_model.bin"
# The Hub's name first, then the GitHub repository's.
ORIGINAL_CONFIG_NAMES = ("config.json", "cpm-bee.json", "cpm-bee-10b.json")
VISION_CONFIG_NAME = "vision.json"
VOCAB_NAME = "vocab.txt"
# Configurations of UNet, VAE and scheduler in one file, for checkpoints of other sizes than the released ones.
DIFFUSION_CONFIG_NAME = "diffusion.json"
# Paint's VAE as a file beside the weights: one of its parts, no alternative to them.
VAE_NAMES = ("vae.bin", "vae.pt")

# Names that only the original's language model configuration has, in the GitHub and in the Hub spelling.
LLM_SIZE_KEYS = ("dim_model", "dim_ff", "dim_head", "position_bias_num_buckets")
LLM_SPELLINGS = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("dim_model", "hidden_size"),
    "intermediate_size": ("dim_ff", "intermediate_size"),
    "num_hidden_layers": ("num_layers", "num_hidden_layers"),
    "num_attention_heads": ("num_heads", "num_attention_heads"),
    "head_dim": ("dim_head", "head_dim"),
    "rms_norm_eps": ("eps", "rms_norm_eps"),
    "position_bias_num_buckets": ("position_bias_num_buckets",),
    "position_bias_num_segment_buckets": ("position_bias_num_segment_buckets",),
    "position_bias_max_distance": ("position_bias_max_distance",),
    "mask_modules": ("mask_modules",),
}
VISION_SPELLINGS = {
    "hidden_size": ("vision_dim",),
    "num_attention_heads": ("vision_heads",),
    "intermediate_size": ("vision_ffn", "vision_ffn_dim"),
    "num_hidden_layers": ("vision_layers",),
    "image_size": ("image_size", "img_size"),
    "patch_size": ("patch_size",),
    "num_query_tokens": ("query_num",),
}
VISION_HEAD_DIM = 64
# Of CPM-Bee alone or within VisCPM, as its authors or the Hub's own class saved it. Of a pruned one any block may be
# missing, the first layer's too.
LLM_PREFIX = re.compile(r"(llm\.|cpmbee\.)?")
LLM_LAYER = re.compile(LLM_PREFIX.pattern + r"encoder\.layers\.\d+\.(self_att\.self_attention|ffn\.ffn)\.")

# What a weight may be stored in; anything else is a quantised checkpoint, or none.
WEIGHT_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class CheckpointProblems:
    """What is wrong with the tensors of a checkpoint."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    mistyped: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshaped or self.mistyped)

    def __add__(self, other: CheckpointProblems) -> CheckpointProblems:
        return CheckpointProblems(*(own + vars(other)[name] for name, own in vars(self).items()))

    def __str__(self) -> str:
        def sample(names: list[str]) -> str:
            return ", ".join(map(plain, names[:3])) + (", ..." if len(names) > 3 else "")

        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} tensors missing ({sample(self.missing)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} unknown tensors ({sample(self.unexpected)})")
        if self.misshaped:
            parts.append(f"{len(self.misshaped)} tensors of another shape ({sample(self.misshaped)})")
        if self.mistyped:
            parts.append(f"{len(self.mistyped)} tensors of no floating point type ({sample(self.mistyped)})")
        return "; ".join(parts)


# ------------------------------------------------------------------------------------------------------- state dicts


def load_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Maps an original file into memory; no tensor is read before it is used, and no code of the file ever runs.

    Raises:
        OriginalCheckpointError: if it isn't a flat dict of tensors, is damaged, or asks for code to be run.
        OSError: if it can't be opened.
    """
    from .tensor_files import map_tensors

    path = Path(path)
    return map_tensors(path, *_described(path))


def state_dict_header(path: str | os.PathLike) -> dict[str, TensorHeader]:
    """Names, dtypes and shapes of an original file, which is looked at as [`load_state_dict`] does.

    Raises:
        OriginalCheckpointError, OSError: as [`load_state_dict`].
    """
    tensors, _ = _described(Path(path))
    return {name: TensorHeader(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _described(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Record]]:
    try:
        content, records = read_archive(path)
    except RefusedError as error:
        raise OriginalCheckpointError(
            f"{path} was refused: it holds more than tensors, and loading it could run code of its own ({error}). Get "
            "the checkpoint from its source again."
        ) from error
    except UnreadableError as error:
        hint = LFS_ADVICE if is_lfs_pointer(path) else ""
        raise OriginalCheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is no readable PyTorch file: it is damaged, cut short, or of "
            f"another format ({error}).{hint}"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise OriginalCheckpointError(f"{path} holds a {type(content).__name__}, not a dict of tensors.")
    strange = [
        name for name, value in content.items() if not (isinstance(name, str) and isinstance(value, StoredTensor))
    ]
    if strange:
        raise OriginalCheckpointError(
            f"{path} is no flat dict of tensors: {len(strange):,} of {len(content):,} entries are none "
            f"({', '.join(map(plain, strange[:3]))})."
        )
    check_tensors(path, content, records)
    return content, records


def checkpoint_kind(names: Mapping[str, Any]) -> str | None:
    """What the names of a state dict are: `"chat"`, `"paint"`, `"cpm_bee"`, or None for none of ours."""
    if any(name.startswith(("unet.", "trans_block.")) for name in names):
        return PAINT
    if any(name.startswith(("vpm.", "mapping.")) for name in names):
        return CHAT
    if any(LLM_LAYER.match(name) for name in names):
        return CPM_BEE
    return None


def key_map_of(kind: str, names: Mapping[str, Any]) -> key_maps.KeyMap:
    if kind == CHAT:
        return key_maps.CHAT
    if kind == PAINT:
        return key_maps.PAINT_TEXT_ENCODER
    if any(name.startswith("cpmbee.") for name in names):
        return key_maps.CPM_BEE_SAVED
    return key_maps.CPM_BEE_WITHIN if any(name.startswith("llm.") for name in names) else key_maps.CPM_BEE


def paint_parts(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of VisCPM-Paint's original file is its text encoder's, and what the UNet's."""
    of_unet = {name: tensor for name, tensor in tensors.items() if name.startswith("unet.")}
    return {name: tensor for name, tensor in tensors.items() if name not in of_unet}, of_unet


def dtype_of(tensor: torch.Tensor | TensorHeader) -> str:
    """`"float16"` and so on."""
    return str(tensor.dtype).removeprefix("torch.")


def check_state_dict(
    state_dict: Mapping[str, torch.Tensor | TensorHeader],
    key_map: key_maps.KeyMap,
    expected: Mapping[str, tuple[int, ...]],
) -> CheckpointProblems:
    """Compares an original state dict with the model's own names and shapes.

    Args:
        state_dict: original names and tensors, or what is known of them.
        key_map: its map.
        expected: our names and shapes, tied copies left out.
    """
    matcher = KeyMatcher(key_map)
    unexpected, misshaped, mistyped, found = [], [], [], set()
    for name, tensor in state_dict.items():
        match = matcher.match(name)
        if match is None:
            if matcher.dropped_reason(name) is None:
                unexpected.append(name)
            continue
        target, entry = match
        if target not in expected or target in found:
            unexpected.append(name)
            continue
        found.add(target)
        if shape_after(entry.operation, tensor.shape) != expected[target]:
            misshaped.append(f"{name} is {tuple(tensor.shape)} instead of {tuple(expected[target])}")
        elif (dtype := dtype_of(tensor)) not in WEIGHT_DTYPES:
            mistyped.append(f"{name} is of {dtype}")
    return CheckpointProblems([name for name in expected if name not in found], unexpected, misshaped, mistyped)


# ----------------------------------------------------------------------------------------------------- configurations


def read_json(path: str | os.PathLike, what: str) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        OriginalCheckpointError: if the file holds none.
    """
    try:
        content = load_json(path)
    except ValueError as error:
        raise OriginalCheckpointError(f"{what} {path} is no JSON file: {error}.") from error
    if not isinstance(content, dict):
        raise OriginalCheckpointError(f"{what} {path} holds a {type(content).__name__}, not an object.")
    return content


def _rows_and_columns(shapes: Mapping[str, tuple[int, ...]], name: str, ndim: int = 2) -> tuple[int, ...] | None:
    """Shape of a tensor that sizes are read off; None if it isn't there.

    Raises:
        OriginalCheckpointError: if it has not `ndim` dimensions.
    """
    shape = shapes.get(name)
    if shape is not None and len(shape) != ndim:
        raise OriginalCheckpointError(
            f"The checkpoint's tensor {name} has the shape {tuple(shape)}, but should have {ndim} dimensions: the "
            "file is damaged, or of another model."
        )
    return shape


def num_layers(names: Iterable[str], prefix: str) -> int | None:
    """Layers of a tower, by the numbers in its names; None if there are none."""
    numbers = [match[1] for name in names if (match := re.match(re.escape(prefix) + r"(\d{1,6})\.", name))]
    return max(map(int, numbers)) + 1 if numbers else None


def _in_any_layer(names: Iterable[str], name: str) -> str:
    """The full name of a layer's tensor in a layer that has it; that of the first one if none does."""
    return next(
        (full for full in names if re.fullmatch(rf"encoder\.layers\.\d+\.{re.escape(name)}", full)),
        f"encoder.layers.0.{name}",
    )


def _configured(config_class: type, **sizes: Any) -> Any:
    """`config_class(**sizes)`.

    Raises:
        OriginalCheckpointError: for sizes that are none, such as a text.
    """
    try:
        return config_class(**sizes)
    except ValueError:
        raise
    except Exception as error:  # noqa: BLE001, of a wrong type may be anything
        raise OriginalCheckpointError(f"The configuration makes no sense: {plain(error, 500)}") from error


def _pick(source: Mapping[str, Any], spellings: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    return {
        name: source[spelling]
        for name, variants in spellings.items()
        for spelling in reversed(variants)
        if source.get(spelling) is not None
    }


def text_sizes(original: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Any]:
    """What the files say of CPM-Bee's sizes: an original configuration, and the tensors what it lacks."""
    sizes = _pick(original, LLM_SPELLINGS)
    if shapes is not None:
        shapes = {LLM_PREFIX.sub("", name, count=1): shape for name, shape in shapes.items()}
        sizes = _text_sizes(shapes, sizes) | sizes
    return sizes


def text_config(original: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None) -> CpmBeeConfig:
    """CPM-Bee's configuration from an original one; what it lacks comes from the tensors, then from the 10B model."""
    from ..modeling.configuration_cpm_bee import CpmBeeConfig

    return _configured(CpmBeeConfig, **text_sizes(original, shapes))


def text_encoder_config(
    original: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> VisCPMPaintTextEncoderConfig:
    """The configuration of VisCPM-Paint's text encoder from an original one."""
    from ..modeling.configuration_viscpm_paint import VisCPMPaintTextEncoderConfig

    return _configured(VisCPMPaintTextEncoderConfig, **text_encoder_sizes(original, shapes))


def text_encoder_sizes(
    original: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Any]:
    """What the files say of the sizes of VisCPM-Paint's text encoder, its projection's among them."""
    sizes = _pick(original, {"projection_dim": ("unet_cross_attention_dim",)})
    projection = _rows_and_columns(shapes or {}, "trans_block.w_out_res.weight")
    if projection is not None:
        sizes = {"projection_dim": projection[0]} | sizes
    return text_sizes(original, _of_language_model(shapes)) | sizes


def _of_language_model(shapes: Mapping[str, tuple[int, ...]] | None) -> dict[str, tuple[int, ...]] | None:
    return shapes and {name: shape for name, shape in shapes.items() if name.startswith("llm.")}


def _text_sizes(shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, Any]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    embedding = _rows_and_columns(shapes, "input_embedding.weight")
    if embedding is not None:
        sizes["vocab_size"], sizes["hidden_size"] = embedding
    gate = _rows_and_columns(shapes, _in_any_layer(shapes, "ffn.ffn.w_in.w_0.weight"))
    if gate is not None:
        sizes["intermediate_size"] = gate[0]
    layers = num_layers(shapes, "encoder.layers.")
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    bias = _rows_and_columns(shapes, "position_bias.relative_attention_bias")
    if bias is not None:
        buckets, sizes["num_attention_heads"] = bias
        segment_buckets = known.get("position_bias_num_segment_buckets", 256)  # as CpmBeeConfig has it
        sizes["position_bias_num_segment_buckets"] = segment_buckets
        sizes["position_bias_num_buckets"] = buckets - segment_buckets
        query = _rows_and_columns(shapes, _in_any_layer(shapes, "self_att.self_attention.project_q.weight"))
        if query is not None and sizes["num_attention_heads"]:
            sizes["head_dim"] = query[0] // sizes["num_attention_heads"]
    return sizes


def chat_sizes(
    original: Mapping[str, Any],
    vision: Mapping[str, Any] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the files say of VisCPM-Chat's language model and vision tower (whose keys may be in either)."""
    sizes = _pick({**original, **(vision or {})}, VISION_SPELLINGS)
    if shapes is not None:
        sizes = _vision_sizes(shapes) | sizes
    if isinstance(sizes.get("hidden_size"), int) and "num_attention_heads" not in sizes:
        sizes["num_attention_heads"] = max(1, sizes["hidden_size"] // VISION_HEAD_DIM)
    return text_sizes(original, _of_language_model(shapes)), sizes


def chat_config(
    original: Mapping[str, Any],
    vision: Mapping[str, Any] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> VisCPMChatConfig:
    """VisCPM-Chat's configuration from the original ones."""
    from ..modeling.configuration_cpm_bee import CpmBeeConfig
    from ..modeling.configuration_viscpm_chat import VisCPMChatConfig

    text, tower = chat_sizes(original, vision, shapes)
    text_config = _configured(CpmBeeConfig, **text).to_dict()
    return _configured(VisCPMChatConfig, text_config=text_config, vision_config=tower)


def _vision_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    queries = _rows_and_columns(shapes, "query")
    if queries is not None:
        sizes["num_query_tokens"], sizes["hidden_size"] = queries
    patches = _rows_and_columns(shapes, "vpm.beit3.vision_embed.proj.weight", ndim=4)
    positions = _rows_and_columns(shapes, "vpm.beit3.encoder.embed_positions.A.weight")
    if patches is not None:
        sizes["num_channels"], sizes["patch_size"] = patches[1], patches[-1]
        if positions is not None:
            # Two unused rows and the class token, then a square of patches.
            sizes["image_size"] = round(max(1, positions[0] - 3) ** 0.5) * sizes["patch_size"]
    query_positions = _rows_and_columns(shapes, "vpm.beit3.encoder.embed_positions.B.weight")
    if query_positions is not None:
        sizes["max_query_positions"] = query_positions[0]
    feed_forward = _rows_and_columns(shapes, "vpm.beit3.encoder.layers.0.ffn.A.fc1.weight")
    if feed_forward is not None:
        sizes["intermediate_size"] = feed_forward[0]
    layers = num_layers(shapes, "vpm.beit3.encoder.layers.")
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    return sizes
