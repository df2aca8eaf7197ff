"""Is a converted checkpoint what its source was? Bit by bit, then as models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..checkpoints.configurations import read_config, without_weights
from ..checkpoints.errors import ConversionError
from ..checkpoints.headers import safetensors_header, weight_files
from ..checkpoints.original import CPM_BEE, CheckpointProblems, check_state_dict, key_map_of, load_state_dict
from ..checkpoints.stored_quantization import stored_quantization
from ..checkpoints.tensor_files import TensorSpec, dtype_name, mapped_tensors
from ..checkpoints.transfer import TensorTransfer, converted_pieces, rearranged, written_pieces
from ..families.family import FAMILIES
from ..plain_text import plain


if TYPE_CHECKING:
    from .plan import Checkpoint, ConversionPlan


# Models up to this size are run, too; 200 MB in fp32.
MAX_RUN_PARAMETERS = 50_000_000
RUN_SEED = 0
RUN_TEXT_TOKENS = 12

MAX_NAMED = 3


@dataclass(frozen=True)
class LoadingReport:
    """The converted folder and the source as models."""

    num_parameters: int
    is_output_equal: bool | None
    """Whether both gave the same output to the bit; None for models too big to run, and where dtypes differ."""


@dataclass(frozen=True)
class VerificationReport:
    """What a comparison of all tensors found."""

    num_tensors: int
    num_bytes: int
    differing: list[str] = field(default_factory=list)
    """Tensors of the new files that aren't what the source's should have become."""
    nonfinite: dict[str, int] = field(default_factory=dict)
    """Tensors of the source with NaN or infinite values, and how many."""
    overflowed: dict[str, int] = field(default_factory=dict)
    """New tensors whose values no longer fit their dtype, and how many."""
    loading: LoadingReport | None = None

    def raise_for_differences(self) -> None:
        """Raises [`ConversionError`] if the new files can't stand for the source."""
        if self.differing:
            raise ConversionError(
                f"{len(self.differing)} of {self.num_tensors} tensors differ from the source "
                f"({_sample(self.differing)}): the disk or the memory of this machine may be faulty."
            )
        if self.overflowed:
            raise ConversionError(
                f"{sum(self.overflowed.values()):,} values of {len(self.overflowed)} tensors are too big for their "
                f"new dtype and became infinite ({_sample(self.overflowed)}): choose bfloat16 or float32."
            )


def _sample(names) -> str:
    names = list(names)
    return ", ".join(map(plain, names[:MAX_NAMED])) + (", ..." if len(names) > MAX_NAMED else "")


def verify_files(
    source: Mapping[str, torch.Tensor], plan: ConversionPlan, folder: Path, show_progress: bool = False
) -> VerificationReport:
    """Reads everything again and compares it, piece by piece.

    Raises:
        ConversionError: if a new file is damaged.
        OSError: if one is missing.
    """
    differing, nonfinite, overflowed = [], {}, {}
    num_tensors = 0
    with tqdm(
        total=plan.nbytes, desc="verifying", unit="B", unit_scale=True, disable=not show_progress, leave=False
    ) as progress:
        for file in plan.files:
            path = folder / file.path
            written = mapped_tensors(path) if path.suffix == ".safetensors" else load_state_dict(path)
            for transfer in file.tensors:
                num_tensors += 1
                name = transfer.target.name
                found = compare(transfer.tensor(source), written.pop(name, None), transfer, progress.update)
                if not found.is_equal:
                    differing.append(name)
                if found.num_nonfinite_source:
                    nonfinite[transfer.source.name] = found.num_nonfinite_source
                if found.num_nonfinite > found.num_nonfinite_source:
                    overflowed[name] = found.num_nonfinite - found.num_nonfinite_source
            differing += [f"{name} (surplus)" for name in written]
    return VerificationReport(num_tensors, plan.nbytes, differing, nonfinite, overflowed)


@dataclass
class Comparison:
    is_equal: bool = True
    num_nonfinite_source: int = 0
    num_nonfinite: int = 0


def compare(source: torch.Tensor, written: torch.Tensor | None, transfer: TensorTransfer, report) -> Comparison:
    """Compares a written tensor with what the source's should have become, bit by bit."""
    result = Comparison()
    if written is None or TensorSpec("", written.dtype, tuple(written.shape)) != TensorSpec(
        "", transfer.target.dtype, transfer.target.shape
    ):
        result.is_equal = False
        return result
    before_parts = rearranged(source, transfer)
    written_parts = written_pieces(written, transfer)
    parts = zip(converted_pieces(source, transfer, report), written_parts, before_parts, strict=False)
    for expected, actual, before in parts:
        result.is_equal &= torch.equal(_bits(expected), _bits(actual.reshape(expected.shape)))
        result.num_nonfinite_source += _num_nonfinite(before)
        result.num_nonfinite += _num_nonfinite(actual)
    return result


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaN differs from itself; its bits don't."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _num_nonfinite(tensor: torch.Tensor) -> int:
    # A sum is finite only if all values are, and much faster than asking each.
    if not tensor.is_floating_point() or math.isfinite(tensor.sum(dtype=torch.float32).item()):
        return 0
    return tensor.numel() - int(torch.isfinite(tensor).sum())


# ---------------------------------------------------------------------------------------------------------- as models


def verify_loading(checkpoint: Checkpoint, folder: Path) -> LoadingReport:
    """Makes the model of the source's configuration and that of the new folder's, without weights, and compares names
    and shapes; small models are loaded both ways and run.

    Raises:
        ConversionError: if anything differs.
    """
    direct = empty_model(checkpoint.config)
    converted = check_transformers_folder(folder)
    expected, actual = shapes_of(direct), shapes_of(converted)
    if expected != actual:
        raise ConversionError(
            "The model of the new folder isn't the source's: "
            f"{_sample(dict(expected.items() ^ actual.items()))} differ."
        )
    num_parameters = sum(parameter.numel() for parameter in direct.parameters())
    return LoadingReport(num_parameters, _run_both(checkpoint, folder, num_parameters))


def empty_model(config) -> torch.nn.Module:
    """A model of `config` whose weights take no memory."""

    def build() -> torch.nn.Module:
        family = next(family for family in FAMILIES.values() if family.config_class is type(config))
        return family.model_class(config)

    return without_weights(build)


def original_problems(kind: str, tensors: Mapping[str, Any], config: Any) -> CheckpointProblems:
    """Compares an original file's tensors, or their headers, with the model of its configuration."""
    return check_state_dict(tensors, key_map_of(kind, tensors), stored_shapes(empty_model(config)))


def check_transformers_folder(folder: Path) -> torch.nn.Module:
    """Compares a folder's weights with the model of its configuration, which is returned without weights.

    Raises:
        ConversionError: if tensors are missing, surplus or of another shape.
    """
    model = empty_model(read_config(folder))
    check_weights(model, folder, "model")
    return model


def check_weights(model: torch.nn.Module, folder: Path, weights_name: str) -> None:
    """Compares the headers of a folder's weights with a model.

    Of a quantised layer several tensors are stored, under names and in shapes that are its quantiser's.
    """
    expected = stored_shapes(model)
    stored, quantized = {}, set()
    for file in weight_files(folder, weights_name):
        stored |= safetensors_header(folder / file)
    if stored_quantization(folder) is not None:
        layers = {name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Embedding))}
        for name, spec in stored.items():
            if name not in expected or "float" not in spec.dtype:
                quantized |= layers & _modules_around(name)

    def of_other_layers(names: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in names.items() if not quantized & _modules_around(name)}

    expected = of_other_layers(expected)
    stored = {name: spec.shape for name, spec in of_other_layers(stored).items()}
    missing = [name for name in expected if name not in stored]
    surplus = [name for name in stored if name not in expected]
    # Folders of version 0.1 have the rows of words alone, the others are made when they are loaded.
    is_diffusers = not hasattr(model.config, "get_text_config")
    num_words = None if is_diffusers else getattr(model.config.get_text_config(decoder=True), "num_words", None)
    misshaped = [
        name
        for name in expected
        if name in stored
        and stored[name] != expected[name]
        and not (name.endswith("embed_tokens.weight") and stored[name] == (num_words, *expected[name][1:]))
    ]
    if missing or surplus or misshaped:
        raise ConversionError(
            f"The weights in {folder} aren't those of their configuration: {len(missing)} tensors missing "
            f"({_sample(missing)}), {len(surplus)} surplus ({_sample(surplus)}), {len(misshaped)} of another shape "
            f"({_sample(misshaped)})."
        )


def stored_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's weights as a file has them: what is tied is stored once."""
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    return {name: shape for name, shape in shapes_of(model).items() if name not in tied}


def _modules_around(tensor: str) -> set[str]:
    """Names of the modules that a tensor may belong to."""
    parts = tensor.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts) + 1)}


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _run_both(checkpoint: Checkpoint, folder: Path, num_parameters: int) -> bool | None:
    """Whether both models give the same logits; None if they can't be expected to, or are too big to try."""
    if num_parameters > MAX_RUN_PARAMETERS:
        return None
    model_class = type(empty_model(checkpoint.config))
    # Loaded in the dtype that it was converted to, the source is folded in that dtype, not in its own.
    stored = {
        spec.dtype for file in weight_files(folder, "model") for spec in safetensors_header(folder / file).values()
    }
    source = {dtype_name(tensor.dtype) for tensor in checkpoint.tensors.values()}
    if len(stored) != 1 or source != stored:
        return None
    (name,) = stored
    dtype = getattr(torch, name)
    outputs = []
    state_dict = checkpoint.state_dict()
    for arguments in (
        {"pretrained_model_name_or_path": None, "config": checkpoint.config, "state_dict": state_dict},
        {"pretrained_model_name_or_path": folder},
    ):
        model = model_class.from_pretrained(**arguments, dtype=dtype).eval()
        with torch.no_grad():
            outputs.append(model(**_inputs(model, checkpoint.kind)).logits)
    if not torch.equal(_bits(outputs[0]), _bits(outputs[1])):
        difference = (outputs[0].float() - outputs[1].float()).abs().max().item()
        raise ConversionError(
            f"Loaded directly and converted ({name}), the model's outputs differ by up to {difference:.2e}."
        )
    return True


def _inputs(model: torch.nn.Module, kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(RUN_SEED)
    config = model.config
    text_config = config.get_text_config(decoder=True)
    num_words = getattr(text_config, "num_words", text_config.vocab_size)  # a slot for an extension token is no word
    text = torch.randint(num_words, (1, RUN_TEXT_TOKENS), generator=generator)
    if kind == CPM_BEE:
        return {"input_ids": text}
    image = torch.full((1, config.num_query_tokens), config.image_token_id)
    vision = config.vision_config
    pixels = torch.randn(1, vision.num_channels, vision.image_size, vision.image_size, generator=generator)
    return {"input_ids": torch.cat([image, text], dim=1), "pixel_values": pixels.to(model.dtype)}
