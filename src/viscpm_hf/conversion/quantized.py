"""Conversion to a quantised checkpoint: it is loaded as such, then saved before it has run."""

from __future__ import annotations

import functools
import os
import shlex
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.errors import ConversionError
from ..checkpoints.headers import safetensors_header
from ..checkpoints.location import MANIFEST_NAME, locate
from ..checkpoints.original import PAINT
from ..checkpoints.stored_quantization import stored_quantization
from ..checkpoints.tensor_files import sha256_of
from ..loading.quantization import check_quantization, computing_dtype, quantization_config
from ..version import __version__
from .convert import MANIFEST_FORMAT, TO_HUGGINGFACE, ConversionResult, parse_dtype, parse_size
from .export import save_processor
from .folder_files import write_json
from .model_card import card
from .plan import Checkpoint
from .planning import open_converted, open_original
from .source_files import SourceFiles
from .verify import empty_model
from .workspace import PARTIAL_SUFFIX, Workspace


ROUNDING = "Linear layers of the language model were quantised; their values can't be brought back."


def convert_quantized(
    source: str | os.PathLike,
    output: str | os.PathLike,
    quantization: str,
    *,
    llm_config: str | os.PathLike | None = None,
    vision_config: str | os.PathLike | None = None,
    diffusion_config: str | os.PathLike | None = None,
    vae: str | os.PathLike | None = None,
    vocab: str | os.PathLike | None = None,
    quantize_embedding: bool = False,
    dtype: str | torch.dtype = "keep",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> ConversionResult:
    """Writes a folder whose language model is quantised; see [`convert`] for the other arguments.

    Args:
        source: an original file, folder or Hub id, or a converted folder.
        quantization: a name of `quantization.QUANTIZATIONS`, as it is meant on this machine's CUDA device if there is
            one. Made on the CPU, except for int4wo of torchao.
        quantize_embedding: also embedding and head; see [`quantization_config`].
        dtype: of what isn't quantised.

    Raises:
        OriginalCheckpointError: if the source can't be used.
        ConversionError: if it is quantised already, or the output can't be written there.
        ValueError: if a layer is too narrow, or the format can't be made on this machine.
        OSError: if files can't be read or written.
    """
    begin = time.perf_counter()
    device = torch.device("cuda" if quantization == "int4wo" and torch.cuda.is_available() else "cpu")
    check_quantization(quantization, device)
    configure = functools.partial(quantization_config, quantization, quantize_embedding=quantize_embedding)
    wanted, shard_bytes = parse_dtype(dtype), parse_size(max_shard_size)
    location = locate(source, revision, token, cache_dir=cache_dir)
    stored = stored_quantization(location.path)
    if stored is not None:
        raise ConversionError(f"{location.name} is quantised already ({stored}): start from full precision.")
    if location.is_converted:
        checkpoint = open_converted(location)
    else:
        checkpoint = open_original(location, llm_config, vision_config, diffusion_config, vae, vocab)
    in_layers = wanted or computing_dtype(quantization, device, _stored_dtype(checkpoint))
    workspace = Workspace(output, [location.path], resume=None, overwrite=overwrite)
    source_files = SourceFiles.of(checkpoint)
    with workspace.open({"version": __version__, "quantization": quantization}):
        folder = workspace.path
        with ThreadPoolExecutor(1, "sha256") as thread:
            checksum = thread.submit(sha256_of, checkpoint.weight_files[0])
            if checkpoint.kind == PAINT:
                beside = {"config_path": llm_config, "diffusion_config_path": diffusion_config, "vae": vae}
                model = _load_paint(
                    checkpoint, configure, wanted, in_layers, device, folder, vocab_path=vocab, **beside
                )
            else:
                model = _load(checkpoint, configure, in_layers, device)
                checkpoint.set_generation(model)
                save_processor(folder, checkpoint)
            model.save_pretrained(folder, max_shard_size=shard_bytes)
            num_parameters = _num_parameters(model, checkpoint)
            del model
            manifest = _manifest(checkpoint, folder, quantization, checksum.result())
        write_json(folder / MANIFEST_NAME, manifest)
        (folder / "README.md").write_text(card(checkpoint, num_parameters, manifest), "utf-8")
        source_files.check({checkpoint.weight_files[0]: manifest["source"]["sha256"]})
        workspace.complete()
    files = {name: known["size"] for name, known in manifest["files"].items()}
    return ConversionResult(
        source=location.name,
        output=Path(output),
        kind=checkpoint.kind,
        files=files,
        num_tensors=len(manifest["tensors"]),
        num_parameters=num_parameters,
        num_bytes=sum(files.values()),
        dropped={},
        source_sha256=manifest["source"]["sha256"],
        seconds=time.perf_counter() - begin,
    )


def _load(checkpoint: Checkpoint, configure: Callable[..., Any], dtype: torch.dtype, device: torch.device) -> Any:
    model_class = type(empty_model(checkpoint.config))
    options = {"quantization_config": configure(dtype), "dtype": dtype, "device_map": {"": device}}
    if checkpoint.location.is_converted:
        return model_class.from_pretrained(checkpoint.location.path, **options)
    state_dict = checkpoint.state_dict()
    return model_class.from_pretrained(None, config=checkpoint.config, state_dict=state_dict, **options)


def _load_paint(
    checkpoint: Checkpoint,
    configure: Callable[..., Any],
    dtype: torch.dtype | None,
    of_encoder: torch.dtype,
    device: torch.device,
    folder: Path,
    **beside: Any,
) -> Any:
    """The pipeline; what belongs to it but isn't loaded is written into the folder."""
    from ..loading.paint import load_original
    from ..modeling.modeling_viscpm_paint import VisCPMPaintTextEncoder
    from ..pipelines.pipeline_viscpm_paint import VisCPMPaintPipeline
    from .paint import TEXT_ENCODER, save_prompt_checker

    options = {"quantization_config": configure(of_encoder), "device_map": {"": device}}
    path = checkpoint.location.path
    if not checkpoint.location.is_converted:
        parts = save_prompt_checker(folder, checkpoint.diffusion.prompt_checker)
        dtypes = {TEXT_ENCODER: of_encoder, "default": dtype}
        return load_original(VisCPMPaintPipeline, path, dtype=dtypes, text_encoder_options=options, **beside, **parts)
    text_encoder = VisCPMPaintTextEncoder.from_pretrained(path / TEXT_ENCODER, dtype=of_encoder, **options)
    others = {} if dtype is None else {"dtype": dtype}
    return VisCPMPaintPipeline.from_pretrained(path, text_encoder=text_encoder, **others)


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    return next(tensor.dtype for tensor in checkpoint.tensors.values() if tensor.is_floating_point())


def _num_parameters(model: Any, checkpoint: Checkpoint) -> int:
    """Of the models as they were before."""
    if isinstance(model, torch.nn.Module):
        return empty_model(checkpoint.config).num_parameters()
    quantized = model.text_encoder
    parts = [empty_model(quantized.config) if part is quantized else part for part in model.components.values()]
    return sum(part.num_parameters() for part in parts if isinstance(part, torch.nn.Module))


def _manifest(checkpoint: Checkpoint, folder: Path, quantization: str, sha256: str) -> dict[str, Any]:
    """`conversion.json`, without a way back."""
    source = checkpoint.weight_files[0]
    paths = sorted(folder.rglob("*.safetensors"))
    words = [*checkpoint.command, folder.name.removesuffix(PARTIAL_SUFFIX), "--quantize", quantization]
    return {
        "format": MANIFEST_FORMAT,
        "tool": f"viscpm-hf {__version__}",
        "command": shlex.join(words),
        "direction": TO_HUGGINGFACE,
        "kind": checkpoint.kind,
        "quantization": quantization,
        "source": {"file": source.name, "size": source.stat().st_size, "sha256": sha256},
        "rounding": ROUNDING,
        "files": {path.relative_to(folder).as_posix(): {"size": path.stat().st_size} for path in paths},
        "tensors": [
            {
                "target": spec.name,
                "file": path.relative_to(folder).as_posix(),
                "dtype": spec.dtype,
                "shape": list(spec.shape),
            }
            for path in paths
            for spec in safetensors_header(path).values()
        ],
    }
