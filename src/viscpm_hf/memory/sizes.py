"""Bytes of a model's weights in every precision, counted tensor by tensor on models without data."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from transformers import PreTrainedConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from ..checkpoints.configurations import read_config
from ..checkpoints.errors import OriginalCheckpointError
from ..checkpoints.location import (
    HUB_ID,
    Location,
    json_object,
    locate,
    original_weight_files,
    release_file,
    repository_of,
    tensors_of,
)
from ..checkpoints.original import CHAT, CPM_BEE, DIFFUSION_CONFIG_NAME, PAINT, checkpoint_kind
from ..conversion.comparison import original_config
from ..conversion.paint import empty_part, empty_parts
from ..conversion.verify import empty_model
from ..families.diffusion_shapes import UNET_CONFIG, VAE_CONFIG
from ..families.family import FAMILIES, Family, family_of
from ..families.systems import title_of
from ..loading.quantization import kept_modules
from ..modeling.answering import AnsweringMixin
from ..modeling.configuration_cpm_bee import CpmBeeConfig
from ..modeling.configuration_viscpm_chat import VisCPMChatConfig
from ..modeling.configuration_viscpm_paint import VisCPMPaintTextEncoderConfig
from ..modeling.configuration_vision_resampler import (
    MiniCPMVConfig,
    OmniLMMConfig,
    VisionResamplerConfig,
    VisualCLAConfig,
)
from ..modeling.modeling_cpm_bee import CpmBeeForCausalLM
from ..modeling.modeling_viscpm_chat import VisCPMChatForConditionalGeneration
from ..modeling.modeling_viscpm_paint import VisCPMPaintTextEncoder
from ..modeling.modeling_vision_resampler import VisionResamplerForConditionalGeneration
from ..modeling.packed_linear import GROUP
from ..tiny.embedded import EMBEDDED_NAME, check_model_name, resolve_model


# What pruning left of the layers of cpm-bee-1b, -2b and -5b: both blocks, attention, feed-forward or nothing.
_PRUNED = "bfbf-f--bb-ff-b-baf-ba--b-b--b-b-b-f---b-b--b-bb"
_MASK_MODULES = [[block in "f-", block in "a-"] for block in _PRUNED]

# The released checkpoints, whose sizes are known without having them.
RELEASED: dict[str, Callable[[], PreTrainedConfig]] = {
    "openbmb/VisCPM-Chat": VisCPMChatConfig,
    "openbmb/VisCPM-Paint": VisCPMPaintTextEncoderConfig,
    "openbmb/cpm-bee-10b": CpmBeeConfig,
    "openbmb/cpm-bee-5b": partial(CpmBeeConfig, mask_modules=_MASK_MODULES),
    "openbmb/cpm-bee-2b": partial(CpmBeeConfig, intermediate_size=5120, head_dim=64, mask_modules=_MASK_MODULES),
    "openbmb/cpm-bee-1b": partial(CpmBeeConfig, intermediate_size=1024, head_dim=40, mask_modules=_MASK_MODULES),
    "openbmb/OmniLMM-12B": OmniLMMConfig,
    "openbmb/MiniCPM-V": partial(MiniCPMVConfig, resampler_config={"key_positions": "interpolated"}),
    "openbmb/MiniCPM-V-2": MiniCPMVConfig,
    "ziqingyang/visualcla-7b-v0.1": VisualCLAConfig,
}

# Of a 4-bit weight of bitsandbytes: values that share a scale, scales that share a scale of theirs.
BLOCK, NESTED_BLOCK = 64, 256
# Tables of the 16 values of 4-bit codes and the 256 ones of the scales' codes, and the scales' mean, all fp32.
TABLE_BYTES = 4 * (16 + 256 + 1)

PARTS = ("layers", "embedding", "vision tower", "resampler", "projection", "UNet", "VAE")


def quantized_bytes(rows: int, columns: int, quantization: str) -> int:
    """Bytes of a linear layer's weight: `"int8"` (a scale in fp32 for every row) and `"nf4"` (a scale for every 64
    values, quantised to 8 bits itself) as bitsandbytes keeps it, `"packed8"` (a scale in bf16 for every row) and
    `"packed4"` (scale and zero point in bf16 for every 64 values) as CPUs do."""
    count = rows * columns
    if quantization == "packed8":
        return count + 2 * rows
    if quantization == "packed4":
        return math.ceil(count / 2) + 4 * rows * math.ceil(columns / GROUP)
    if quantization == "int8":
        return count + 4 * rows
    blocks = math.ceil(count / BLOCK)
    return math.ceil(count / 2) + blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + TABLE_BYTES


@dataclass(frozen=True, eq=False)
class ModelSizes:
    """A checkpoint's models without their weights."""

    name: str
    kind: str
    """`"chat"`, `"paint"` or `"cpm_bee"`."""
    model: (
        VisCPMChatForConditionalGeneration
        | VisionResamplerForConditionalGeneration
        | VisCPMPaintTextEncoder
        | CpmBeeForCausalLM
    )
    """On the meta device; of Paint the text encoder."""
    unet: nn.Module | None = None
    vae: nn.Module | None = None

    @property
    def family(self) -> Family:
        return family_of(self.model.config)

    @property
    def title(self) -> str:
        """The system's name."""
        return title_of(self.model.config)

    @property
    def text_config(self) -> Any:
        return self.model.config.get_text_config(decoder=True)

    @property
    def reads_documents(self) -> bool:
        """Whether the language model is CPM-Bee."""
        return isinstance(self.text_config, CpmBeeConfig)

    @property
    def has_fast_decoding(self) -> bool:
        enable = getattr(type(self.model), "enable_fast_decoding", AnsweringMixin.enable_fast_decoding)
        return enable is not AnsweringMixin.enable_fast_decoding

    @cached_property
    def language_model(self) -> nn.Module:
        return self.model.get_submodule(self.family.language_model)

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Numbers of parameters by part."""
        found: Counter[str] = Counter()
        tied = set(getattr(self.model, "all_tied_weights_keys", ()))
        for name, tensor in self.model.state_dict().items():
            found[_part(name)] += tensor.numel() if name not in tied else 0
        for part, model in (("UNet", self.unet), ("VAE", self.vae)):
            found[part] = sum(parameter.numel() for parameter in model.parameters()) if model is not None else 0
        return {part: found[part] for part in PARTS if found[part]}

    def weights(
        self, dtype: torch.dtype, quantization: str | None = None, diffusion_dtype: torch.dtype | None = None
    ) -> dict[str, int]:
        """Bytes of the weights by part.

        Args:
            dtype: of what isn't quantised.
            quantization: a name of [`quantized_bytes`], with the modules kept that are kept by default.
            diffusion_dtype: of UNet and VAE, if it is another.
        """
        found: Counter[str] = Counter()
        for name, size in self._tensors(dtype, quantization):
            found[_part(name)] += size
        for part, model in (("UNet", self.unet), ("VAE", self.vae)):
            if model is not None:
                found[part] = sum(parameter.numel() for parameter in model.parameters())
                found[part] *= (diffusion_dtype or dtype).itemsize
        return {part: found[part] for part in PARTS if found[part]}

    def layers(self, dtype: torch.dtype, quantization: str | None = None) -> list[int]:
        """Bytes of every layer of the language model; 0 for one that pruning left nothing of."""
        found: Counter[int] = Counter()
        for name, size in self._tensors(dtype, quantization):
            if _part(name) == "layers":
                found[int(name.partition("layers.")[2].partition(".")[0])] += size
        return [found[index] for index in range(self.text_config.num_hidden_layers)]

    @cached_property
    def largest_linear(self) -> int:
        """The most values that a weight of the layers has."""
        return max(module.weight.numel() for module in self.linear_layers)

    @property
    def linear_layers(self) -> list[nn.Linear]:
        """Those of the layers."""
        return [module for module in self.language_model.layers.modules() if isinstance(module, nn.Linear)]

    def _tensors(self, dtype: torch.dtype, quantization: str | None):
        """Yields `(name, bytes)` of all tensors; a tied head is its embedding."""
        kept, tied = kept_modules(), set(getattr(self.model, "all_tied_weights_keys", ()))
        for module_name, module in self.model.named_modules():
            is_linear = isinstance(module, nn.Linear)
            is_quantized = quantization is not None and is_linear and should_convert_module(module_name, kept)
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                name = f"{module_name}.{name}"
                if name in tied:
                    continue
                if is_quantized and name.endswith(".weight"):
                    yield name, quantized_bytes(*tensor.shape, quantization)
                else:
                    yield name, tensor.numel() * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize


def _part(name: str) -> str:
    if "vision_tower." in name:
        return "vision tower"
    if name.startswith("resampler."):
        return "resampler"
    if "multi_modal_projector." in name or name.startswith("projection."):
        return "projection"
    return "layers" if ".layers." in f".{name}" else "embedding"


# --------------------------------------------------------------------------------------------------------- checkpoints


def model_sizes(source: str | os.PathLike, kind: str | None = None, **hub: Any) -> ModelSizes:
    """The sizes of a checkpoint, from its configuration and the shapes of its tensors.

    Args:
        source: a file, a folder, a Hub id that is in the cache, `"viscpm-tiny"`, or the id of a released checkpoint.
        kind: which of the two models `"viscpm-tiny"` is; Chat if None.
        hub: `revision` and `cache_dir` of the Hub.

    Raises:
        OriginalCheckpointError: if it is no checkpoint of VisCPM.
        OSError: if it isn't there.
        ValueError: for a kind that the checkpoint isn't.
    """
    name = os.fspath(source)
    path = _cached(name, hub) if not os.path.exists(name) else name
    if path is None:
        sizes = replace(_released(os.fspath(repository_of(name))), name=name)
    else:
        if name == EMBEDDED_NAME:
            path = resolve_model(name, kind or CHAT)
        location = locate(path, with_weights=False)
        is_said = location.is_converted or location.kind is not None
        sizes = _converted(name, location) if is_said else _original(name, location)
    if kind not in (None, sizes.kind):
        raise ValueError(f"{name} is {sizes.title}, not {FAMILIES[kind].title if kind in FAMILIES else kind}.")
    return sizes


def _cached(name: str, hub: Mapping[str, Any]) -> str | None:
    """The folder of a Hub id in the cache; None for a released one that isn't there; the name itself for the rest."""
    match = HUB_ID.fullmatch(name)
    if name == EMBEDDED_NAME or match is None or os.path.isdir(Path(name).parent):
        return name
    if match["file"] is None:
        check_model_name(name)
    try:
        folder = snapshot_download(match["id"], local_files_only=True, **hub)
        file = match["file"]
        if match["release"]:
            file = release_file(match["id"], json_object(Path(folder) / "config.json"), match["release"])
        return os.path.join(folder, file or "").rstrip(os.sep)
    except LocalEntryNotFoundError:
        if match["id"] in RELEASED:  # the alternatives of a repository are of one size
            kinds = [kind for kind, family in FAMILIES.items() if family.config_class is type(RELEASED[match["id"]]())]
            if match["release"] and match["release"] not in FAMILIES[kinds[0]].releases:
                raise OriginalCheckpointError(f"{match['id']} has no release {match['release']!r}.") from None
            return None
        raise FileNotFoundError(
            f"{name} is neither a path here nor in the Hub's cache. Download it, or give one of "
            f"{', '.join(RELEASED)} for the released sizes."
        ) from None


@lru_cache(maxsize=2)
def _released(name: str) -> ModelSizes:
    config = RELEASED[name]()
    if isinstance(config, VisCPMPaintTextEncoderConfig):
        return _paint(name, config, {}, {})
    return _chat(name, config)


def _chat(name: str, config: VisCPMChatConfig | VisionResamplerConfig | CpmBeeConfig) -> ModelSizes:
    kind = CPM_BEE if isinstance(config, CpmBeeConfig) else CHAT
    return ModelSizes(name, kind, empty_model(config).eval())


def _paint(name: str, config: VisCPMPaintTextEncoderConfig, unet: dict, vae: dict) -> ModelSizes:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    return ModelSizes(
        name,
        PAINT,
        empty_model(config).eval(),
        empty_part(UNet2DConditionModel, unet or UNET_CONFIG).eval(),
        empty_part(AutoencoderKL, vae or VAE_CONFIG).eval(),
    )


def _original(name: str, location: Location) -> ModelSizes:
    state_dict = tensors_of(original_weight_files(location))
    kind = checkpoint_kind(state_dict)
    if kind is None:
        raise ValueError(f"{name} is no checkpoint of VisCPM or CPM-Bee.")
    config, problems = original_config(location, kind, state_dict, None, None)
    if problems:
        raise ValueError(f"{name}: {'; '.join(problems)}")
    if kind != PAINT:
        return _chat(name, config)
    given = json_object(location.folder / DIFFUSION_CONFIG_NAME)
    unet, vae = (given.get(part) or json_object(location.folder / part / "config.json") for part in ("unet", "vae"))
    return _paint(name, config, unet, vae)


def _converted(name: str, location: Location) -> ModelSizes:
    if location.kind != PAINT:
        return _chat(name, read_config(location.path))
    parts = empty_parts(location.path)
    return ModelSizes(name, PAINT, *(parts[part].eval() for part in ("text_encoder", "unet", "vae")))
