"""Linear layers in 8 and 4 bits as torch's CPU kernels and ours read them, and how transformers loads and saves them.

| rows of a product | 8 bits | 4 bits |
| --- | --- | --- |
| few: steps, beams | our kernel (VNNI), torch's `_weight_int8pack_mm` | ours, torch's `_weight_int4pack_mm_for_cpu` |
| many: prompts, batches | int8 product (VNNI, AMX), rows in two digits of 8 bits | unpacked to bf16 piece by piece |

Torch's kernels multiply rows in bf16 and add in fp32; ours (`row_products`; VNNI, AMX) takes two digits of 8 bits
here too.
Without VNNI, on other devices and where gradients are wanted, 8-bit weights are unpacked too. The numbers of rows are
where one way becomes faster than the other, measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from .row_products import MAX_PACKED_ROWS, can_be_read, has_packed_products, kernel, row_product, unpack_int4
from .weight_packing import BLOCK, GROUP, TINY, quantize_weight


QUANT_METHOD = "viscpm_packed"
# Values that are unpacked at a time.
PIECE = 2**21
# Outputs that are unpacked at a time for a product: few enough for the caches, enough for the library.
OUTPUTS = 512


def _reads_our_bytes() -> bool:
    """Whether this CPU's 4-bit kernel wants the order of [`Int4Linear`]."""
    codes = torch.arange(BLOCK * GROUP, dtype=torch.int32).square().div(3).int().view(BLOCK, GROUP) % 16
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (AttributeError, RuntimeError):
        return False
    low, high = codes.to(torch.uint8).split(BLOCK // 2)
    return torch.equal(packed.view(GROUP, BLOCK // 2), (low | (high << 4)).T)


# Whether the CPU multiplies whole matrices of int8 without overflow on the way, and reads 4-bit weights.
HAS_INT8_PRODUCTS, HAS_4_BIT_KERNEL = torch.cpu._is_vnni_supported(), _reads_our_bytes()
# Up to so many rows torch's kernels are faster.
FEW_ROWS = {8: 4 if HAS_INT8_PRODUCTS else 16, 4: 48 if HAS_4_BIT_KERNEL else 0}


class _WithScale(nn.Module):
    """A module whose `scale` stays in bf16 when its model is cast: kernels read it so."""

    scale: nn.Parameter

    def _apply(self, function: Any, recurse: bool = True) -> nn.Module:
        before = self.scale.data
        super()._apply(function, recurse)
        if self.scale.dtype != before.dtype:
            self.scale.data = before.to(self.scale.device)
        return self


class PackedLinear(_WithScale):
    """What both widths have in common: `weight`, and `scale` in bf16 whatever the model's dtype."""

    bits: int
    weight: nn.Parameter
    scale: nn.Parameter

    def __init__(self, in_features: int, out_features: int, bias: bool = False, device: Any = None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False) if bias else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` -> `(..., out_features)`, in the inputs' dtype."""
        rows = hidden_states.reshape(-1, self.in_features)
        if {rows.device.type, self.weight.device.type} != {"cpu"} or (rows.requires_grad and torch.is_grad_enabled()):
            output = self.unpacked_product(rows)
        elif len(rows) <= MAX_PACKED_ROWS[self.bits] and self._has_kernel(rows):
            output = row_product(rows, self.weight, self.scale, f"_int{self.bits}")
        elif len(rows) <= FEW_ROWS[self.bits]:
            output = self.product_of_few(rows)
        else:
            output = self.product_of_many(rows)
        output = output.to(hidden_states.dtype).view(*hidden_states.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def _has_kernel(self, rows: torch.Tensor) -> bool:
        # A compiled graph can't call ours.
        is_for_it = self.in_features % GROUP == 0 and len(self.weight) > 0 and can_be_read(rows)
        return is_for_it and has_packed_products(kernel())

    def product_of_few(self, rows: torch.Tensor) -> torch.Tensor:
        """By torch's kernel."""
        raise NotImplementedError

    def product_of_many(self, rows: torch.Tensor) -> torch.Tensor:
        return self.unpacked_product(rows)

    def unpacked_product(self, rows: torch.Tensor) -> torch.Tensor:
        """`(rows, in_features)` -> `(rows, out_features)`, in the rows' dtype, without the whole unpacked weight."""
        parts = [nn.functional.linear(rows, piece) for piece in self.unpacked(rows.dtype)]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def unpacked(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The weight in pieces `(outputs, in_features)`."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, bias={self.bias is not None}"


class Int8Linear(PackedLinear):
    """`weight (out_features, in_features)` int8, `scale (out_features,)`."""

    bits = 8

    def __init__(self, in_features: int, out_features: int, bias: bool = False, device: Any = None):
        super().__init__(in_features, out_features, bias, device)
        weight = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        scale = torch.empty(out_features, dtype=torch.bfloat16, device=device)
        self.weight, self.scale = (nn.Parameter(it, requires_grad=False) for it in (weight, scale))

    def product_of_few(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int8pack_mm(rows.to(torch.bfloat16).contiguous(), self.weight, self.scale)

    def product_of_many(self, rows: torch.Tensor) -> torch.Tensor:
        if not HAS_INT8_PRODUCTS:
            return self.unpacked_product(rows)
        # A row is `step * (coarse + fine / 254)` with two digits of 8 bits, exact to 15 bits of its largest value.
        step = (rows.abs().amax(-1, keepdim=True).float() / 127).clamp(min=TINY)
        scaled = rows / step
        coarse = scaled.round()
        digits = torch.cat([coarse, (scaled - coarse).mul_(254).round_()]).to(torch.int8)
        coarse, fine = torch._int_mm(digits, self.weight.t()).float().chunk(2)
        return coarse.add_(fine, alpha=1 / 254).mul_(step * self.scale)

    def unpacked(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        size = max(1, PIECE // self.in_features)
        for codes, scale in zip(self.weight.split(size), self.scale.split(size), strict=True):
            yield codes.to(dtype).mul_(scale.to(dtype)[:, None])


class Int8Embedding(_WithScale):
    """An embedding that shares `weight` and `scale` with an [`Int8Linear`] as its head, or could.

    Args:
        dtype: of its output.
        multiplier: of what is looked up.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype,
        multiplier: float = 1.0,
        device: Any = None,
    ):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.dtype, self.multiplier = dtype, multiplier
        head = Int8Linear(embedding_dim, num_embeddings, device=device)
        self.weight, self.scale = head.weight, head.scale

    def _apply(self, function: Any, recurse: bool = True) -> nn.Module:
        super()._apply(function, recurse)
        self.dtype = function(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(...)` -> `(..., embedding_dim)`."""
        codes, scale = self.weight[input_ids], self.scale[input_ids] * self.multiplier
        return codes.to(self.dtype).mul_(scale.to(self.dtype)[..., None])


class Int4Linear(PackedLinear):
    """`weight (out_features, in_features / 2)` uint8, `scale (in_features / 64, out_features, 2)`.

    The bytes lie as AVX-512 reads them, `(out_features / 64, in_features, 32)`: of 64 outputs the first 32 in the low
    halves, the others in the high ones. A value is `(code - 8) * scale[..., 0] + scale[..., 1]`.
    """

    bits = 4

    def __init__(self, in_features: int, out_features: int, bias: bool = False, device: Any = None):
        super().__init__(in_features, out_features, bias, device)
        weight = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device)
        scale = torch.empty(in_features // GROUP, out_features, 2, dtype=torch.bfloat16, device=device)
        self.weight, self.scale = (nn.Parameter(it, requires_grad=False) for it in (weight, scale))

    def product_of_few(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(torch.bfloat16).contiguous()
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, GROUP, self.scale)

    def product_of_many(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(torch.bfloat16)
        if not can_be_read(rows) or kernel() is None:
            return self.product_without_kernel(rows)
        output = rows.new_empty(len(rows), self.out_features)
        scratch = rows.new_empty(self.in_features * min(OUTPUTS, self.out_features))
        for part, start in zip(output.split(OUTPUTS, 1), range(0, self.out_features, OUTPUTS), strict=True):
            values = scratch[: self.in_features * part.shape[1]].view(self.in_features, -1)
            unpack_int4(self.weight, self.scale, start, values)
            part.copy_(rows @ values)
        return output

    def product_without_kernel(self, rows: torch.Tensor) -> torch.Tensor:
        """As [`product_of_many`], of rows in bf16."""
        groups, count = self.in_features // GROUP, len(rows)
        blocks = self.weight.view(-1, self.in_features, BLOCK // 2)
        scale, zero = self.scale.view(groups, -1, BLOCK, 2).permute(3, 1, 0, 2).contiguous()
        # As they lie, codes are a matrix's columns; memory that is new for every block would cost more than the work.
        half = torch.empty(self.in_features, BLOCK // 2, dtype=torch.uint8)
        values = torch.empty(self.in_features, BLOCK, dtype=torch.bfloat16)
        output = torch.empty(len(blocks), count, BLOCK, dtype=torch.bfloat16)
        for block, codes in enumerate(blocks):
            values[:, : BLOCK // 2].copy_(torch.bitwise_and(codes, 15, out=half))
            values[:, BLOCK // 2 :].copy_(torch.bitwise_right_shift(codes, 4, out=half))
            values.view(groups, GROUP, BLOCK).mul_(scale[block, :, None])
            torch.matmul(rows, values, out=output[block])
        # What codes begin at, a group.
        least = (zero.float() - 8 * scale.float()).transpose(0, 1).reshape(groups, -1)
        sums = rows.view(count, groups, GROUP).sum(-1, dtype=torch.float32)
        return torch.addmm(output.transpose(0, 1).reshape(count, -1).float(), sums, least)

    def unpacked(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        blocks = self.weight.view(-1, self.in_features, BLOCK // 2)
        groups = self.in_features // GROUP
        scales = self.scale.to(dtype).view(groups, -1, BLOCK, 2).permute(3, 1, 0, 2).contiguous()
        size = max(1, PIECE // (BLOCK * self.in_features))
        for start in range(0, len(blocks), size):
            codes, (scale, zero) = blocks[start : start + size], scales[:, start : start + size, :, None]
            values = torch.cat([codes & 15, codes >> 4], -1).to(dtype).view(len(codes), groups, GROUP, BLOCK)
            values = torch.addcmul(zero - 8 * scale, values, scale)
            yield values.view(len(codes), self.in_features, BLOCK).transpose(1, 2).reshape(-1, self.in_features)


PACKED_CLASSES = {8: Int8Linear, 4: Int4Linear}


# ------------------------------------------------------------------------------------------------------- transformers


class PackedConfig(QuantizationConfigMixin):
    """What `from_pretrained` takes as `quantization_config`.

    Args:
        bits: 8 or 4.
        modules_to_not_convert: names of modules that keep their precision.
        quantize_embedding: also embedding and head, always to 8 bits.
    """

    def __init__(
        self,
        bits: int = 8,
        modules_to_not_convert: list[str] | None = None,
        quantize_embedding: bool = False,
        **kwargs,
    ):
        if bits not in PACKED_CLASSES:
            raise ValueError(f"bits is 8 or 4, got {bits!r}.")
        self.quant_method = QUANT_METHOD
        self.bits, self.quantize_embedding = bits, quantize_embedding
        self.modules_to_not_convert = modules_to_not_convert


class PackedQuantizer(HfQuantizer):
    """Puts [`PackedLinear`] in place of linear layers."""

    requires_calibration = False
    quantization_config: PackedConfig

    def validate_environment(self, *args, device_map: Any = None, **kwargs) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("Packed 8-bit and 4-bit weights can't be left on the disk: leave all of them in memory.")

    def update_device_map(self, device_map: Any) -> Any:
        return {"": "cpu"} if device_map is None else device_map

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        module, name = get_module_from_name(model, param_name)
        return name == "weight" and isinstance(module, (PackedLinear, Int8Embedding))

    def _process_model_before_weight_loading(self, model: nn.Module, dtype: Any = None, **kwargs) -> nn.Module:
        pack_modules(model, self.quantization_config, dtype or model.dtype)
        return model

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeWeight()

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class QuantizeWeight(ConversionOps):
    """A weight as it is stored -> `weight` and `scale` of a packed module."""

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module, full_layer_name: str, **kwargs
    ) -> dict[str, torch.Tensor]:
        ((_, value),) = input_dict.items()
        value = value[0] if isinstance(value, list) else value
        module, _ = get_module_from_name(model, full_layer_name)
        weight, scale = quantize_weight(value, getattr(module, "bits", 8))
        return {full_layer_name: weight, full_layer_name.removesuffix("weight") + "scale": scale}


def modules_to_pack(model: nn.Module, config: PackedConfig) -> dict[str, nn.Module]:
    """The linear layers that are to be packed, and embedding and head if asked for."""
    kept = config.modules_to_not_convert or []
    ends = ()
    if config.quantize_embedding:
        ends = [it for it in (model.get_input_embeddings(), model.get_output_embeddings()) if it is not None]
    return {
        name: module
        for name, module in model.named_modules()
        if any(module is it for it in ends) or (isinstance(module, nn.Linear) and should_convert_module(name, kept))
    }


def pack_modules(model: nn.Module, config: PackedConfig, dtype: torch.dtype) -> None:
    """Replaces modules by packed ones without values, in place; tied embedding and head stay tied."""
    head = model.get_output_embeddings()
    for name, module in modules_to_pack(model, config).items():
        device = module.weight.device
        if isinstance(module, nn.Embedding):
            packed = Int8Embedding(
                module.num_embeddings, module.embedding_dim, dtype, getattr(module, "scale", 1.0), device
            )
        else:
            packed_class = Int8Linear if module is head else PACKED_CLASSES[config.bits]
            packed = packed_class(module.in_features, module.out_features, module.bias is not None, device)
        parent, child = get_module_from_name(model, name)
        setattr(parent, child, packed)
    if config.quantize_embedding:
        model.all_tied_weights_keys = _with_scales(model.all_tied_weights_keys)
        for part in model.modules():  # where saving looks
            if isinstance(getattr(part, "_tied_weights_keys", None), dict):
                part._tied_weights_keys = _with_scales(part._tied_weights_keys)


def _with_scales(tied: dict[str, str]) -> dict[str, str]:
    def scale(name: str) -> str:
        return name.removesuffix("weight") + "scale"

    return tied | {scale(target): scale(source) for target, source in tied.items()}


def register_packed() -> None:
    """Makes the format known to transformers; a second call changes nothing."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(PackedConfig)
        auto.register_quantizer(QUANT_METHOD)(PackedQuantizer)


__all__ = ["Int4Linear", "Int8Embedding", "Int8Linear", "PackedConfig", "PackedLinear", "quantize_weight"]
