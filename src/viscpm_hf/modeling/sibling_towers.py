"""Vision towers of VisCPM's siblings: transformers' own, with what their checkpoints need otherwise.

The checkpoints come from timm, which differs in two ways. It resizes position embeddings with antialiasing and in
fp32, also where it enlarges them (the two kernels have different coefficients, so that the result differs by 1e-2).
And EVA02-CLIP-E norms what a layer adds, not what it reads.
"""

import torch
from torch import nn
from transformers import CLIPVisionModel, PreTrainedModel, SiglipVisionModel, ViTModel
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings
from transformers.models.vit.modeling_vit import ViTEmbeddings, ViTLayer


def resize_position_embedding(table: torch.Tensor, height: int, width: int, antialias: bool = True) -> torch.Tensor:
    """The table of a square grid `(n * n, hidden)` -> `(height * width, hidden)`."""
    side = round(table.shape[0] ** 0.5)
    if (side, side) == (height, width):
        return table
    grid = table.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    if grid.device.type == "mps":  # has no kernel for it
        grid = grid.cpu()
    grid = nn.functional.interpolate(grid, (height, width), mode="bicubic", antialias=antialias)
    return grid[0].flatten(1).T.to(table.device, table.dtype)


class AntialiasedSiglipVisionEmbeddings(SiglipVisionEmbeddings):
    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        # Through the module, not its weight, so that a weight on the disk is read.
        table = self.position_embedding(self.position_ids)[0]
        return resize_position_embedding(table, height // self.patch_size, width // self.patch_size)[None]


class AntialiasedSiglipVisionModel(SiglipVisionModel):
    _no_split_modules = ["AntialiasedSiglipVisionEmbeddings", "SiglipEncoderLayer"]

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = AntialiasedSiglipVisionEmbeddings(config)
        self.post_init()


class AntialiasedViTEmbeddings(ViTEmbeddings):
    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        prefix, table = self.position_embeddings[0].split([1, self.position_embeddings.shape[1] - 1])
        table = resize_position_embedding(table, height // self.patch_size, width // self.patch_size)
        return torch.cat([prefix, table])[None]


class PostNormViTLayer(ViTLayer):
    """What attention and feed-forward return is normed and then added; keys have no bias."""

    def __init__(self, config):
        super().__init__(config)
        self.attention.k_proj = nn.Linear(config.hidden_size, self.attention.k_proj.out_features, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        attention_output, _ = self.attention(hidden_states, attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(self.layernorm_before(attention_output))
        return hidden_states + self.dropout(self.layernorm_after(self.mlp(hidden_states)))


class PostNormViTModel(ViTModel):
    """EVA02-CLIP-E without its head."""

    _no_split_modules = ["AntialiasedViTEmbeddings", "PostNormViTLayer"]
    _can_record_outputs = {**ViTModel._can_record_outputs, "hidden_states": PostNormViTLayer}

    def __init__(self, config):
        super().__init__(config, add_pooling_layer=False)
        self.embeddings = AntialiasedViTEmbeddings(config)
        self.layers = nn.ModuleList([PostNormViTLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()


# Model type of the vision configuration -> the tower.
VISION_TOWERS: dict[str, type[PreTrainedModel]] = {
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": AntialiasedSiglipVisionModel,
    "vit": PostNormViTModel,
}

__all__ = ["VISION_TOWERS", "AntialiasedSiglipVisionModel", "PostNormViTModel", "resize_position_embedding"]
