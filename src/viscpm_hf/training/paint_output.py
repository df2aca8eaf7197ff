"""What a training of Paint leaves: a pipeline's folder, or an adapter's weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..pipelines.pipeline_viscpm_paint import VisCPMPaintPipeline
from .paint_encoding import PromptProjection, projection_files


PROJECTION_NAME = "projection.safetensors"
INDEX_NAME = "model_index.json"


def save_adapter(folder: Path, unet: UNet2DConditionModel, projection: PromptProjection | None) -> None:
    """Writes what `pipeline.load_lora_weights(folder)` reads, and the projection, for [`load_projection`]."""
    from peft import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    VisCPMPaintPipeline.save_lora_weights(
        folder,
        unet_lora_layers={name: tensor.detach().contiguous() for name, tensor in layers.items()},
        **_collate_lora_metadata({"unet": unet}),
    )
    if projection is not None:
        save_file(_projection_tensors(projection), folder / PROJECTION_NAME)


def load_projection(pipeline: VisCPMPaintPipeline, folder: Path | str) -> None:
    """Replaces the projection of a pipeline's text encoder by the one that was trained with an adapter."""
    state = load_file(Path(folder) / PROJECTION_NAME)
    encoder = pipeline.text_encoder
    for name, tensor in state.items():
        with torch.no_grad():
            encoder.get_parameter(name).copy_(tensor)


def save_pipeline(
    folder: Path, model: Path, unet: UNet2DConditionModel | None, projection: PromptProjection | None
) -> None:
    """Writes the pipeline of folder `model` with another UNet and projection, in the dtypes that it is stored in.

    Nothing but these two is loaded: the other files are copied.
    """
    replaced = projection_files(model / "text_encoder") if projection is not None else {}
    for path in sorted(model.iterdir()):
        if path.is_dir() and path.name == "unet" and unet is not None:
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=_ignored(set(replaced.values())))
        elif path.suffix in (".json", ".py", ".md", ".txt"):
            shutil.copy2(path, folder)
    if unet is not None:
        dtype = _stored_dtype(model / "unet")
        if dtype != unet.dtype:
            unet.to(dtype)
        unet.save_pretrained(folder / "unet")
        for code in (model / "unet").glob("*.py"):
            shutil.copy2(code, folder / "unet")
    for path in set(replaced.values()):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        state = load_file(path)
        for name, tensor in _projection_tensors(projection).items():
            if replaced[name] == path:
                state[name] = tensor.to(state[name].dtype)
        save_file(state, folder / "text_encoder" / path.name, metadata)


def _ignored(paths: set[Path]):
    return lambda folder, names: [name for name in names if Path(folder) / name in paths]


def _stored_dtype(folder: Path) -> torch.dtype:
    with safe_open(sorted(folder.glob("*.safetensors"))[0], "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


def _projection_tensors(projection: PromptProjection) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in projection.state_dict().items()}
