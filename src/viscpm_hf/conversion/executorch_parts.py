"""The parts of a sibling as modules of fixed shapes, which is what ExecuTorch lowers.

Everything that depends on a view's size is computed before: the resizing of position tables isn't in Core ATen
(`aten._upsample_bicubic2d_aa`). The cache is made of buffers that the program keeps between calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..modeling.compatibility import CACHE
from ..modeling.modeling_vision_resampler import VisionResamplerForConditionalGeneration


@contextlib.contextmanager
def fixed_positions(model: VisionResamplerForConditionalGeneration, height: int, width: int) -> Iterator[None]:
    """Within it the model takes views of `height` x `width` pixels alone, and resizes no table of positions."""
    embeddings, resampler = model.vision_tower.embeddings, model.resampler
    patch_size = model.config.vision_config.patch_size
    with torch.no_grad():
        table = embeddings.interpolate_pos_encoding(None, height, width).detach()
        keys = resampler.key_positions(height // patch_size, width // patch_size).detach()
    embeddings.interpolate_pos_encoding = lambda *arguments: table
    resampler.key_positions = lambda *arguments: keys
    try:
        yield
    finally:
        del embeddings.interpolate_pos_encoding, resampler.key_positions


class VisionPart(nn.Module):
    """Tower and resampler: `(1, 3, height, width)`, normalised -> `(1, queries, text hidden)`."""

    def __init__(self, model: VisionResamplerForConditionalGeneration):
        super().__init__()
        # All of it, for its own way of encoding; export keeps the weights that are used.
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values, return_dict=True).pooler_output


class EmbeddingPart(nn.Module):
    """`(1, tokens)` -> `(1, tokens, text hidden)`, scaled as the configuration says."""

    def __init__(self, model: VisionResamplerForConditionalGeneration):
        super().__init__()
        self.embedding = model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(input_ids)


class LayerCaches:
    """What the layers of one call write to: `keys` and `values` of each, `(1, heads, context, head size)`."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], positions: torch.Tensor):
        self.keys, self.values, self.positions = keys, values, positions

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            self.keys[layer_idx].index_copy_(2, self.positions, key),
            self.values[layer_idx].index_copy_(2, self.positions, value),
        )


class LanguagePart(nn.Module):
    """The language model with its cache: `(1, tokens, text hidden)` and their `(tokens,)` places in the context -> the
    last one's logits `(1, 1, vocabulary)`. A conversation begins anew by starting at place 0."""

    def __init__(self, model: VisionResamplerForConditionalGeneration, context: int):
        super().__init__()
        self.language_model = model.language_model
        config = model.config.text_config
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.num_layers, self.context = config.num_hidden_layers, context
        for index in range(self.num_layers):
            for name in ("keys", "values"):
                cache = torch.zeros(1, config.num_key_value_heads, context, head_size)
                self.register_buffer(f"{name}_{index}", cache, persistent=False)

    def forward(self, inputs_embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # Looked up here, where export has put what it traces in place of the buffers.
        keys, values = (
            [self.get_buffer(f"{name}_{index}") for index in range(self.num_layers)] for name in ("keys", "values")
        )
        seen = torch.arange(self.context)[None, :] <= positions[:, None]
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=seen[None, None],
            position_ids=positions[None],
            **{CACHE: LayerCaches(keys, values, positions)},
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        ).logits
