"""What is to be computed, and what that takes besides weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..checkpoints.original import CPM_BEE, PAINT
from ..modeling.answering import Decoding
from ..modeling.beam_search_cpm_bee import ReferenceDecodingConfig
from ..modeling.cache_cpm_bee import GROWTH
from .activations import peak_bytes
from .sizes import ModelSizes


# Segments of a chat prompt: root, and keys and values of image, context, question and answer.
NUM_SEGMENTS = 9
PAINT_PROMPT_LENGTH = 64
# That bitsandbytes' CPU kernels need for each value of a weight while they use it; measured with 0.50.
UNPACKED_BYTES_ON_CPU = {"int8": 10, "nf4": 4}
# Of packed weights, a value of each of many rows: in 8 bits two digits and their products, in 4 bits the products.
PACKED_ROW_BYTES = {"packed8": 28, "packed4": 8}
VAE_SCALE = 8
# Pixels of a view's sides where the tower takes any, and tokens of a prompt beside its image's.
VIEW_SIDE, TEXT_LENGTH = 448, 100


@dataclass(frozen=True)
class Work:
    """One call of a model; the defaults are the original's."""

    prompt_length: int = 164
    """Tokens of the prompt, 64 of which are an image's."""
    length: int = 512
    """Tokens of an answer."""
    beams: int = 3
    """1 for greedy decoding and sampling, which are transformers' `generate`; else the reference's search."""
    batch: int = 1
    """Questions, or prompts, at once."""
    size: int | None = None
    """Of images, in pixels; what the model was made for if None."""
    steps: int = 50
    candidates: int = 4
    """Images drawn for each prompt."""

    @classmethod
    def of(cls, sizes: ModelSizes, **given: int) -> Work:
        """Work as a model's original does it, but for what is given."""
        if sizes.kind == PAINT:
            return cls(**given)
        config, decoding = sizes.model.config, usual_decoding(sizes)
        image_length = num_views(sizes) * getattr(config, "num_query_tokens", 64)
        usual = {"length": decoding.max_new_tokens, "beams": decoding.num_beams}
        return cls(**{"prompt_length": image_length + TEXT_LENGTH, **usual, **given})

    def check(self, sizes: ModelSizes) -> None:
        """Raises `ValueError` for numbers that make no sense."""
        for name in ("prompt_length", "length", "beams", "batch", "steps", "candidates"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is a whole number of at least 1, got {value!r}.")
        if self.size is not None and (
            not isinstance(self.size, int) or self.size < VAE_SCALE or self.size % VAE_SCALE
        ):
            raise ValueError(f"size is a multiple of {VAE_SCALE} pixels, got {self.size!r}.")

    def options(self, sizes: ModelSizes) -> list[str]:
        """What differs from the commands' defaults, as their options."""
        given = []
        if sizes.kind != PAINT:
            usual = usual_decoding(sizes)
            if self.beams == 1 and isinstance(usual, ReferenceDecodingConfig):
                given += ["--mode", "generate"]
            elif self.beams != usual.num_beams:
                given += ["--num-beams", str(self.beams)]
            if self.length != usual.max_new_tokens:
                given += ["--max-new-tokens", str(self.length)]
            return given
        for name, default in (("size", None), ("steps", 50), ("candidates", 4)):
            if getattr(self, name) != default:
                given += [f"--{name}", str(getattr(self, name))]
        return given


def usual_decoding(sizes: ModelSizes) -> Decoding:
    """How a model's original answers."""
    return sizes.model.chat_decoding("reference", {})


def num_views(sizes: ModelSizes) -> int:
    """The most views of one image."""
    return getattr(sizes.model.config, "most_views", 1)


@dataclass(frozen=True)
class WorkBytes:
    kv_cache: int
    activations: int
    """The most of everything else that is alive at once, workspace for unpacked weights included."""
    stages: Mapping[str, int] = field(default_factory=dict)
    """Likewise of Paint's text encoder, UNet and VAE alone."""

    @property
    def total(self) -> int:
        return self.kv_cache + self.activations


def work_bytes(
    sizes: ModelSizes,
    work: Work,
    dtype: torch.dtype,
    quantization: str | None = None,
    diffusion_dtype: torch.dtype | None = None,
    *,
    on_gpu: bool = False,
) -> WorkBytes:
    """Bytes that a call takes besides the weights."""
    unpacked = 0
    if quantization in PACKED_ROW_BYTES:
        widest = max(max(module.weight.shape) for module in sizes.linear_layers)
        unpacked = work.batch * work.prompt_length * widest * PACKED_ROW_BYTES[quantization]
    elif quantization is not None:
        per_value = dtype.itemsize if on_gpu else UNPACKED_BYTES_ON_CPU[quantization]
        unpacked = sizes.largest_linear * per_value
    if sizes.kind != PAINT:
        language = max(
            _peak(_read_prompt, sizes, dtype, work.batch, work.prompt_length),
            # Logits as they come, in fp32, and their logarithms.
            work.batch * work.beams * sizes.text_config.vocab_size * (dtype.itemsize + 4 + 4),
        )
        vision = 0 if sizes.kind == CPM_BEE else _peak(_encode_images, sizes, dtype, work.batch)
        return WorkBytes(kv_bytes(sizes, work, dtype), max(vision, language + unpacked))
    diffusion_dtype = diffusion_dtype or dtype
    side = sizes.unet.config.sample_size if work.size is None else work.size // VAE_SCALE
    images = work.batch * work.candidates
    stages = {
        "text": _peak(_read_prompt, sizes, dtype, 2 * work.batch, PAINT_PROMPT_LENGTH) + unpacked,
        "UNet": _peak(_denoise, sizes, diffusion_dtype, 2 * images, side),
        "VAE": _peak(_decode, sizes, diffusion_dtype, images, side),
    }
    return WorkBytes(0, max(stages.values()), stages)


@lru_cache(maxsize=32)
def _peak(prepare: Callable[..., Callable[[], Any]], sizes: ModelSizes, dtype: torch.dtype, *numbers: int) -> int:
    return peak_bytes(prepare(sizes, dtype, *numbers))


# ---------------------------------------------------------------------------------------------------------- the cache


def cache_places(prompt_length: int, new_places: int, step: int) -> int:
    """Places that a `CpmBeeCache` layer has in the end: it makes room for `GROWTH` more whenever room runs out."""
    places, end = prompt_length + GROWTH, prompt_length + new_places
    while places < end:
        steps = (places - prompt_length) // step + 1
        places = prompt_length + steps * step + GROWTH
    return places


def kv_bytes(sizes: ModelSizes, work: Work, dtype: torch.dtype) -> int:
    """Keys and values of all layers at the end of the longest answer."""
    config = sizes.text_config
    if not sizes.reads_documents:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        places = min(work.prompt_length + work.length, getattr(config, "sliding_window", None) or sys.maxsize)
        places *= work.batch * work.beams
        return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * places * dtype.itemsize
    if work.beams == 1:
        # The answer's `<s>` is read with the prompt, and the last token isn't read any more.
        places = cache_places(work.prompt_length + 1, work.length - 1, 1)
    else:
        steps = ReferenceDecodingConfig(max_new_tokens=work.length).last_step + 1
        places = cache_places(work.prompt_length, steps * work.beams, work.beams)
    width = config.num_attention_heads * config.head_dim
    return 2 * config.num_attention_layers * width * work.batch * places * dtype.itemsize


# ------------------------------------------------------------------------------------- computations without any data


def _empty(*size: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


def _in(dtype: torch.dtype, model: nn.Module) -> nn.Module:
    return nn.Module.to(model, dtype)  # diffusers' own `to` has warnings for weights with values


def _encode_images(sizes: ModelSizes, dtype: torch.dtype, rows: int) -> Callable[[], Any]:
    config = sizes.model.config
    side = VIEW_SIDE if getattr(config, "interpolate_pos_encoding", False) else config.vision_config.image_size
    views = rows * max(1, num_views(sizes) - 1)  # tiles of one size together, the overview apart
    return partial(_in(dtype, sizes.model).get_image_features, _empty(views, 3, side, side, dtype=dtype))


def _read_prompt(sizes: ModelSizes, dtype: torch.dtype, rows: int, length: int) -> Callable[[], Any]:
    embeddings = _empty(rows, length, sizes.text_config.hidden_size, dtype=dtype)
    if not sizes.reads_documents:
        # A finished mask: making one looks at values. Plain causal attention needs none in the end.
        mask = _empty(rows, 1, length, length, dtype=torch.bool)
        language_model = _in(dtype, sizes.language_model)
        return partial(language_model, inputs_embeds=embeddings, attention_mask=mask, use_cache=False)
    return partial(
        _in(dtype, sizes.language_model),
        inputs_embeds=embeddings,
        attention_mask=_empty(rows, length),
        token_type_ids=_empty(rows, length),
        segment_ids=_empty(rows, length),
        segment_relations=_empty(rows, NUM_SEGMENTS, NUM_SEGMENTS),
        use_cache=False,
    )


def _denoise(sizes: ModelSizes, dtype: torch.dtype, rows: int, side: int) -> Callable[[], Any]:
    config = sizes.unet.config
    return partial(
        _in(dtype, sizes.unet),
        _empty(rows, config.in_channels, side, side, dtype=dtype),
        _empty(rows),
        encoder_hidden_states=_empty(rows, PAINT_PROMPT_LENGTH, config.cross_attention_dim, dtype=dtype),
    )


def _decode(sizes: ModelSizes, dtype: torch.dtype, rows: int, side: int) -> Callable[[], Any]:
    return partial(
        _in(dtype, sizes.vae).decode, _empty(rows, sizes.vae.config.latent_channels, side, side, dtype=dtype)
    )


@lru_cache(maxsize=4)
def flops_of_painting(sizes: ModelSizes, work: Work) -> float:
    """Operations of all denoising steps and the decoding of one call."""
    side = sizes.unet.config.sample_size if work.size is None else work.size // VAE_SCALE
    images = work.batch * work.candidates
    counts = []
    # With the prompt, and without.
    for compute in (_denoise(sizes, torch.float32, 2 * images, side), _decode(sizes, torch.float32, images, side)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            compute()
        counts.append(counter.get_total_flops())
    return counts[0] * work.steps + counts[1]
