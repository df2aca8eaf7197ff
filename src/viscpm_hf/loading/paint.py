"""VisCPM-Paint pipelines from the original's files and folders.

The original's file holds text encoder and UNet; vocabulary and configurations lie beside it. Its Hub repository has
the VAE in `vae/`, and may have the text encoder in `text_encoder/` and the UNet in `unet/` instead of one file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    PipelineQuantizationConfig,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import hf_hub_download, snapshot_download
from transformers.utils import logging

from ..checkpoints.key_matching import KeyMatcher
from ..checkpoints.location import find_repository_file, kind_of, only_original_file, variant_name
from ..checkpoints.original import (
    CHAT,
    CPM_BEE,
    DIFFUSION_CONFIG_NAME,
    ORIGINAL_CONFIG_NAMES,
    ORIGINAL_SUFFIXES,
    ORIGINAL_WEIGHTS_NAME,
    PAINT,
    VOCAB_NAME,
    OriginalCheckpointError,
    check_state_dict,
    checkpoint_kind,
    load_state_dict,
    paint_parts,
    read_json,
    text_encoder_config,
)
from ..checkpoints.weight_transforms import apply_operation
from ..families import key_maps
from ..families.diffusion_shapes import UNET_CONFIG, VAE_CONFIG
from ..modeling.modeling_viscpm_paint import VisCPMPaintTextEncoder
from ..modeling.tokenization_cpm_bee import CpmBeeTokenizer
from ..pipelines.pipeline_viscpm_paint import REFERENCE_SCHEDULER_CONFIG
from .from_pretrained import load_original_text_encoder


logger = logging.get_logger(__name__)

VAE_NAME = "vae.bin"
VAE_ADVICE = (
    "VisCPM-Paint's VAE is that of Stable Diffusion 2.1 and not in the checkpoint. It lies in `vae/` of "
    "openbmb/VisCPM-Paint: download that folder beside the checkpoint, or give its path as vae=..."
)

# What is not ours to load from a Hub repository: the same weights once more in an older format.
CONVERTED_IGNORED = ["*.bin", "*.pt", "*.ckpt", "*.msgpack", "*.onnx"]
# Of the original's, the weights aside. Its UNet's lie there a second time, in `unet/`: 3.5 GB that are not needed.
ORIGINAL_WANTED = ["*.json", "*.txt", "unet/*.json", "vae/*", "scheduler/*", "tokenizer/*"]
HUB_ARGUMENTS = ("cache_dir", "force_download", "token", "revision", "local_files_only")


# ------------------------------------------------------------------------------------------------------------ finding


def open_pipeline(stock: Callable[..., Any], pipeline_class: type, name_or_path: Any, **kwargs: Any) -> Any:
    """`from_pretrained` of our pipelines: of the original's files, or of a folder that diffusers knows.

    diffusers takes no other device maps for a whole pipeline than a device's name and `"balanced"`; of these the
    original's files are put on a device.
    """
    folder = find_folder(name_or_path, kwargs)
    if not is_original_folder(folder):
        return stock(folder, **kwargs)
    device = kwargs.pop("device_map", None)
    if device == "balanced":
        raise ValueError('device_map="balanced" needs a converted folder: convert the original first.')
    pipeline = load_original(pipeline_class, folder, **{"scheduler": stored_scheduler(Path(folder)), **kwargs})
    return pipeline if device is None else pipeline.to(device)


def find_folder(name_or_path: str | os.PathLike, kwargs: Mapping[str, Any]) -> str:
    """A local path as it is; the local copy of a Hub repository, of which no more is downloaded than is loaded.

    diffusers itself refuses repositories whose components are of other libraries than its own and transformers.
    """
    name = os.fspath(name_or_path)
    if os.path.exists(name):
        return name
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(ORIGINAL_SUFFIXES):
        raise FileNotFoundError(f"There is no checkpoint at {name}.")
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
    index = read_json(hf_hub_download(name, DiffusionPipeline.config_name, **hub), "The pipeline's index")
    if str((index.get("text_encoder") or [""])[0]).endswith("modeling_viscpm_paint"):
        return snapshot_download(name, ignore_patterns=CONVERTED_IGNORED, **hub)
    if find_repository_file(name, "text_encoder/config.json", **hub) is not None:  # in parts, without a whole file
        return snapshot_download(name, allow_patterns=[*ORIGINAL_WANTED, "unet/*", "text_encoder/*"], **hub)
    weights = variant_name(ORIGINAL_WEIGHTS_NAME, kwargs.get("variant"))
    return snapshot_download(name, allow_patterns=[*ORIGINAL_WANTED, weights], **hub)


def stored_scheduler(folder: Path) -> SchedulerMixin | None:
    """The scheduler of a folder, of the class that its index says; None if it has none."""
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        return None
    index = folder / DiffusionPipeline.config_name
    named = read_json(index, "The pipeline's index").get("scheduler") if index.is_file() else None
    scheduler_class = getattr(diffusers, named[1], None) if isinstance(named, list) and len(named) == 2 else None
    if scheduler_class is DDPMScheduler:  # then the original's numbers, which its file alone doesn't give any more
        return reference_scheduler(read_json(folder / "scheduler" / "scheduler_config.json", "The scheduler's file"))
    return None if scheduler_class is None else scheduler_class.from_pretrained(folder / "scheduler")


def is_original_folder(path: str | os.PathLike) -> bool:
    """Whether a path is an original file, or a folder in the original's layout."""
    path = Path(path)
    if path.is_file():
        return True
    config = path / "text_encoder" / "config.json"
    if config.is_file():
        return kind_of(read_json(config, "The text encoder's configuration")) is not None
    return not (path / DiffusionPipeline.config_name).is_file() or (path / ORIGINAL_WEIGHTS_NAME).is_file()


def find_original_file(folder: Path, variant: str | None = None) -> Path:
    """The one original checkpoint of a folder.

    Raises:
        OriginalCheckpointError: if there is none, or several that are alternatives.
    """
    weights = folder / variant_name(ORIGINAL_WEIGHTS_NAME, variant)
    if weights.is_file():
        return weights
    if variant is not None:
        raise OriginalCheckpointError(f"{folder} has no {weights.name}, the variant {variant!r} of its weights.")
    return only_original_file(folder, f"{DiffusionPipeline.config_name} of a VisCPM-Paint pipeline")


def find_beside(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


# ------------------------------------------------------------------------------------------------------------ loading


def load_original(
    pipeline_class: type,
    path: str | os.PathLike,
    *,
    config_path: str | os.PathLike | None = None,
    vocab_path: str | os.PathLike | None = None,
    diffusion_config_path: str | os.PathLike | None = None,
    vae: AutoencoderKL | str | os.PathLike | None = None,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    torch_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    text_encoder_options: Mapping[str, Any] | None = None,
    quantization_config: PipelineQuantizationConfig | None = None,
    **kwargs,
):
    """A pipeline from an original file or folder.

    Args:
        pipeline_class: [`VisCPMPaintPipeline`] or a class derived from it.
        path: original `.pt`/`.bin` file, or folder in the original's layout.
        config_path: the language model's configuration, if not beside the file.
        vocab_path: `vocab.txt`, likewise.
        diffusion_config_path: `{"unet": ..., "vae": ..., "scheduler": ...}`, their configurations; those of Stable
            Diffusion 2.1 if there are none.
        vae: the VAE, or a folder or file of one; if None, `vae/` or `vae.bin` beside the file.
        dtype: of the models, one for all or `{component: dtype, "default": dtype}`; as stored if None.
        text_encoder_options: further arguments of the text encoder's `from_pretrained`, such as `device_map`.
        quantization_config: for the text encoder and the UNet.
        kwargs: components in place of the checkpoint's, and other arguments of `pipeline_class`.

    Raises:
        OriginalCheckpointError: if the checkpoint can't be used; the message says why.
    """
    if kwargs.pop("device_map", None) is not None:
        raise ValueError("device_map needs a converted folder: convert the original first (viscpm-hf convert).")
    variant = kwargs.pop("variant", None)
    for name in (*HUB_ARGUMENTS, "use_safetensors", "low_cpu_mem_usage", "trust_remote_code", "proxies"):
        kwargs.pop(name, None)
    dtype = dtype if dtype is not None else torch_dtype
    text_encoder_options, unet_quantization = dict(text_encoder_options or {}), None
    if quantization_config is not None:
        unet_quantization = quantization_config._resolve_quant_config(True, "unet")
        wanted = quantization_config._resolve_quant_config(False, "text_encoder")
        if wanted is not None:
            text_encoder_options["quantization_config"] = wanted
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    diffusion_config_path = diffusion_config_path or find_beside(folder, DIFFUSION_CONFIG_NAME)
    configs = read_json(diffusion_config_path, "The diffusion configuration") if diffusion_config_path else {}
    in_parts = path.is_dir() and (path / "text_encoder" / "config.json").is_file()

    tokenizer = kwargs.pop("tokenizer", None)
    if tokenizer is None:
        tokenizer = _load_tokenizer(folder, vocab_path)
    text_encoder, unet = kwargs.pop("text_encoder", None), kwargs.pop("unet", None)
    if in_parts:
        if text_encoder is None:
            text_encoder = VisCPMPaintTextEncoder.from_pretrained(
                path / "text_encoder", dtype=_dtype_of("text_encoder", dtype) or "auto", **text_encoder_options
            )
        if unet is None:
            unet = _load_diffusers_folder(UNet2DConditionModel, path / "unet", _dtype_of("unet", dtype))
    else:
        file = find_original_file(path, variant) if path.is_dir() else path
        state_dict = load_state_dict(file)
        _check_kind(state_dict, file)
        if text_encoder is None:
            config_path = config_path or find_beside(folder, *ORIGINAL_CONFIG_NAMES)
            original = read_json(config_path, "The configuration") if config_path else {}
            config = text_encoder_config(original, {name: tensor.shape for name, tensor in state_dict.items()})
            llm = (value.dtype for name, value in state_dict.items() if name.startswith("llm."))
            stored = next(llm, torch.float32)  # without any, loading says what is missing
            text_encoder = load_original_text_encoder(
                file, config, state_dict, dtype=_dtype_of("text_encoder", dtype) or stored, **text_encoder_options
            )
        if unet is None:
            unet_config = configs.get("unet") or _config_of(folder / "unet") or UNET_CONFIG
            _, part = paint_parts(state_dict)
            unet = load_original_part(
                UNet2DConditionModel, unet_config, part, key_maps.PAINT_UNET, file, _dtype_of("unet", dtype)
            )
    if unet_quantization is not None:
        unet = quantized_unet(unet, unet_quantization)
    if tokenizer.num_words != text_encoder.config.num_words:
        raise OriginalCheckpointError(
            f"The vocabulary has {tokenizer.num_words:,} tokens, but the text encoder "
            f"{text_encoder.config.num_words:,}: they are not of the same checkpoint."
        )
    if not isinstance(vae, AutoencoderKL):
        vae = load_vae(_find_vae(folder, vae), configs.get("vae"), _dtype_of("vae", dtype))
    scheduler = kwargs.pop("scheduler", None)
    if scheduler is None:
        scheduler = reference_scheduler(configs.get("scheduler"))
    return pipeline_class(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, **kwargs
    )


def quantized_unet(unet: UNet2DConditionModel, quantization_config: Any) -> UNet2DConditionModel:
    """A UNet as `from_pretrained` quantises it. diffusers does so only while it loads a folder."""
    with tempfile.TemporaryDirectory() as folder:
        unet.save_pretrained(folder)
        return UNet2DConditionModel.from_pretrained(
            folder, quantization_config=quantization_config, torch_dtype=unet.dtype
        ).eval()


def reference_scheduler(config: Mapping[str, Any] | None = None) -> DDPMScheduler:
    """The original's sampler; `config` is that of another noise schedule."""
    own = {key: REFERENCE_SCHEDULER_CONFIG[key] for key in ("variance_type", "timestep_spacing", "steps_offset")}
    return DDPMScheduler.from_config({**REFERENCE_SCHEDULER_CONFIG, **(config or {}), **own})


def load_vae(path: Path, config: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None) -> AutoencoderKL:
    """A VAE from a diffusers folder, or from a file of any age, with `config` or that of Stable Diffusion 2.1."""
    if path.is_dir():
        return _load_diffusers_folder(AutoencoderKL, path, dtype)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state_dict = load_file(path)
    else:
        state_dict = load_state_dict(path)
    config = config or _config_of(path.parent) or VAE_CONFIG
    return load_original_part(AutoencoderKL, config, state_dict, key_maps.VAE, path, dtype)


def load_original_part(
    model_class: type[ModelMixin],
    config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    key_map: key_maps.KeyMap,
    path: Path,
    dtype: torch.dtype | None = None,
) -> ModelMixin:
    """A diffusers model of tensors with original names.

    Raises:
        OriginalCheckpointError: if tensors are missing, unknown or of another shape.
    """
    with torch.device("meta"):
        model = model_class.from_config(dict(config))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    problems = check_state_dict(state_dict, key_map, expected)
    if problems:
        raise OriginalCheckpointError(
            f"{path} doesn't fit the configuration of its {model_class.__name__}: {problems}. Check that the file is "
            f"complete; for sizes other than the released ones give a {DIFFUSION_CONFIG_NAME}."
        )
    matcher, own = KeyMatcher(key_map), {}
    for name, tensor in state_dict.items():
        target, entry = matcher.match(name)
        # A copy: the file is only mapped into memory.
        own[target] = apply_operation(entry.operation, tensor).to(dtype or tensor.dtype, copy=True)
    model.load_state_dict(own, assign=True)
    return model.eval()


def _check_kind(state_dict: Mapping[str, torch.Tensor], path: Path) -> None:
    kind = checkpoint_kind(state_dict)
    if kind in (CHAT, CPM_BEE):
        what = "a VisCPM-Chat checkpoint (it has vpm.* tensors)" if kind == CHAT else "CPM-Bee alone"
        raise OriginalCheckpointError(
            f"{path} is {what} and can't paint: VisCPM-Paint needs the file of openbmb/VisCPM-Paint."
        )
    if kind != PAINT:
        raise OriginalCheckpointError(
            f"{path} is no VisCPM-Paint checkpoint: its {len(state_dict)} tensors have other names "
            f"({', '.join(list(state_dict)[:3])})."
        )


def _load_tokenizer(folder: Path, vocab_path: str | os.PathLike | None) -> CpmBeeTokenizer:
    path = vocab_path or find_beside(folder, VOCAB_NAME, f"tokenizer/{VOCAB_NAME}", f"text_encoder/{VOCAB_NAME}")
    if path is None or not os.path.isfile(path):
        raise FileNotFoundError(
            f"There is no vocabulary at {path or folder / VOCAB_NAME}. The checkpoint's {VOCAB_NAME} belongs beside "
            "it, or give its path as vocab_path."
        )
    return CpmBeeTokenizer(os.fspath(path))


def _find_vae(folder: Path, vae: str | os.PathLike | None) -> Path:
    if vae is not None:
        path = Path(vae)
        if not path.exists():
            raise FileNotFoundError(f"There is no VAE at {path}. {VAE_ADVICE}")
        return path
    for path in (folder / "vae", folder / VAE_NAME):
        if path.exists():
            return path
    raise FileNotFoundError(f"There is no VAE at {folder / 'vae'}. {VAE_ADVICE}")


def _load_diffusers_folder(model_class: type[ModelMixin], folder: Path, dtype: torch.dtype | None) -> ModelMixin:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} with a {model_class.__name__}.")
    return model_class.from_pretrained(folder, torch_dtype=dtype).eval()


def compile_unet(unet: UNet2DConditionModel, **options) -> None:
    """Compiles a UNet in place, its weights channels-last. Each number and size of pictures is compiled anew, at its
    first step.

    Args:
        options: further ones of `torch.compile`.
    """
    unet.to(memory_format=torch.channels_last)
    unet.compile(dynamic=False, **options)


def _config_of(folder: Path) -> dict[str, Any] | None:
    """A diffusers model's configuration, without the keys that describe the file."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = read_json(path, "The configuration")
    return config if "_class_name" in config else None


def _dtype_of(component: str, dtype: torch.dtype | dict[str, torch.dtype] | None) -> torch.dtype | None:
    return dtype.get(component, dtype.get("default")) if isinstance(dtype, Mapping) else dtype
