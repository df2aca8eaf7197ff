"""Weights in 8 and 4 bits: the names, what transformers and diffusers make of them, and loading.

bitsandbytes' formats run everywhere, torchao's weight-only ones are those that compile on a GPU, and the packed ones
(`modeling/packed_linear.py`) are CPUs'. Quantised are the language model's layers. The mapping from the vision tower,
the projection to the UNet, norms and query tokens always keep their precision; vision tower and UNet keep theirs
unless asked for, and so do embedding and head, which the packed formats can have in 8 bits.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from ..checkpoints.key_matching import KeyMatcher
from ..checkpoints.original import CPM_BEE, checkpoint_kind, key_map_of
from ..checkpoints.stored_quantization import describe_quantization
from ..checkpoints.weight_transforms import apply_operation, factor_of
from ..families.key_maps import TOKEN_ROWS, Entry
from ..modeling.configuration_cpm_bee import CpmBeeConfig
from ..modeling.generation_cpm_bee import CpmBeeGenerationMixin
from ..modeling.packed_linear import (
    HAS_4_BIT_KERNEL,
    Int8Embedding,
    PackedConfig,
    PackedLinear,
    modules_to_pack,
    pack_modules,
)
from ..modeling.row_products import use_row_products
from ..modeling.token_space_cpm_bee import slot_rows
from ..modeling.weight_packing import BLOCK, GROUP, quantize_into
from ..names import QUANTIZATIONS
from .file_order import empty_like, quantize_in_file_order


if TYPE_CHECKING:
    from transformers.utils.quantization_config import QuantizationConfigMixin


# Modules that keep their precision, within models with a head and without.
KEPT_MODULES = ("lm_head", "multi_modal_projector", "model.multi_modal_projector", "projection", "resampler")
VISION_MODULES = ("vision_tower", "model.vision_tower")

# Of a layer that bitsandbytes' 4-bit kernels take: blocks of a row, and rows at a time.
BNB_4BIT_COLUMNS, BNB_4BIT_ROWS = 64, 32
INT4_GROUP_SIZE = 128
CASTING_LOGGER = "bitsandbytes.autograd._functions"
# Embedding and head, which are packed in 8 bits whatever the layers are.
ENDS = ("embed_tokens", "lm_head")
# What on a CPU means packed weights of so many bits; other names say whose format it is.
PACKED = {"8bit": 8, "4bit": 4, "int4wo": 4}

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------- configurations


def check_quantization(name: str, device: torch.device) -> None:
    """Checks what can be known before anything is loaded.

    Raises:
        ValueError: for an unknown name, or one that doesn't run on the device.
        ImportError: if its library is missing.
    """
    if name not in QUANTIZATIONS:
        raise ValueError(f"quantization is one of {', '.join(QUANTIZATIONS)}, got {name!r}.")
    library = QUANTIZATIONS[name]
    if packed_bits(name, device) is not None:
        return
    if importlib.util.find_spec(library) is None:
        raise ImportError(f"quantization={name!r} needs {library}: pip install {library}")
    if name == "int4wo" and device.type != "cuda":
        raise ValueError(
            f"quantization='int4wo' runs on CUDA and on CPUs with AVX-512, not on this {device.type}: use nf4."
        )


def packed_bits(name: str, device: torch.device) -> int | None:
    """Bits of the packed weights that a name means on the device; None where it means its library's format."""
    bits = PACKED.get(name) if device.type == "cpu" else None
    return None if bits == 4 and not HAS_4_BIT_KERNEL else bits


def computing_dtype(name: str | None, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """What the layers of a checkpoint stored in `stored` compute in.

    torchao's int4 knows bf16 alone. Its int8 multiplies before it scales: in fp16, outputs above some thirty become
    infinite.
    """
    is_torchao = QUANTIZATIONS.get(name) == "torchao" and packed_bits(name, device) is None
    return torch.bfloat16 if is_torchao and (name == "int4wo" or stored == torch.float16) else stored


def check_unet_quantization(name: str | None, device: torch.device) -> None:
    """Raises `ValueError` if the UNet can't be quantised that way."""
    if QUANTIZATIONS.get(name) == "bitsandbytes" and device.type == "cpu":
        raise ValueError(
            f"diffusers quantises the UNet with bitsandbytes ({name}) on GPUs only: use int8wo on a CPU, or leave "
            "quantize_unet out."
        )


def quantization_config(
    name: str,
    dtype: torch.dtype,
    *,
    quantize_vision: bool = False,
    quantize_embedding: bool = False,
    device: torch.device | None = None,
) -> QuantizationConfigMixin:
    """What transformers' `from_pretrained` takes as `quantization_config`.

    Args:
        name: one of `QUANTIZATIONS`.
        dtype: that products are computed in.
        quantize_vision: also the vision tower.
        quantize_embedding: also embedding and head, to 8 bits.
        device: where the model is to run; CUDA if there is one, else the CPU.

    Raises:
        ValueError: if embedding and head can't be quantised that way, or the format doesn't know the dtype.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kept, bits = kept_modules(quantize_vision), packed_bits(name, device)
    if bits is not None:
        logger.info(f"quantization={name!r} on a {device.type}: {bits}-bit weights packed for torch's own kernels")
        return PackedConfig(bits, modules_to_not_convert=kept, quantize_embedding=quantize_embedding)
    if quantize_embedding:
        raise ValueError(
            f"Embedding and head keep their precision with quantization={name!r} on {device.type}: only 8bit and 4bit "
            "on a CPU quantise them."
        )
    if isinstance(dtype, torch.dtype) and computing_dtype(name, device, dtype) != dtype:
        raise ValueError(
            f"quantization={name!r} computes in bfloat16 on {device.type}, not in "
            f"{str(dtype).removeprefix('torch.')}: say dtype='bfloat16', or use nf4."
        )
    logger.info(f"quantization={name!r} on {device.type}: the format of {QUANTIZATIONS[name]}")
    if QUANTIZATIONS[name] == "torchao":
        from transformers import TorchAoConfig

        return TorchAoConfig(_torchao_type(name), modules_to_not_convert=kept)
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**_bitsandbytes_arguments(name, dtype), llm_int8_skip_modules=kept)


def unet_quantization_config(name: str, dtype: torch.dtype) -> Any:
    """What diffusers takes as `quantization_config` of VisCPM-Paint's UNet; see [`quantization_config`]."""
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    if QUANTIZATIONS[name] == "torchao":
        return TorchAoConfig(_torchao_type(name))
    return BitsAndBytesConfig(**_bitsandbytes_arguments(name, dtype))


def kept_modules(quantize_vision: bool = False) -> list[str]:
    return [*KEPT_MODULES, *(() if quantize_vision else VISION_MODULES)]


def _bitsandbytes_arguments(name: str, dtype: torch.dtype) -> dict[str, Any]:
    if name in ("8bit", "int8"):
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4" if name == "fp4" else "nf4",
        "bnb_4bit_compute_dtype": dtype if isinstance(dtype, torch.dtype) else None,
        "bnb_4bit_use_double_quant": True,
    }


def _torchao_type(name: str) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if name == "int8wo":
        return Int8WeightOnlyConfig()
    return Int4WeightOnlyConfig(group_size=INT4_GROUP_SIZE, int4_packing_format="tile_packed_to_4d")


def check_same_quantization(
    wanted: QuantizationConfigMixin, stored: Mapping[str, Any] | None, name: str | None = None
) -> None:
    """Raises `ValueError` if a checkpoint is quantised in another way than asked for.

    Args:
        name: what was asked for: `"8bit"` and `"4bit"` say no more than that.
    """
    have, want = describe_quantization(stored), describe_quantization(wanted)
    if have in (None, want) or (name in ("8bit", "4bit") and have.startswith(f"{name[0]} bits")):
        return
    raise ValueError(
        f"The checkpoint is quantised to {have} already, so it can't be loaded in {want}: leave quantization out, "
        "or start from the checkpoint in full precision."
    )


# ------------------------------------------------------------------------------------------------------------ loading


def load_quantized(
    load: Any,
    model_class: type[PreTrainedModel],
    name_or_path: str | os.PathLike | None,
    config: PreTrainedConfig,
    state_dict: Mapping[str, torch.Tensor] | None,
    **kwargs,
) -> PreTrainedModel:
    """`from_pretrained` with a quantised model as its result.

    Args:
        load: what `from_pretrained` would do otherwise, with `name_or_path` and `config`.
        config: of the model; it says so if the checkpoint is quantised.
        state_dict: of the mapped original file, if it is one.
        kwargs: further arguments of `from_pretrained`, among them `quantization_config` unless `config` has one.

    Raises:
        ValueError: if a layer is too narrow, or the device can't run the format.
    """
    device = _device(kwargs.get("device_map"))
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        _check_device(stored, device, name_or_path)
        loaded = load(name_or_path, config=config, state_dict=state_dict, **kwargs)
        _cast(_model_of(loaded), kwargs.get("dtype"))
        return _prepared(loaded)

    wanted = kwargs["quantization_config"] = _with_kept_modules(kwargs["quantization_config"])
    _check_device(wanted, device, name_or_path)
    with torch.device("meta"):
        model = model_class(config)
    layers = _quantized_layers(model, wanted)
    _check_widths(layers, wanted)
    is_ours = isinstance(wanted, PackedConfig) or _is_ordinary_bitsandbytes(wanted)
    if device is not None and device.type == "cpu" and is_ours:
        source = state_dict if state_dict is not None else _mapped_folder(name_or_path)
        if source is not None:
            return _load_on_cpu(load, model, name_or_path, config, source, layers, kwargs)
    return _prepared(load(name_or_path, config=config, state_dict=state_dict, **kwargs))


def _model_of(loaded: Any) -> PreTrainedModel:
    return loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`


def _prepared(loaded: Any) -> Any:
    """What `from_pretrained` returns, ready to be run and saved."""
    model = _model_of(loaded)
    pack_on_cpu(model)
    head = model.get_output_embeddings()
    if isinstance(model, CpmBeeGenerationMixin) and head is not None:  # a quantiser began with plain layers
        use_row_products(head)
    logging.getLogger(CASTING_LOGGER).addFilter(_is_no_cast_warning)
    return loaded


def _is_no_cast_warning(record: logging.LogRecord) -> bool:
    """Every product in 8 bits says that it casts its inputs."""
    return "inputs will be cast" not in record.msg


def _cast(model: PreTrainedModel, dtype: Any) -> None:
    """Casts what isn't quantised: of a quantised checkpoint, transformers leaves it in its stored dtype."""
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype):
        return
    for module in model.modules():
        if isinstance(module, Int8Embedding):
            module.dtype = dtype
        elif not isinstance(module, PackedLinear):
            for parameter in module.parameters(recurse=False):
                is_plain = type(parameter.data) is torch.Tensor and type(parameter) is nn.Parameter
                if parameter.is_floating_point() and is_plain:
                    parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _load_on_cpu(
    load: Any,
    model: PreTrainedModel,
    name_or_path: str | os.PathLike | None,
    config: PreTrainedConfig,
    source: Mapping[str, torch.Tensor],
    layers: Mapping[str, nn.Module],
    kwargs: dict[str, Any],
) -> PreTrainedModel:
    """Quantises a checkpoint's layers one by one, then loads them as what they are now: a quantised checkpoint."""
    wanted = kwargs.pop("quantization_config")
    dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto"
    if dtype == "auto":
        stored = (tensor.dtype for tensor in source.values() if tensor.is_floating_point())
        dtype = config.dtype or next(stored, torch.float32)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    kind = checkpoint_kind(source)
    if kind is not None and config.model_type == CpmBeeConfig.model_type:
        kind = CPM_BEE  # of which the other kinds hold one
    matcher = KeyMatcher(key_map_of(kind, source)) if kind is not None else None
    own, prefix = set(model.state_dict()), f"{model.base_model_prefix}."
    weights, loaded_weights = {}, {}
    for name, tensor in source.items():
        match = matcher.match(name) if matcher is not None else (name, Entry(name, name))
        if match is None:
            continue
        target, entry = match
        target = next((it for it in (target, target.removeprefix(prefix), prefix + target) if it in own), None)
        layer = None if target is None else layers.get(target.removesuffix(".weight"))
        if layer is not None:
            weights[target] = (tensor, factor_of(entry.operation, tensor.shape))
        elif target is not None:
            loaded_weights[target] = apply_operation(entry.operation, tensor.to(dtype))
    if isinstance(wanted, PackedConfig):
        pack_modules(model, wanted, dtype)
        loaded_weights |= _quantize_packed(weights, model)
    else:
        from .bitsandbytes_cpu import quantize  # imports bitsandbytes

        loaded_weights |= quantize(
            weights,
            bits=4 if wanted.load_in_4bit else 8,
            dtype=dtype,
            quant_type=wanted.bnb_4bit_quant_type,
            double_quant=wanted.bnb_4bit_use_double_quant,
        )
    config = copy.deepcopy(config)
    config.quantization_config = wanted.to_dict()
    kwargs |= {"device_map": {"": "cpu"}, "dtype": dtype}
    loaded = load(None, config=config, state_dict=loaded_weights, **kwargs)
    if name_or_path is not None and (Path(name_or_path) / "generation_config.json").is_file():
        model = _model_of(loaded)
        model.generation_config = GenerationConfig.from_pretrained(name_or_path)
        if isinstance(model, CpmBeeGenerationMixin):
            model.set_default_generation()
    return _prepared(loaded)


def _quantize_packed(weights: Mapping[str, tuple[torch.Tensor, float]], model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights in the form of the model's packed modules, which have none yet; see [`quantize_in_file_order`]."""

    def empty(name: str) -> dict[str, torch.Tensor]:
        module = model.get_submodule(name.removesuffix(".weight"))
        return {name: empty_like(module.weight), f"{name.removesuffix('weight')}scale": empty_like(module.scale)}

    def quantize_one(name: str, target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weight, factor = weights[name]
        packed, scale = target.values()
        num_words = len(weight)
        if len(packed) > num_words and isinstance(model.get_submodule(name.removesuffix(".weight")), Int8Embedding):
            rows = slot_rows(*weight.shape)  # which no original has
            quantize_into(rows, packed[num_words:], scale[num_words:], factor_of(TOKEN_ROWS, weight.shape))
            packed, scale = packed[:num_words], scale[:num_words]
        quantize_into(weight, packed, scale, factor)
        return target

    return quantize_in_file_order(weights, empty, quantize_one)


def _device(device_map: Any) -> torch.device | None:
    """Where all of a model goes; None if it is spread. What bitsandbytes chooses if nothing is said."""
    if device_map is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    places = {device_map} if not isinstance(device_map, Mapping) else set(device_map.values())
    if len(places) != 1 or places & {"auto", "balanced", "balanced_low_0", "sequential", "disk"}:
        return None
    (place,) = places
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def _with_kept_modules(config: QuantizationConfigMixin) -> QuantizationConfigMixin:
    """A user's configuration, with our choice of modules to keep unless it has its own."""
    for field in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if getattr(config, field, ()) is None:
            config = copy.deepcopy(config)
            setattr(config, field, kept_modules())
    return config


def _quantized_layers(model: nn.Module, config: QuantizationConfigMixin) -> dict[str, nn.Module]:
    if isinstance(config, PackedConfig):
        return modules_to_pack(model, config)
    kept = getattr(config, "llm_int8_skip_modules", None) or getattr(config, "modules_to_not_convert", None) or []
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and should_convert_module(name, kept)
    }


def _check_widths(layers: Mapping[str, nn.Module], config: QuantizationConfigMixin) -> None:
    columns, rows = 1, 1
    if isinstance(config, PackedConfig):
        if config.bits == 4:
            columns, rows = GROUP, BLOCK
        layers = {name: layer for name, layer in layers.items() if name.rpartition(".")[2] not in ENDS}
    if getattr(config, "load_in_4bit", False):
        columns, rows = BNB_4BIT_COLUMNS, BNB_4BIT_ROWS
    elif hasattr(config, "quant_type"):
        columns = getattr(config.quant_type, "group_size", None) or 1
    for name, layer in layers.items():
        if layer.in_features % columns or layer.out_features % rows:
            needs = f"multiples of {columns} inputs" + (f" and {rows} outputs" if rows > 1 else "")
            raise ValueError(
                f"{name} has {layer.in_features} inputs and {layer.out_features} outputs, but 4-bit weights need "
                f"{needs}: load this model in 8 bits, or keep such layers out."
            )


def _check_device(config: Any, device: torch.device | None, name_or_path: str | os.PathLike | None) -> None:
    if device is None:
        return
    content = config if isinstance(config, Mapping) else config.to_dict()
    is_packed_for_cuda = "Int4WeightOnly" in str(content.get("quant_type"))
    if is_packed_for_cuda and device.type != "cuda":
        what = "The model" if name_or_path is None else os.fspath(name_or_path)
        raise ValueError(
            f"{what} is quantised to {describe_quantization(content)}, which runs on CUDA only, not on {device.type}."
        )


def _is_ordinary_bitsandbytes(config: QuantizationConfigMixin) -> bool:
    """Whether it asks for what `bitsandbytes_cpu` makes."""
    if not hasattr(config, "load_in_4bit"):
        return False
    if config.load_in_4bit:
        return config.bnb_4bit_quant_storage == torch.uint8
    return not config.llm_int8_has_fp16_weight


def _mapped_folder(name_or_path: str | os.PathLike | None) -> dict[str, torch.Tensor] | None:
    """The tensors of a local folder's safetensors files, mapped into memory; None if there are none."""
    from safetensors import safe_open

    if name_or_path is None or not os.path.isdir(name_or_path):
        return None
    tensors = {}
    for path in sorted(Path(name_or_path).glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors or None


# ---------------------------------------------------------------------------------------------------------- on a CPU


def pack_on_cpu(model: nn.Module) -> nn.Module:
    """Lets a model in 4 bits run on a CPU in little memory, and be saved afterwards.

    On CPUs with AVX-512 bf16, bitsandbytes' first forward packs a layer's weights anew, with gigabytes of gaps in the
    memory of a large model, and rounds their scales to bf16, which its way back, at saving, doesn't restore (0.50). So
    the packing is ours, and the scales are kept (they are 1/128 of the weights) and put back.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False) and getattr(module.weight, "quant_state", None):
            if module.weight.device.type == "cpu" and not _is_packed(module):
                packing = _Packing(module.weight.quant_state)
                module.register_forward_pre_hook(packing.pack)
                module.register_state_dict_pre_hook(packing.unpack)
    return model


def _is_packed(module: nn.Module) -> bool:
    return getattr(module.weight.quant_state, "packing_format_for_cpu", False)


class _Packing:
    """Hooks of a `Linear4bit`: packed for its first forward, unpacked before its weights are taken."""

    def __init__(self, state: Any):
        self.state = copy.copy(state)

    def pack(self, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        (hidden_states,) = inputs
        if hidden_states.device.type == "cpu" and not (
            module.training or hidden_states.requires_grad or _is_packed(module)
        ):
            from .bitsandbytes_cpu import pack

            weight = module.weight
            weight.data, weight.quant_state = pack(weight.data, self.state)
            module.quant_state = weight.quant_state

    def unpack(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if _is_packed(module):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            weight = module.weight
            weight.data, _ = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
            weight.quant_state = module.quant_state = copy.copy(self.state)
