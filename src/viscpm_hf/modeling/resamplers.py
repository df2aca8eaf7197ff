"""Resamplers: the image tokens of one view, however many, become a fixed number of tokens for the language model.

Both take `(views, tokens, vision hidden)` and return `(views, queries, text hidden)`.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_vision_resampler import ResamplerConfig
from .sibling_towers import resize_position_embedding


def sincos_position_embedding(height: int, width: int, hidden_size: int, device=None) -> torch.Tensor:
    """Sines and cosines of a grid, `(height * width, hidden_size)` in fp32; the first half of each row is of the
    column, the second of the row."""
    quarter = hidden_size // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32, device=device) / quarter)

    def waves(count: int) -> torch.Tensor:
        angles = torch.arange(count, dtype=torch.float32, device=device)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    columns = waves(width)[None].expand(height, -1, -1)
    rows = waves(height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


class ResamplerAttention(nn.Module):
    """Multi-head attention from `(views, queries, hidden)` to `(views, tokens, hidden)`."""

    def __init__(self, config: ResamplerConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )
        output = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out_proj(output.transpose(1, 2).flatten(2))


class PerceiverResampler(nn.Module):
    """One cross attention, positions in queries and keys; no residual and no feed-forward.

    Source: Qwen-VL (arXiv:2308.12966), with two-dimensional positions.
    """

    def __init__(self, config: ResamplerConfig, vision_hidden_size: int, text_hidden_size: int):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        side = round(config.num_query_tokens**0.5)
        if side**2 != config.num_query_tokens:
            raise ValueError(f"The queries of a perceiver form a square, but there are {config.num_query_tokens}.")
        self.side = side
        self.interpolates = config.key_positions == "interpolated"
        self.query = nn.Parameter(torch.empty(config.num_query_tokens, width))
        # Sines and cosines too, but stored: a checkpoint's are rounded to its dtype. Never trained.
        self.pos_embed = nn.Buffer(sincos_position_embedding(side, side, width).to(torch.get_default_dtype()))
        self.kv_proj = (
            nn.Identity() if vision_hidden_size == width else nn.Linear(vision_hidden_size, width, bias=False)
        )
        self.ln_q = nn.LayerNorm(width, eps=eps)
        self.ln_kv = nn.LayerNorm(width, eps=eps)
        self.attn = ResamplerAttention(config)
        self.ln_post = nn.LayerNorm(width, eps=eps)
        self.proj = nn.Linear(width, text_hidden_size, bias=False)

    def key_positions(self, height: int, width: int) -> torch.Tensor:
        """`(height * width, hidden)`."""
        if not self.interpolates:
            positions = sincos_position_embedding(height, width, self.pos_embed.shape[1], self.pos_embed.device)
            return positions.to(self.pos_embed.dtype)
        if height != width:
            raise ValueError(
                f"This checkpoint takes square images only, got {height} x {width} patches: resize them as its own "
                "image processor does."
            )
        return resize_position_embedding(self.pos_embed, height, width, antialias=False)

    def forward(self, image_tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """`height` and `width` count the patches; the tokens are row by row."""
        value = self.ln_kv(self.kv_proj(image_tokens))
        key = value + self.key_positions(height, width)
        query = (self.ln_q(self.query) + self.pos_embed).expand(value.shape[0], -1, -1)
        return self.proj(self.ln_post(self.attn(query, key, value)))


class ConcatenatingResamplerLayer(GradientCheckpointingLayer):
    """Queries attend to themselves and the image, then a feed-forward; residuals are normed after they are added."""

    def __init__(self, config: ResamplerConfig):
        super().__init__()
        self.attn = ResamplerAttention(config)
        self.attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, queries: torch.Tensor, image_tokens: torch.Tensor) -> torch.Tensor:
        seen = torch.cat([queries, image_tokens], dim=1)
        queries = self.attn_norm(queries + self.attn(queries, seen, seen))
        return self.mlp_norm(queries + self.fc2(self.act(self.fc1(queries))))


class ConcatenatingResampler(nn.Module):
    """Layers through which the queries change and the image doesn't, without positions; a linear map at the end.

    Source: VisualCLA (github.com/airaria/Visual-Chinese-LLaMA-Alpaca).
    """

    def __init__(self, config: ResamplerConfig, vision_hidden_size: int, text_hidden_size: int):
        super().__init__()
        if config.hidden_size != vision_hidden_size:
            raise ValueError(
                f"The resampler's queries have {config.hidden_size} channels and the image {vision_hidden_size}; a "
                "concatenating resampler needs the same."
            )
        self.query = nn.Parameter(torch.empty(config.num_query_tokens, config.hidden_size))
        self.layers = nn.ModuleList([ConcatenatingResamplerLayer(config) for _ in range(config.num_hidden_layers)])
        self.projection = nn.Linear(config.hidden_size, text_hidden_size)

    def forward(self, image_tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        queries = self.query.expand(image_tokens.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, image_tokens)
        return self.projection(queries)


RESAMPLERS = {"perceiver": PerceiverResampler, "concatenating": ConcatenatingResampler}

__all__ = ["RESAMPLERS", "ConcatenatingResampler", "PerceiverResampler", "sincos_position_embedding"]
