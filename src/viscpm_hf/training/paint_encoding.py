"""What the frozen models make of prompts and pictures, computed once and cached, so that neither stays in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from safetensors import safe_open
from torch import nn
from tqdm import tqdm

from ..loading.options import default_dtype
from ..modeling.modeling_viscpm_paint import VisCPMPaintTextEncoder
from ..pipelines.pipeline_viscpm_paint import VisCPMPaintPipeline
from .paint_cache import TensorCache, files_fingerprint, text_key
from .paint_data import CaptionDataset, load_square
from .records import ImageSource


# Key of the row that all padding of prompts has; no text has it.
PADDING = "padding"
PROJECTION_NAMES = ("projection.weight", "layer_norm.weight", "layer_norm.bias")
WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's: every `count`-th item, from `index` on."""

    index: int = 0
    count: int = 1


def prompt_cache(folder: Path, model: Path, *, is_projected: bool) -> TensorCache:
    """Prompts' states: what the UNet attends to, or the language model's output before the projection."""
    config = {
        "text_encoder": files_fingerprint([*(model / "text_encoder").glob(WEIGHTS), *_small_files(model)]),
        "states": "prompt_embeds" if is_projected else "last_hidden_state",
    }
    return TensorCache(folder, "prompts", config)


def _small_files(model: Path) -> list[Path]:
    return [*model.glob("text_encoder/config.json"), *model.glob("tokenizer/*.txt"), *model.glob("tokenizer/*.json")]


def picture_cache(folder: Path, model: Path, size: int) -> TensorCache:
    """Moments of the pictures' latents."""
    files = [*(model / "vae").glob(WEIGHTS), model / "vae" / "config.json"]
    return TensorCache(folder, "pictures", {"vae": files_fingerprint(files), "size": size})


@torch.no_grad()
def encode_prompts(
    texts: Sequence[str],
    cache: TensorCache,
    model: Path,
    device: torch.device,
    *,
    is_projected: bool,
    batch_size: int,
    share: Share = Share(),
) -> int:
    """Caches what is missing of the texts, of the empty one and of padding; loads the text encoder only for that.

    Returns:
        How many texts were encoded.

    Raises:
        ValueError: for output that is not finite.
    """
    own = list(dict.fromkeys(["", *texts]))[share.index :: share.count]
    missing = [text for text in own if text_key(text) not in cache]
    if not missing:
        return 0
    pipeline = text_pipeline(model, device)
    missing.sort(key=len)
    for batch in tqdm(list(_batches(missing, batch_size)), desc="prompts", disable=None):
        lengths, inputs = pipeline.tokenize_prompts(batch)
        output = pipeline.text_encoder(**inputs.to(device))
        states = output.prompt_embeds if is_projected else output.last_hidden_state
        if not torch.isfinite(states).all():
            raise ValueError(
                f"The text encoder's output is not finite in {states.dtype}: its numbers overflow. Convert it to "
                "bfloat16 (viscpm-hf convert --dtype bfloat16)."
            )
        for text, length, row in zip(batch, lengths, states, strict=True):
            cache.add(text_key(text), row[:length])
        if PADDING not in cache:
            cache.add(PADDING, states[0, -1])
    cache.flush()
    return len(missing)


def text_pipeline(model: Path, device: torch.device | None = None) -> VisCPMPaintPipeline:
    """The pipeline with its tokenizer and, on a device, its text encoder; nothing else."""
    parts = dict.fromkeys(("vae", "unet", "scheduler", "text_encoder", *VisCPMPaintPipeline._optional_components))
    if device is not None:
        encoder = VisCPMPaintTextEncoder.from_pretrained(model / "text_encoder", dtype="auto")
        parts["text_encoder"] = encoder.to(device, default_dtype(device, encoder.dtype))
    return VisCPMPaintPipeline.from_pretrained(model, **parts)


@torch.no_grad()
def encode_pictures(
    dataset: CaptionDataset,
    cache: TensorCache,
    model: Path,
    size: int,
    device: torch.device,
    *,
    batch_size: int,
    share: Share = Share(),
) -> tuple[list[str | None], int]:
    """Caches what is missing of a dataset's pictures; loads the VAE only for that.

    Returns:
        The key of every row that is this process's share, None for pictures that can't be used; how many pictures
        were encoded.

    Raises:
        BadRowError: for the first picture that can't be read, if bad rows are to fail.
    """
    keys: list[str | None] = [None] * len(dataset)
    vae, waiting, count = None, {}, 0

    def encode_waiting() -> None:
        nonlocal vae
        if vae is None:
            vae = AutoencoderKL.from_pretrained(model / "vae").eval().to(device)
        pixels = VaeImageProcessor().preprocess(list(waiting.values())).to(device, vae.dtype)
        for key, moments in zip(waiting, vae.encode(pixels).latent_dist.parameters, strict=True):
            cache.add(key, moments)
        waiting.clear()

    own = range(share.index, len(dataset), share.count)
    for index in tqdm(own, desc="pictures", disable=None):
        try:
            item = dataset[index]
            key = image_key(item.image)
            if key not in cache and key not in waiting:
                waiting[key] = load_square(item.image, size)
                count += 1
            keys[index] = key
        except (ValueError, OSError) as error:
            dataset.skip(dataset.source(index), error)
        if len(waiting) == batch_size:
            encode_waiting()
    if waiting:
        encode_waiting()
    cache.flush()
    return keys, count


def image_key(image: ImageSource) -> str:
    """The content of a file, or of a picture in memory."""
    if isinstance(image, Path):
        with open(image, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    return hashlib.sha256(f"{image.mode}/{image.size}/".encode() + image.tobytes()).hexdigest()


class PromptProjection(nn.Module):
    """The part of [`VisCPMPaintTextEncoder`] behind its language model, with its names."""

    def __init__(self, hidden_size: int, projection_dim: int, eps: float):
        super().__init__()
        self.projection = nn.Linear(hidden_size, projection_dim, bias=False)
        self.layer_norm = nn.LayerNorm(projection_dim, eps=eps)

    @classmethod
    def from_text_encoder(cls, folder: Path) -> PromptProjection:
        """From a saved text encoder, in fp32, without reading the rest of it."""
        config = VisCPMPaintTextEncoder.config_class.from_pretrained(folder)
        module = cls(config.hidden_size, config.projection_dim, config.projection_layer_norm_eps)
        module.load_state_dict({name: _read(file, name) for name, file in projection_files(folder).items()})
        return module.float()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.layer_norm(self.projection(hidden_states))


def projection_files(folder: Path) -> dict[str, Path]:
    """In which file of a saved text encoder each tensor of the projection lies."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return dict.fromkeys(PROJECTION_NAMES, folder / "model.safetensors")
    files = json.loads(index.read_text("utf-8"))["weight_map"]
    return {name: folder / files[name] for name in PROJECTION_NAMES}


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _batches(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
