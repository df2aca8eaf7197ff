"""MiniCPM-V for ExecuTorch, the runtime of phones: three programs for its XNNPACK backend, and what describes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.errors import ConversionError
from ..families.systems import title_of
from ..modeling.configuration_vision_resampler import MiniCPMVConfig
from ..modeling.modeling_vision_resampler import MiniCPMVForConditionalGeneration
from .executorch_parts import EmbeddingPart, LanguagePart, VisionPart, fixed_positions
from .executorch_run import DESCRIPTION_NAME, PARTS, ExportedModel, view_method
from .folder_files import write_json
from .workspace import Workspace


# Weights that share a scale in int4.
GROUP_SIZE = 32
# The most tokens of one call of the language model; longer prompts take several.
CHUNK = 128
# Of what --verify allows the logits to differ by, relative to the largest.
TOLERANCE = {None: 1e-3, "int8": 0.02, "int4": 0.02}


@dataclass(frozen=True)
class Export:
    """What was written: sizes of the programs in bytes, and with `verify` how far the logits are from torch's."""

    folder: Path
    sizes: dict[str, int]
    largest_logit: float | None = None
    logit_difference: float | None = None


def export_executorch(
    model: MiniCPMVForConditionalGeneration,
    processor: Any,
    output: str | os.PathLike,
    *,
    quantization: str | None = None,
    views: Sequence[tuple[int, int]] = (),
    context: int = 1024,
    verify: bool = False,
    overwrite: bool = False,
) -> Export:
    """Writes `vision.pte`, `token_embedding.pte`, `language_model.pte`, `export.json` and the processor.

    Args:
        model: in float32 on the CPU; with `quantization` its weights change.
        quantization: None for float32. `"int8"`: int8 weights, one scale a row, and int8 activations, scaled as they
            come. `"int4"`: the language model's layers in groups of 32 weights, the rest in int8.
        views: (height, width) in pixels of the views that the tower will take; the image processor's square if empty.
        context: tokens of prompt and answer together.
        verify: run the programs by ExecuTorch's Python runtime and compare with torch.
        overwrite: replace a folder that is there.

    Raises:
        ConversionError: if a part can't be lowered, or computes something else; nothing is written then.
        ImportError: without executorch, or for `quantization` torchao.
        ValueError: for another model, or views or a context that can't be.
    """
    if not isinstance(model, MiniCPMVForConditionalGeneration):
        raise ValueError(f"ExecuTorch's export takes MiniCPM-V, and this is {title_of(model.config)}.")
    size = processor.image_processor.size
    views = list(dict.fromkeys(views)) or [(size["height"], size["width"])]
    check_export(model.config, quantization, views, context)
    lower = _lowering()
    model.eval().requires_grad_(False)
    if quantization is not None:
        _quantize(model, quantization)
    language = LanguagePart(model, context)
    description = {
        "format": "executorch",
        "model": title_of(model.config),
        "quantization": quantization or "none",
        "views": [list(view) for view in views],
        "context": context,
        "chunk": min(CHUNK, context),
        "eos_token_id": processor.tokenizer.eos_token_id,
        "image_token_id": model.config.image_token_id,
    }
    sources = [Path(name)] if (name := model.config.name_or_path) and Path(name).exists() else []
    workspace = Workspace(output, sources, resume=None, overwrite=overwrite)
    with workspace.open(description), torch.no_grad():
        tokens = torch.export.Dim("tokens", min=1, max=description["chunk"])
        seen = torch.zeros(1, 3, model.config.text_config.hidden_size)
        graphs = {}
        for height, width in views:
            with fixed_positions(model, height, width):
                graphs[view_method(height, width)] = _traced(
                    "vision", VisionPart(model), (torch.zeros(1, 3, height, width),)
                )
        programs = {
            "vision": graphs,
            "token_embedding": {
                "forward": _traced(
                    "token_embedding", EmbeddingPart(model), (torch.zeros(1, 3, dtype=torch.long),), ({1: tokens},)
                )
            },
            "language_model": {
                "forward": _traced("language_model", language, (seen, torch.arange(3)), ({1: tokens}, {0: tokens}))
            },
        }
        for part in PARTS:
            lower(part, programs.pop(part), workspace.path / f"{part}.pte")
        processor.save_pretrained(workspace.path)
        write_json(workspace.path / DESCRIPTION_NAME, description)
        sizes = {part: (workspace.path / f"{part}.pte").stat().st_size for part in PARTS}
        differences = _compare(model, workspace.path, TOLERANCE[quantization]) if verify else ()
        workspace.complete()
    return Export(workspace.output, sizes, *differences)


def check_export(
    config: MiniCPMVConfig, quantization: str | None, views: Sequence[tuple[int, int]], context: int
) -> None:
    """What can be said before a model is loaded; see [`export_executorch`].

    Raises:
        ImportError, ValueError: as [`export_executorch`].
    """
    patch_size, most = config.vision_config.patch_size, config.text_config.max_position_embeddings
    for height, width in views:
        if min(height, width) < patch_size or height % patch_size or width % patch_size:
            raise ValueError(
                f"A view's sides are multiples of the patch size {patch_size}, and {height}x{width} isn't."
            )
    if not 2 <= context <= most:
        raise ValueError(f"The context is 2 to {most} tokens, the model's own positions; got {context}.")
    needed = ["executorch", *(["torchao"] if quantization is not None else [])]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        extras = ",".join(missing)
        raise ImportError(f'This export needs {" and ".join(missing)}: pip install -c constraints.txt ".[{extras}]".')


def _traced(part: str, module: nn.Module, example: tuple, dynamic_shapes: tuple | None = None) -> Any:
    try:
        return torch.export.export(module, example, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise ConversionError(f"torch.export can't trace {part}: {_first_line(error)}") from error


def _lowering():
    """What lowers the graphs of a part to one program and writes it."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    def lower(part: str, graphs: dict[str, Any], path: Path) -> None:
        try:
            program = to_edge_transform_and_lower(
                graphs, partitioner={name: [XnnpackPartitioner()] for name in graphs}
            ).to_executorch()
        except Exception as error:
            raise ConversionError(f"ExecuTorch can't lower {part}: {_first_line(error)}") from error
        with path.open("wb") as file:
            program.write_to_file(file)

    return lower


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# -------------------------------------------------------------------------------------------------- quantisation


class QuantizedEmbedding(nn.Module):
    """Rows in int8, each with its scale, in operators of Core ATen: for torchao's, `torchao::dequantize_affine`,
    ExecuTorch has no kernel."""

    def __init__(self, weight: torch.Tensor, scale: float):
        super().__init__()
        steps = weight.abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
        # No buffers: export writes those that a part doesn't use.
        self.rows = nn.Parameter((weight / steps).round().to(torch.int8), requires_grad=False)
        self.steps = nn.Parameter(steps * scale, requires_grad=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(input_ids, self.rows).float() * nn.functional.embedding(input_ids, self.steps)


def _quantize(model: MiniCPMVForConditionalGeneration, quantization: str) -> None:
    """Quantises linear layers and embedding in place."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    def is_int4(module: nn.Module, name: str) -> bool:
        return (
            quantization == "int4"
            and isinstance(module, nn.Linear)
            and name.startswith("language_model.model.")
            and module.in_features % GROUP_SIZE == 0
        )

    def is_int8(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not is_int4(module, name)

    table = model.get_input_embeddings()
    model.set_input_embeddings(QuantizedEmbedding(table.weight, getattr(table, "scale", 1)))
    for dtype, granularity, scale_dtype, is_meant in (
        (torch.int8, PerAxis(0), None, is_int8),
        (torch.int4, PerGroup(GROUP_SIZE), torch.bfloat16, is_int4),  # as XNNPACK keeps the scales
    ):
        config = Int8DynamicActivationIntxWeightConfig(
            weight_dtype=dtype, weight_granularity=granularity, weight_scale_dtype=scale_dtype
        )
        quantize_(model, config, is_meant)


# -------------------------------------------------------------------------------------------------- the way back


def _compare(model: MiniCPMVForConditionalGeneration, folder: Path, tolerance: float) -> tuple[float, float]:
    """The largest logit of a picture in a prompt, and the largest difference between the programs' and torch's."""
    exported = ExportedModel(folder)
    height, width = exported.views[0]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, height, width, generator=generator)
    ids = torch.arange(4, 20)[None] % model.config.text_config.vocab_size
    expected = torch.cat(
        [model.get_image_features(pixels, return_dict=True).pooler_output, model.get_input_embeddings()(ids)], dim=1
    )
    expected = model.language_model(inputs_embeds=expected, logits_to_keep=1).logits[0, -1]
    got = exported.logits(torch.cat([exported.image_features(pixels), exported.embeddings(ids)], dim=1))
    largest, difference = expected.abs().max().item(), (got - expected).abs().max().item()
    if not difference <= tolerance * largest:
        raise ConversionError(
            f"The exported programs compute something else: logits up to {largest:.3g} differ by {difference:.3g}, "
            f"and {tolerance * largest:.3g} was allowed."
        )
    return largest, difference
