"""bitsandbytes' 8-bit and 4-bit weights, made on the CPU about as fast as a disk delivers the originals.

bitsandbytes quantises on a CPU with a search for every value, over whole tensors in fp32; transformers hands it copies
that were cast and folded before. Here a weight goes from its (mapped) file to its quantised form in pieces that stay
in the cache, with operations that torch runs in vector registers: no other copy, and many times the speed. The result
is what bitsandbytes' layers save, so it is loaded as any quantised checkpoint is. For the first forward, `pack` puts
it into the order of the CPU's kernels.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping

import bitsandbytes.functional as bnb
import torch

from .file_order import empty_like, quantize_in_file_order


# Values that are worked on at a time.
PIECE_VALUES = 2**18
BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
# Scaled values from 0 to 1 fall into so many cells, which have one 4-bit code each.
CELLS = 32767
TINY = 1e-30
# Rows that bitsandbytes' kernels work on together.
PACKED_ROWS = 32


def quantize(
    weights: Mapping[str, tuple[torch.Tensor, float]],
    *,
    bits: int,
    dtype: torch.dtype,
    quant_type: str = "nf4",
    double_quant: bool = True,
) -> dict[str, torch.Tensor]:
    """Weights of linear layers in the form in which bitsandbytes' layers save them.

    Args:
        weights: `{name: (weight (rows, columns), factor it is to be multiplied by)}`.
        bits: 8 or 4.
        dtype: of the model.
        quant_type: `"nf4"` or `"fp4"`.
        double_quant: whether the scales of the 4-bit blocks are quantised too.

    Returns:
        `name`, and what goes with it: `name.absmax`, ... (4 bits), `SCB` and `weight_format` of its module (8 bits).
    """

    def empty(name: str) -> torch.Tensor:
        shape = weights[name][0].shape
        dtype, size = (torch.int8, shape) if bits == 8 else (torch.uint8, (shape.numel() // 2, 1))
        return empty_like(torch.empty(size, dtype=dtype, device="meta"))

    def quantize_one(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
        weight, factor = weights[name]
        if bits == 8:
            scales = quantize_rows(weight, values)
            module = name.removesuffix("weight")
            format_name = torch.tensor(0, dtype=torch.uint8)
            return {name: values, f"{module}SCB": scales.mul_(factor), f"{module}weight_format": format_name}
        absmax = quantize_blocks(weight, values, quant_type)
        state = _quant_state(absmax.mul_(factor), weight.shape, dtype, quant_type, double_quant)
        return {name: values} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}

    return quantize_in_file_order(weights, empty, quantize_one)


def pack(packed: torch.Tensor, state: bnb.QuantState) -> tuple[torch.Tensor, bnb.QuantState]:
    """A 4-bit weight in the order that bitsandbytes' kernels for AVX-512 bf16 read.

    The same as bitsandbytes' own function makes in a layer's first forward, without its 32 bits a value: those, freed
    between the weights, leave gaps that cost a 10B model gigabytes.

    Args:
        packed: `(rows * columns / 2, 1)`, see [`quantize_blocks`].
        state: its `shape` is `(rows, columns)`, rows a multiple of 32.

    Returns:
        `(rows, columns / 2)`, and a state of its own.
    """
    rows, columns = state.shape
    source = packed.view(torch.uint8).reshape(rows // PACKED_ROWS, PACKED_ROWS, columns // 2)
    target = torch.empty(rows // PACKED_ROWS, columns // 2, PACKED_ROWS // 2, dtype=torch.int16)
    for codes, order in zip(source, target, strict=True):
        low, high = codes.split(PACKED_ROWS // 2)
        # Of two rows, 16 apart, the first's code is the low half of a byte; bytes of two columns lie side by side.
        even, odd = (low >> 4) | (high & 0xF0), (low & 0xF) | (high << 4)
        order.copy_((even.short() | (odd.short() << 8)).T)
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2).add_(state.offset)
    state = copy.copy(state)
    # What bitsandbytes' way back wants to know.
    state.original_dtype, state.original_nested, state.original_qshape = state.dtype, state.nested, packed.shape
    if packed.dtype != torch.uint8:
        state.original_storage_type = packed.dtype
    state.absmax = absmax.reshape(rows, columns // state.blocksize).T.to(torch.bfloat16).contiguous()
    state.dtype, state.nested, state.state2, state.packing_format_for_cpu = torch.bfloat16, False, None, True
    return target.view(torch.uint8).reshape(rows, columns // 2), state


def _rows_of_a_piece(weight: torch.Tensor) -> int:
    return max(1, PIECE_VALUES // weight.shape[1])


def quantize_rows(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`(rows, columns)` -> int8 of that shape in `values`; returns the maxima `(rows,)` that 127 stands for."""
    scales = torch.empty(weight.shape[0])
    rows = _rows_of_a_piece(weight)
    piece = torch.empty(rows, weight.shape[1])
    for source, target, scale in zip(weight.split(rows), values.split(rows), scales.split(rows), strict=True):
        wide = piece[: len(source)].copy_(source)
        torch.amax(wide.abs(), 1, out=scale)
        target.copy_(wide.mul_((127 / scale.clamp(min=TINY)).unsqueeze(1)).round_())
    return scales


def quantize_blocks(weight: torch.Tensor, packed: torch.Tensor, quant_type: str) -> torch.Tensor:
    """`(rows, columns)` -> two 4-bit codes a byte in `packed (rows * columns / 2, 1)`; returns the absolute maxima of
    blocks of 64.

    A code differs from bitsandbytes' own only where a value is in one cell with the middle between two; of FP4's
    zeros the first is taken.
    """
    absmax = torch.empty(weight.numel() // BLOCK_SIZE)
    rows = _rows_of_a_piece(weight)
    size = rows * weight.shape[1]
    code_of_cell = _code_of_cell(quant_type)
    wide, absolute = torch.empty(size // BLOCK_SIZE, BLOCK_SIZE), torch.empty(size // BLOCK_SIZE, BLOCK_SIZE)
    code = torch.empty(size, dtype=torch.uint8)
    for source, target, scale in zip(
        weight.split(rows), packed.view(-1).split(size // 2), absmax.split(size // BLOCK_SIZE), strict=True
    ):
        if source.numel() < size:  # the last one
            size = source.numel()
            wide, absolute, code = wide[: size // BLOCK_SIZE], absolute[: size // BLOCK_SIZE], code[:size]
        wide.copy_(source.reshape(-1, BLOCK_SIZE))
        torch.amax(torch.abs(wide, out=absolute), 1, out=scale)
        cells = absolute.view(torch.int32).view(-1)
        cells.copy_(wide.mul_((CELLS / scale.clamp(min=TINY)).unsqueeze(1)).add_(CELLS).view(-1))
        torch.index_select(code_of_cell, 0, cells, out=code)
        pairs = code.view(torch.int16)  # the first of two values is the low byte
        target.copy_((pairs << 4) | (pairs >> 8))
    return absmax


@functools.cache
def _code_of_cell(quant_type: str) -> torch.Tensor:
    """The code that is nearest to the values in each of `2 * CELLS + 1` cells from -1 to 1."""
    middles = (torch.arange(2 * CELLS + 1) + 0.5) / CELLS - 1
    values = bnb.get_4bit_type(quant_type, device="cpu")
    return (middles.unsqueeze(1) - values).abs().argmin(1).to(torch.uint8)


def _quant_state(
    absmax: torch.Tensor, shape: torch.Size, dtype: torch.dtype, quant_type: str, double_quant: bool
) -> bnb.QuantState:
    nested = {}
    if double_quant:
        offset = absmax.mean()
        absmax, state = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
        nested = {"offset": offset, "state2": state}
    code = bnb.get_4bit_type(quant_type, device="cpu")
    return bnb.QuantState(
        absmax=absmax, shape=shape, code=code, blocksize=BLOCK_SIZE, quant_type=quant_type, dtype=dtype, **nested
    )
