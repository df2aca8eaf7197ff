"""The four sibling systems as plain functions on the tensors of their original files, and writers of small ones.

An independent reference: formulas only, one sample at a time, no cache, nothing of `viscpm_hf` or transformers. The
checkpoints are random, under the original names and beside the original `config.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file


PATCH = 14
TOWER_HEADS = 16  # fixed by the names of the timm towers
HEAD_DIM = 128  # of the perceiver resampler

Tensors = dict[str, torch.Tensor]


# -------------------------------------------------------------------------------------------- building blocks


def linear(x: torch.Tensor, tensors: Tensors, name: str) -> torch.Tensor:
    return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def layer_norm(x: torch.Tensor, tensors: Tensors, name: str, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, causal: bool = False) -> torch.Tensor:
    """`(queries, width)`, `(keys, width)` -> `(queries, width)`."""
    q, k, v = (x.view(x.shape[0], heads, -1).transpose(0, 1) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores + torch.full(scores.shape[1:], -torch.inf).triu(1)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def sincos_positions(rows: int, columns: int, width: int) -> torch.Tensor:
    """`(rows * columns, width)`; the first half of a row is of the column."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    table = []
    for h in range(rows):
        for w in range(columns):
            table.append(torch.cat([(w * omega).sin(), (w * omega).cos(), (h * omega).sin(), (h * omega).cos()]))
    return torch.stack(table).float()


def resized_positions(table: torch.Tensor, rows: int, columns: int, antialias: bool) -> torch.Tensor:
    """A learned square table `(n * n, width)` -> `(rows * columns, width)`."""
    side = math.isqrt(table.shape[0])
    grid = table.view(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False, antialias=antialias)
    return grid[0].flatten(1).T


def padded(view: torch.Tensor) -> torch.Tensor:
    height, width = view.shape[-2:]
    return F.pad(view, (0, -width % PATCH, 0, -height % PATCH))


def perceiver(tensors: Tensors, features: torch.Tensor, grid: tuple[int, int], adaptive: bool) -> torch.Tensor:
    """The one-layer resampler: `(patches, vision width)` -> `(queries, width)`."""
    t = {name.removeprefix("resampler."): value for name, value in tensors.items() if name.startswith("resampler.")}
    width = t["query"].shape[1]
    if adaptive:
        key_positions = sincos_positions(*grid, width)
    else:
        side = math.isqrt(features.shape[0])
        key_positions = resized_positions(t["pos_embed"], side, side, antialias=False)
    kv = features @ t["kv_proj.weight"].T if "kv_proj.weight" in t else features
    kv = layer_norm(kv, t, "ln_kv", 1e-6)
    q = layer_norm(t["query"], t, "ln_q", 1e-6) + t["pos_embed"]
    w_q, w_k, w_v = t["attn.in_proj_weight"].split(width)
    b_q, b_k, b_v = t["attn.in_proj_bias"].split(width)
    o = attention(
        F.linear(q, w_q, b_q), F.linear(kv + key_positions, w_k, b_k), F.linear(kv, w_v, b_v), width // HEAD_DIM
    )
    return layer_norm(linear(o, t, "attn.out_proj"), t, "ln_post", 1e-6) @ t["proj"]


def rotated(x: torch.Tensor, heads: int, theta: float) -> torch.Tensor:
    length, width = x.shape
    x = x.view(length, heads, width // heads)
    half = x.shape[-1] // 2
    angle = torch.arange(length)[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).flatten(1)


@dataclass(frozen=True)
class LanguageModel:
    """A Llama-shaped language model; `prefix` is where it lies in the file."""

    prefix: str
    heads: int
    kv_heads: int
    eps: float
    theta: float = 10000.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0

    def embed(self, tensors: Tensors, ids: Sequence[int]) -> torch.Tensor:
        return tensors[f"{self.prefix}model.embed_tokens.weight"][torch.tensor(ids)] * self.embedding_scale

    def logits(self, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        """`(sequence, width)` -> `(sequence, vocabulary)`."""
        p = self.prefix
        layer = 0
        while f"{p}model.layers.{layer}.input_layernorm.weight" in tensors:
            name = f"{p}model.layers.{layer}."
            h = rms_norm(x, tensors[f"{name}input_layernorm.weight"], self.eps)
            q = rotated(linear(h, tensors, f"{name}self_attn.q_proj"), self.heads, self.theta)
            k = rotated(linear(h, tensors, f"{name}self_attn.k_proj"), self.kv_heads, self.theta)
            v = linear(h, tensors, f"{name}self_attn.v_proj")
            groups = self.heads // self.kv_heads
            k, v = (y.view(y.shape[0], self.kv_heads, -1).repeat_interleave(groups, dim=1).flatten(1) for y in (k, v))
            h = linear(attention(q, k, v, self.heads, causal=True), tensors, f"{name}self_attn.o_proj")
            x = x + h * self.residual_scale
            h = rms_norm(x, tensors[f"{name}post_attention_layernorm.weight"], self.eps)
            gate, up = (linear(h, tensors, f"{name}mlp.{part}_proj") for part in ("gate", "up"))
            x = x + linear(F.silu(gate) * up, tensors, f"{name}mlp.down_proj") * self.residual_scale
            layer += 1
        x = rms_norm(x, tensors[f"{p}model.norm.weight"], self.eps) / self.logits_divisor
        return linear(x, tensors, f"{p}lm_head")


# ---------------------------------------------------------------------------------------------------- systems


@dataclass(frozen=True)
class System:
    """One small random checkpoint and what it computes. Views are normalised pixels `(3, height, width)`."""

    name: str
    config: dict[str, Any]
    tensors: Tensors
    language_model: LanguageModel
    tower: Callable[[Tensors, torch.Tensor], torch.Tensor]
    resampler: Callable[[Tensors, torch.Tensor, tuple[int, int]], torch.Tensor]
    num_queries: int
    start_id: int
    end_id: int
    placeholder_id: int
    """What `viscpm_hf`'s processor puts where the image goes; the original's own is overwritten likewise."""
    extra: dict[str, Any] = field(default_factory=dict)

    def vision_features(self, view: torch.Tensor) -> torch.Tensor:
        """`(tokens, vision width)`, as the resampler takes them."""
        return self.tower(self.tensors, padded(view))

    def image_tokens(self, view: torch.Tensor) -> torch.Tensor:
        """`(queries, width)`."""
        height, width = padded(view).shape[-2:]
        return self.resampler(self.tensors, self.vision_features(view), (height // PATCH, width // PATCH))

    def embeddings(self, ids: Sequence[int], views: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """A prompt's embeddings; the n-th span between a start and an end token becomes the n-th view."""
        x = self.language_model.embed(self.tensors, ids)
        starts = [place for place, token in enumerate(ids) if token == self.start_id]
        assert len(starts) == len(views)
        for start, view in zip(starts, views, strict=True):
            assert ids[start + 1 + self.num_queries] == self.end_id
            x[start + 1 : start + 1 + self.num_queries] = self.image_tokens(view)
        return x

    @torch.no_grad()
    def logits(self, ids: Sequence[int], views: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """`(sequence, vocabulary)`."""
        return self.language_model.logits(self.tensors, self.embeddings(ids, views))

    @torch.no_grad()
    def greedy(
        self,
        ids: Sequence[int],
        views: Sequence[torch.Tensor] = (),
        length: int = 8,
        repetition_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
    ) -> list[int]:
        """The next `length` tokens; penalties look at the new tokens alone."""
        prompt = self.embeddings(ids, views)
        new: list[int] = []
        for _ in range(length):
            x = torch.cat([prompt, self.language_model.embed(self.tensors, new)]) if new else prompt
            scores = self.language_model.logits(self.tensors, x)[-1]
            for token in set(new):
                scores[token] = scores[token] * (repetition_penalty if scores[token] < 0 else 1 / repetition_penalty)
            n = no_repeat_ngram_size
            if n:
                tail = new[len(new) - n + 1 :] if n > 1 else []
                for begin in range(len(new) - n + 1):
                    if new[begin : begin + n - 1] == tail:
                        scores[new[begin + n - 1]] = -torch.inf
            new.append(int(scores.argmax()))
        return new

    def view_ids(self) -> list[int]:
        """Start, placeholders, end."""
        return [self.start_id, *[self.placeholder_id] * self.num_queries, self.end_id]

    def write(self, folder: Path) -> Path:
        """Writes the original layout (of VisualCLA: the merged one)."""
        folder.mkdir(parents=True, exist_ok=True)
        WRITERS[self.name](self, folder)
        return folder


class _Random:
    """Draws tensors in a fixed order."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 0.08, mean: float = 0.0) -> torch.Tensor:
        return mean + std * torch.randn(shape, generator=self.generator)

    def linear(self, tensors: Tensors, name: str, out: int, width: int, bias: bool = True) -> None:
        tensors[f"{name}.weight"] = self.normal(out, width, std=0.8 * width**-0.5)
        if bias:
            tensors[f"{name}.bias"] = self.normal(out)

    def norm(self, tensors: Tensors, name: str, width: int, bias: bool = True) -> None:
        tensors[f"{name}.weight"] = self.normal(width, mean=1.0)
        if bias:
            tensors[f"{name}.bias"] = self.normal(width)


def _language_tensors(
    random: _Random, prefix: str, *, vocab: int, width: int, inner: int, layers: int, kv_width: int
) -> Tensors:
    tensors = {f"{prefix}model.embed_tokens.weight": random.normal(vocab, width, std=0.3)}
    for layer in range(layers):
        name = f"{prefix}model.layers.{layer}."
        for part, out in (("q", width), ("k", kv_width), ("v", kv_width), ("o", width)):
            random.linear(tensors, f"{name}self_attn.{part}_proj", out, width, bias=False)
        for part, out, into in (("gate", inner, width), ("up", inner, width), ("down", width, inner)):
            random.linear(tensors, f"{name}mlp.{part}_proj", out, into, bias=False)
        random.norm(tensors, f"{name}input_layernorm", width, bias=False)
        random.norm(tensors, f"{name}post_attention_layernorm", width, bias=False)
    random.norm(tensors, f"{prefix}model.norm", width, bias=False)
    random.linear(tensors, f"{prefix}lm_head", vocab, width, bias=False)
    return tensors


def _timm_tensors(
    random: _Random, prefix: str, *, width: int, inner: int, layers: int, side: int, eva: bool
) -> Tensors:
    """A timm tower without its last block."""
    tensors = {f"{prefix}pos_embed": random.normal(1, side * side + eva, width, std=0.3)}
    if eva:
        tensors[f"{prefix}cls_token"] = random.normal(1, 1, width)
    tensors[f"{prefix}patch_embed.proj.weight"] = random.normal(width, 3, PATCH, PATCH, std=0.05)
    tensors[f"{prefix}patch_embed.proj.bias"] = random.normal(width)
    for layer in range(layers):
        name = f"{prefix}blocks.{layer}."
        random.linear(tensors, f"{name}attn.qkv", 3 * width, width, bias=not eva)
        if eva:
            tensors[f"{name}attn.q_bias"] = random.normal(width)
            tensors[f"{name}attn.v_bias"] = random.normal(width)
        random.linear(tensors, f"{name}attn.proj", width, width)
        random.linear(tensors, f"{name}mlp.fc1", inner, width)
        random.linear(tensors, f"{name}mlp.fc2", width, inner)
        random.norm(tensors, f"{name}norm1", width)
        random.norm(tensors, f"{name}norm2", width)
    random.norm(tensors, f"{prefix}norm", width)
    return tensors


def _perceiver_tensors(random: _Random, prefix: str, *, queries: int, width: int, vision_width: int) -> Tensors:
    side = math.isqrt(queries)
    tensors = {
        "query": random.normal(queries, width, std=0.5),
        "pos_embed": sincos_positions(side, side, width),
        "proj": random.normal(width, width, std=width**-0.5),
        "attn.in_proj_weight": random.normal(3 * width, width, std=1.5 * width**-0.5),
        "attn.in_proj_bias": random.normal(3 * width),
    }
    random.linear(tensors, "kv_proj", width, vision_width, bias=False)
    random.linear(tensors, "attn.out_proj", width, width)
    for name in ("ln_q", "ln_kv", "ln_post"):
        random.norm(tensors, name, width)
    return {prefix + name: value for name, value in tensors.items()}


# ---------------------------------------------------------------------------------------------------- OmniLMM


def _eva_tower(tensors: Tensors, view: torch.Tensor) -> torch.Tensor:
    """EVA02-CLIP: post-norm residuals; the class token is left out at the end."""
    p = "model.vision_tower."
    rows, columns = view.shape[1] // PATCH, view.shape[2] // PATCH
    x = F.conv2d(view, tensors[f"{p}patch_embed.proj.weight"], tensors[f"{p}patch_embed.proj.bias"], stride=PATCH)
    table = tensors[f"{p}pos_embed"][0]
    x = x.flatten(1).T + resized_positions(table[1:], rows, columns, antialias=True)
    x = torch.cat([tensors[f"{p}cls_token"][0] + table[:1], x])
    layer = 0
    while f"{p}blocks.{layer}.norm1.weight" in tensors:
        name = f"{p}blocks.{layer}."
        q_bias, v_bias = tensors[f"{name}attn.q_bias"], tensors[f"{name}attn.v_bias"]
        bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        q, k, v = F.linear(x, tensors[f"{name}attn.qkv.weight"], bias).chunk(3, -1)
        h = linear(attention(q, k, v, TOWER_HEADS), tensors, f"{name}attn.proj")
        x = x + layer_norm(h, tensors, f"{name}norm1", 1e-6)
        h = linear(F.gelu(linear(x, tensors, f"{name}mlp.fc1")), tensors, f"{name}mlp.fc2")
        x = x + layer_norm(h, tensors, f"{name}norm2", 1e-6)
        layer += 1
    return layer_norm(x, tensors, f"{p}norm", 1e-6)[1:]


def _within_model(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): value for name, value in tensors.items() if "resampler" in name}


def omnilmm(vocab_size: int = 400, image_size: int = 84, num_query: int = 4, seed: int = 1) -> System:
    """OmniLMM-12B; the nine added tokens are the last ids, placeholder, start and end first."""
    width, inner, layers, heads, kv_heads, vision_width = 256, 96, 2, 4, 2, 64
    random = _Random(seed)
    tensors = _language_tensors(
        random, "", vocab=vocab_size, width=width, inner=inner, layers=layers, kv_width=width // heads * kv_heads
    )
    tensors |= _timm_tensors(random, "model.vision_tower.", width=vision_width, inner=80, layers=3, side=4, eva=True)
    tensors |= _perceiver_tensors(
        random, "model.resampler.", queries=num_query, width=width, vision_width=vision_width
    )
    config = {
        "architectures": ["OmniLMMForCausalLM"],
        "model_type": "omnilmm",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": width,
        "image_size": image_size,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": 32768,
        "mm_use_im_start_end": True,
        "mm_vision_tower": "eva02_enormous_patch14_clip_224.laion2b_plus",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "num_query": num_query,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.35.0",
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": vocab_size,
    }
    first = vocab_size - 9
    return System(
        "omnilmm",
        config,
        tensors,
        LanguageModel("", heads, kv_heads, 1e-5),
        _eva_tower,
        lambda tensors, features, grid: perceiver(_within_model(tensors), features, grid, adaptive=False),
        num_query,
        start_id=first + 1,
        end_id=first + 2,
        placeholder_id=first,
    )


# ------------------------------------------------------------------------------------------------- MiniCPM-V


def _siglip_tower(tensors: Tensors, view: torch.Tensor) -> torch.Tensor:
    p = "vpm."
    rows, columns = view.shape[1] // PATCH, view.shape[2] // PATCH
    x = F.conv2d(view, tensors[f"{p}patch_embed.proj.weight"], tensors[f"{p}patch_embed.proj.bias"], stride=PATCH)
    x = x.flatten(1).T + resized_positions(tensors[f"{p}pos_embed"][0], rows, columns, antialias=True)
    layer = 0
    while f"{p}blocks.{layer}.norm1.weight" in tensors:
        name = f"{p}blocks.{layer}."
        h = layer_norm(x, tensors, f"{name}norm1", 1e-6)
        q, k, v = linear(h, tensors, f"{name}attn.qkv").chunk(3, -1)
        x = x + linear(attention(q, k, v, TOWER_HEADS), tensors, f"{name}attn.proj")
        h = layer_norm(x, tensors, f"{name}norm2", 1e-6)
        x = x + linear(F.gelu(linear(h, tensors, f"{name}mlp.fc1")), tensors, f"{name}mlp.fc2")
        layer += 1
    return layer_norm(x, tensors, f"{p}norm", 1e-6)


def minicpmv(version: str = "2.0", vocab_size: int = 400, num_query: int = 4, seed: int = 2, **config: Any) -> System:
    """MiniCPM-V `"1.0"` or `"2.0"`; `config` adds to or replaces keys of config.json."""
    width, inner, layers, heads, vision_width = 256, 96, 3, 4, 64
    random = _Random(seed)
    tensors = _language_tensors(
        random, "llm.", vocab=vocab_size, width=width, inner=inner, layers=layers, kv_width=width
    )
    tensors |= _timm_tensors(random, "vpm.", width=vision_width, inner=80, layers=2, side=5, eva=False)
    tensors |= _perceiver_tensors(random, "resampler.", queries=num_query, width=width, vision_width=vision_width)
    original = {
        "architectures": ["MiniCPMV"],
        "auto_map": {
            "AutoConfig": "configuration_minicpm.MiniCPMVConfig",
            "AutoModel": "modeling_minicpmv.MiniCPMV",
            "AutoModelForCausalLM": "modeling_minicpmv.MiniCPMV",
        },
        "model_type": "minicpmv",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dim_model_base": 64,
        "drop_vision_last_layer": True,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": width,
        "image_size": 84 if version == "1.0" else 56,
        "initializer_range": 0.1,
        "intermediate_size": inner,
        "max_position_embeddings": 2048 if version == "1.0" else 4096,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "query_num": num_query,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "scale_depth": 1.4,
        "scale_emb": 12,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.36.0",
        "use_cache": True,
        "vision_encoder": "vit_so400m_patch14_siglip_384.webli",
        "vocab_size": vocab_size,
    }
    if version == "2.0":
        original |= {
            "max_slice_nums": 9,
            "mm_use_im_start_end": True,
            "patch_size": PATCH,
            "scale_resolution": 56,
            "slice_mode": True,
        }
    return System(
        "minicpmv",
        original | config,
        tensors,
        LanguageModel(
            "llm.",
            heads,
            heads,
            1e-5,
            embedding_scale=12,
            residual_scale=1.4 / math.sqrt(layers),
            logits_divisor=width / 64,
        ),
        _siglip_tower,
        lambda tensors, features, grid: perceiver(tensors, features, grid, adaptive=version == "2.0"),
        num_query,
        start_id=101,
        end_id=102,
        placeholder_id=113,
    )


# ------------------------------------------------------------------------------------------------- VisualCLA


def _clip_tower(tensors: Tensors, view: torch.Tensor) -> torch.Tensor:
    """All tokens, the class token too, through the last norm."""
    p = "vision_model.vision_model."
    x = F.conv2d(view, tensors[f"{p}embeddings.patch_embedding.weight"], stride=PATCH).flatten(1).T
    x = torch.cat([tensors[f"{p}embeddings.class_embedding"][None], x])
    x = layer_norm(x + tensors[f"{p}embeddings.position_embedding.weight"], tensors, f"{p}pre_layrnorm", 1e-5)
    layer = 0
    while f"{p}encoder.layers.{layer}.layer_norm1.weight" in tensors:
        name = f"{p}encoder.layers.{layer}."
        h = layer_norm(x, tensors, f"{name}layer_norm1", 1e-5)
        q, k, v = (linear(h, tensors, f"{name}self_attn.{part}_proj") for part in "qkv")
        x = x + linear(attention(q, k, v, TOWER_HEADS), tensors, f"{name}self_attn.out_proj")
        h = linear(layer_norm(x, tensors, f"{name}layer_norm2", 1e-5), tensors, f"{name}mlp.fc1")
        x = x + linear(h * torch.sigmoid(1.702 * h), tensors, f"{name}mlp.fc2")
        layer += 1
    return layer_norm(x, tensors, f"{p}post_layernorm", 1e-5)


def _concatenating_resampler(heads: int) -> Callable[[Tensors, torch.Tensor, tuple[int, int]], torch.Tensor]:
    """Queries attend to themselves and the image, with residuals normed after they are added."""

    def resample(tensors: Tensors, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        p = "visual_resampler."
        x = tensors[f"{p}query_embeddding"][0]
        layer = 0
        while f"{p}encoder.layer.{layer}.output.dense.weight" in tensors:
            name = f"{p}encoder.layer.{layer}."
            seen = torch.cat([x, features])
            q = linear(x, tensors, f"{name}crossattention.self.query")
            k = linear(seen, tensors, f"{name}crossattention.self.key")
            v = linear(seen, tensors, f"{name}crossattention.self.value")
            h = linear(attention(q, k, v, heads), tensors, f"{name}crossattention.output.dense")
            x = layer_norm(x + h, tensors, f"{name}crossattention.output.LayerNorm", 1e-12)
            h = linear(F.gelu(linear(x, tensors, f"{name}intermediate.dense")), tensors, f"{name}output.dense")
            x = layer_norm(x + h, tensors, f"{name}output.LayerNorm", 1e-12)
            layer += 1
        return linear(x, tensors, "image_projection_layer")

    return resample


LORA_RANK, LORA_ALPHA = 4, 8
TEXT_TARGETS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
VISION_TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.k_proj", "self_attn.out_proj")


def visualcla(vocab_size: int = 400, seed: int = 3) -> System:
    """VisualCLA-7B; the last four ids are `<img>`, `</img>`, `<pad>`, `<img_token>`.

    The tensors are those after the merge, under the names of the whole model. `extra` has the bases, with a vocabulary
    of four ids less, and the adapter.
    """
    width, inner, layers, heads, queries = 256, 96, 2, 4, 4
    vision_width, vision_inner, vision_layers, side, resampler_layers = 64, 80, 2, 4, 2
    random = _Random(seed)
    text = _language_tensors(random, "", vocab=vocab_size - 4, width=width, inner=inner, layers=layers, kv_width=width)
    vision: Tensors = {
        "vision_model.embeddings.class_embedding": random.normal(vision_width),
        "vision_model.embeddings.patch_embedding.weight": random.normal(vision_width, 3, PATCH, PATCH, std=0.05),
        "vision_model.embeddings.position_embedding.weight": random.normal(side * side + 1, vision_width, std=0.3),
    }
    random.norm(vision, "vision_model.pre_layrnorm", vision_width)
    random.norm(vision, "vision_model.post_layernorm", vision_width)
    for layer in range(vision_layers):
        name = f"vision_model.encoder.layers.{layer}."
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            random.linear(vision, name + part, vision_width, vision_width)
        random.linear(vision, f"{name}mlp.fc1", vision_inner, vision_width)
        random.linear(vision, f"{name}mlp.fc2", vision_width, vision_inner)
        random.norm(vision, f"{name}layer_norm1", vision_width)
        random.norm(vision, f"{name}layer_norm2", vision_width)
    own: Tensors = {"visual_resampler.query_embeddding": random.normal(1, queries, vision_width, std=0.5)}
    for layer in range(resampler_layers):
        name = f"visual_resampler.encoder.layer.{layer}."
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            random.linear(own, f"{name}crossattention.{part}", vision_width, vision_width)
        random.linear(own, f"{name}intermediate.dense", vision_inner, vision_width)
        random.linear(own, f"{name}output.dense", vision_width, vision_inner)
        random.norm(own, f"{name}crossattention.output.LayerNorm", vision_width)
        random.norm(own, f"{name}output.LayerNorm", vision_width)
    random.linear(own, "visual_resampler.pooler.dense", vision_width, vision_width)
    random.linear(own, "image_projection_layer", width, vision_width)

    adapter: Tensors = {}
    merged = {f"text_model.{name}": value for name, value in text.items()}
    merged |= {f"vision_model.{name}": value for name, value in vision.items()}
    merged |= own
    for name, weight in list(merged.items()):
        targets = TEXT_TARGETS if name.startswith("text_model.") else VISION_TARGETS
        if name.startswith("visual_resampler.") or not name.removesuffix(".weight").endswith(targets):
            continue
        a = random.normal(LORA_RANK, weight.shape[1], std=0.1)
        b = random.normal(weight.shape[0], LORA_RANK, std=0.1)
        stem = "base_model.model." + name.removesuffix(".weight")
        adapter[f"{stem}.lora_A.weight"], adapter[f"{stem}.lora_B.weight"] = a, b
        merged[name] = weight + LORA_ALPHA / LORA_RANK * b @ a
    for name, std in (("text_model.model.embed_tokens.weight", 0.3), ("text_model.lm_head.weight", 0.05)):
        merged[name] = torch.cat([merged[name] + 0.01, random.normal(4, width, std=std)])
        adapter[f"base_model.model.{name}"] = merged[name]
    adapter |= {f"base_model.model.{name}": value for name, value in own.items()}

    text_config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": 2048,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": vocab_size - 4,
    }
    vision_config = {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": vision_width,
        "image_size": side * PATCH,
        "intermediate_size": vision_inner,
        "layer_norm_eps": 1e-05,
        "num_attention_heads": TOWER_HEADS,
        "num_channels": 3,
        "num_hidden_layers": vision_layers,
        "patch_size": PATCH,
        "projection_dim": 32,
        "torch_dtype": "float32",
    }
    resampler_config = {
        "hidden_size": vision_width,
        "intermediate_size": vision_inner,
        "num_attention_heads": TOWER_HEADS,
        "num_hidden_layers": resampler_layers,
        "num_query_tokens": queries,
    }
    config = {
        "architectures": ["VisualCLAModel"],
        "model_type": "visualcla",
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "text_config": text_config | {"vocab_size": vocab_size},
        "torch_dtype": "float32",
        "transformers_version": "4.30.2",
        "use_visual_resampler": True,
        "vision_config": vision_config,
        "visual_resampler_config": resampler_config,
        "vocab_size": vocab_size,
    }
    return System(
        "visualcla",
        config,
        merged,
        LanguageModel("text_model.", heads, heads, 1e-6),
        _clip_tower,
        _concatenating_resampler(TOWER_HEADS),
        queries,
        start_id=vocab_size - 4,
        end_id=vocab_size - 3,
        placeholder_id=vocab_size - 1,
        extra={
            "text": text,
            "vision": vision,
            "adapter": adapter,
            "text_config": text_config,
            "vision_config": vision_config,
        },
    )


# ---------------------------------------------------------------------------------------------------- writers


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2), "utf-8")


def write_shards(folder: Path, tensors: Tensors, stem: str, suffix: str, count: int = 2) -> None:
    """`count` files and their index."""
    names = list(tensors)
    weight_map = {}
    for number in range(count):
        part = {name: tensors[name].contiguous() for name in names[number::count]}
        file = f"{stem}-{number + 1:05d}-of-{count:05d}.{suffix}"
        weight_map |= dict.fromkeys(part, file)
        if suffix == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / f"{stem}.{suffix}.index.json", index)


def _write_omnilmm(system: System, folder: Path) -> None:
    write_json(folder / "config.json", system.config)
    write_shards(folder, system.tensors, "pytorch_model", "bin")


def _write_minicpmv(system: System, folder: Path) -> None:
    write_json(folder / "config.json", system.config)
    write_shards(folder, system.tensors, "model", "safetensors")


def _write_visualcla_merged(system: System, folder: Path) -> None:
    """As the original's merge script: three folders' worth, and a text configuration with the base's vocabulary."""
    write_json(folder / "config.json", system.config)
    text, vision, own = {}, {}, {}
    for name, value in system.tensors.items():
        if name.startswith("text_model."):
            text[name.removeprefix("text_model.")] = value
        elif name.startswith("vision_model."):
            vision[name.removeprefix("vision_model.")] = value
        else:
            own[name] = value
    positions = system.config["vision_config"]["image_size"] // PATCH
    vision["vision_model.embeddings.position_ids"] = torch.arange(positions**2 + 1)[None]
    for part, config, tensors in (
        ("text_encoder", system.extra["text_config"], text),
        ("vision_encoder", system.extra["vision_config"], vision),
    ):
        (folder / part).mkdir(exist_ok=True)
        write_json(folder / part / "config.json", config)
        if part == "text_encoder":
            write_shards(folder / part, tensors, "pytorch_model", "bin")
        else:
            torch.save(tensors, folder / part / "pytorch_model.bin")
    torch.save(own, folder / "pytorch_model.bin")


@dataclass(frozen=True)
class VisualClaRelease:
    """VisualCLA as it was released: the adapter, and the two bases that users bring."""

    adapter: Path
    text_model: Path
    vision_model: Path


def write_visualcla_release(system: System, folder: Path) -> VisualClaRelease:
    """Writes the adapter and its bases; the vision base is a whole CLIP, as on the Hub."""
    release = VisualClaRelease(folder / "adapter", folder / "chinese-alpaca", folder / "clip")
    for path in (release.adapter, release.text_model, release.vision_model):
        path.mkdir(parents=True, exist_ok=True)
    write_json(release.adapter / "config.json", system.config)
    targets = sorted({name.rpartition(".")[2] for name in (*TEXT_TARGETS, *VISION_TARGETS)})
    adapter_config = {
        "base_model_name_or_path": "",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.05,
        "modules_to_save": ["embed_tokens", "lm_head", "visual_resampler", "image_projection_layer"],
        "peft_type": "LORA",
        "r": LORA_RANK,
        "target_modules": targets,
        "task_type": None,
    }
    write_json(release.adapter / "adapter_config.json", adapter_config)
    torch.save(system.extra["adapter"], release.adapter / "adapter_model.bin")

    write_json(release.text_model / "config.json", system.extra["text_config"])
    write_shards(release.text_model, system.extra["text"], "pytorch_model", "bin")

    clip = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 32, "torch_dtype": "float32"}
    write_json(release.vision_model / "config.json", clip | {"vision_config": system.extra["vision_config"]})
    others = {
        "logit_scale": torch.tensor(2.6),
        "text_model.final_layer_norm.bias": torch.zeros(32),
        "text_model.final_layer_norm.weight": torch.ones(32),
        "visual_projection.weight": torch.zeros(32, system.config["vision_config"]["hidden_size"]),
    }
    save_file(system.extra["vision"] | others, release.vision_model / "model.safetensors", metadata={"format": "pt"})
    return release


WRITERS = {"omnilmm": _write_omnilmm, "minicpmv": _write_minicpmv, "visualcla": _write_visualcla_merged}
SYSTEMS: dict[str, Callable[[], System]] = {
    "omnilmm": omnilmm,
    "minicpmv-1.0": lambda: minicpmv("1.0"),
    "minicpmv-2.0": lambda: minicpmv("2.0"),
    "visualcla": visualcla,
}
