"""BEiT-3 as the vision tower of VisCPM-Chat: an image and a few learned queries in, one row per query out.

BEiT-3 (arXiv:2208.10442) is a *multiway* encoder with sub-layer norms: attention runs over all tokens together, while
every linear, layer norm and feed-forward exists twice and each token goes through its own expert. Muffin and VisCPM
(arXiv:2308.12038) put learned queries where BEiT-3 had text: the `image` expert serves the class token and the
patches, the `query` expert the queries, and only the query rows leave the tower.

Shapes: B images, N image tokens (class token and patches), Q queries, D = `hidden_size`. The hidden states are one
(B, N + Q, D) tensor, image tokens first; the last layer returns (B, Q, D), see [`Beit3Layer`].
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .compatibility import only_known_arguments
from .configuration_beit3 import POSITION_OFFSET, Beit3Config


class Multiway(nn.Module):
    """Two experts of one kind, one for the image rows and one for the query rows. Image rows of `None` are skipped."""

    def __init__(self, make_expert: Callable[[], nn.Module]):
        super().__init__()
        self.image = make_expert()
        self.query = make_expert()

    def forward(
        self, image_rows: torch.Tensor | None, query_rows: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        return None if image_rows is None else self.image(image_rows), self.query(query_rows)


def split_rows(hidden_states: torch.Tensor, num_image_rows: int) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(B, num_image_rows + Q, D) -> views of the image rows (`None` if there are none) and of the query rows."""
    if num_image_rows == 0:
        return None, hidden_states
    return hidden_states[:, :num_image_rows], hidden_states[:, num_image_rows:]


def join_rows(image_rows: torch.Tensor | None, query_rows: torch.Tensor) -> torch.Tensor:
    """The inverse of [`split_rows`]."""
    return query_rows if image_rows is None else torch.cat((image_rows, query_rows), dim=1)


class Beit3Embeddings(nn.Module):
    """Class token, patches and queries with their positions: (B, C, H, W) -> (B, N + Q, D)."""

    def __init__(self, config: Beit3Config):
        super().__init__()
        self.config = config
        self.grid_size = config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.query_tokens = nn.Parameter(torch.zeros(config.num_query_tokens, config.hidden_size))
        num_image_tokens = self.grid_size**2 + 1
        self.image_position_embedding = nn.Embedding(num_image_tokens + POSITION_OFFSET, config.hidden_size)
        self.query_position_embedding = nn.Embedding(config.max_query_positions, config.hidden_size)

    def _positions(self, table: nn.Embedding, length: int) -> torch.Tensor:
        # Through the module and not through its weight, so that offloading hooks bring the table in first.
        return table(torch.arange(POSITION_OFFSET, POSITION_OFFSET + length, device=self.cls_token.device))

    def interpolate_pos_encoding(self, patch_positions: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Resizes the (grid², D) patch positions bicubically, in fp32, to `height` × `width` patches."""
        grid = patch_positions.float().view(1, self.grid_size, self.grid_size, -1).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        return grid.flatten(2).squeeze(0).transpose(0, 1).to(patch_positions.dtype)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        image_size, patch_size = self.config.image_size, self.config.patch_size
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values must have the shape (batch, {self.config.num_channels}, height, width), but have "
                f"{tuple(pixel_values.shape)}."
            )
        height, width = pixel_values.shape[-2:]
        is_other_size = height != image_size or width != image_size
        if is_other_size and not interpolate_pos_encoding:
            raise ValueError(
                f"The image is {height}x{width} pixels, but the vision tower expects {image_size}x{image_size}: "
                "resize it, or pass `interpolate_pos_encoding=True`."
            )
        if height % patch_size or width % patch_size or not height or not width:
            raise ValueError(
                f"The image is {height}x{width} pixels, but both sides must be multiples of patch_size {patch_size}."
            )

        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        image_positions = self._positions(self.image_position_embedding, self.grid_size**2 + 1)
        patch_positions = image_positions[1:]
        if is_other_size:
            patch_positions = self.interpolate_pos_encoding(patch_positions, height // patch_size, width // patch_size)

        batch_size = patches.shape[0]
        cls_token = self.cls_token + image_positions[:1]
        queries = self.query_tokens + self._positions(self.query_position_embedding, self.config.num_query_tokens)
        return torch.cat(
            (cls_token.expand(batch_size, -1, -1), patches + patch_positions, queries.expand(batch_size, -1, -1)),
            dim=1,
        )


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    attn_weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value).transpose(1, 2).contiguous()
    return attn_output, attn_weights


class Beit3Attention(nn.Module):
    """Attention over image tokens and queries together, with projections per expert and a norm before the last one."""

    def __init__(self, config: Beit3Config):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False

        def linear():
            return nn.Linear(config.hidden_size, config.hidden_size)

        # Not `q_proj` and so on: by these names LoRA recipes mean the language model, and expect plain layers.
        self.q_experts = Multiway(linear)
        self.k_experts = Multiway(linear)
        self.v_experts = Multiway(linear)
        self.inner_layer_norm = Multiway(lambda: nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps))
        self.out_experts = Multiway(linear)

    def _to_heads(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.view(*hidden_states.shape[:2], -1, self.head_dim).transpose(1, 2)

    def forward(
        self, image_rows: torch.Tensor, query_rows: torch.Tensor, only_query_rows: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            image_rows (`torch.Tensor` of shape `(B, N, D)`), query_rows (`torch.Tensor` of shape `(B, Q, D)`)
            only_query_rows (`bool`): let the image rows give keys and values only, and return (B, Q, D).

        Returns:
            The (B, N + Q, D) attention output, image tokens first, and the attention weights (`None` unless eager).
        """
        key_states = self._to_heads(join_rows(*self.k_experts(image_rows, query_rows)))
        value_states = self._to_heads(join_rows(*self.v_experts(image_rows, query_rows)))
        if only_query_rows:
            image_rows = None
        query_states = self._to_heads(join_rows(*self.q_experts(image_rows, query_rows)))

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask=None,
            is_causal=self.is_causal,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
        )
        attn_output = attn_output.flatten(2)
        attn_rows = split_rows(attn_output, 0 if image_rows is None else image_rows.shape[1])
        attn_output = join_rows(*self.out_experts(*self.inner_layer_norm(*attn_rows)))
        return attn_output, attn_weights


class Beit3MLP(nn.Module):
    def __init__(self, config: Beit3Config):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.layer_norm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.fc1(hidden_states)
        # fp32, as the checkpoints were trained.
        hidden_states = self.activation_fn(hidden_states.float()).to(hidden_states.dtype)
        return self.fc2(self.layer_norm(hidden_states))


class Beit3Layer(GradientCheckpointingLayer):
    """One multiway encoder layer.

    Only query rows leave the tower, so in the last layer the image rows are needed as keys and values and nowhere
    else: with `only_query_rows` it skips the rest of the image expert and returns (B, Q, D). It has those weights all
    the same (every layer of the checkpoints does), and they get no gradient.
    """

    def __init__(self, config: Beit3Config):
        super().__init__()

        def layer_norm():
            return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

        self.self_attn_layer_norm = Multiway(layer_norm)
        self.self_attn = Beit3Attention(config)
        self.final_layer_norm = Multiway(layer_norm)
        self.mlp = Multiway(lambda: Beit3MLP(config))

    def forward(
        self, hidden_states: torch.Tensor, num_image_tokens: int, only_query_rows: bool = False
    ) -> torch.Tensor:
        rows = split_rows(hidden_states, num_image_tokens)
        attn_output, _ = self.self_attn(*self.self_attn_layer_norm(*rows), only_query_rows=only_query_rows)
        if only_query_rows:
            num_image_tokens, hidden_states = 0, rows[1]
        hidden_states = hidden_states + attn_output

        rows = self.final_layer_norm(*split_rows(hidden_states, num_image_tokens))
        return hidden_states + join_rows(*self.mlp(*rows))


class Beit3PreTrainedModel(PreTrainedModel):
    config: Beit3Config
    base_model_prefix = "beit3"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True

    _input_embed_layer = "patch_embedding"
    _no_split_modules = ["Beit3Embeddings", "Beit3Layer"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True  # neither mask nor bias
    _supports_attention_backend = True

    _can_record_outputs = {"hidden_states": Beit3Layer, "attentions": Beit3Attention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Beit3Embeddings):
            init.normal_(module.cls_token, std=self.config.initializer_range)
            init.normal_(module.query_tokens, std=self.config.initializer_range)


class Beit3Model(Beit3PreTrainedModel):
    """The BEiT-3 vision tower. It has no pooler: its output is one row per learned query."""

    def __init__(self, config: Beit3Config):
        super().__init__(config)
        self.embeddings = Beit3Embeddings(config)
        self.layers = nn.ModuleList([Beit3Layer(config) for _ in range(config.num_hidden_layers)])
        self.layer_norm = Multiway(lambda: nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps))
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def set_image_size(self, image_size: int) -> None:
        """Makes the tower one for square images of another size, in place, as fine-tuning at that size needs it.

        The positions of the patches are resized bicubically in fp32; those of the class token and the queries stay.

        Raises:
            ValueError: if `image_size` is no multiple of the patch size.
        """
        if image_size == self.config.image_size:
            return
        if image_size < 1 or image_size % self.config.patch_size:
            raise ValueError(
                f"image_size {image_size} is no multiple of the vision tower's patch_size {self.config.patch_size}."
            )
        embeddings, grid_size = self.embeddings, image_size // self.config.patch_size
        old, first_patch = embeddings.image_position_embedding, POSITION_OFFSET + 1  # after the class token's
        patches = embeddings.interpolate_pos_encoding(old.weight[first_patch:], grid_size, grid_size)
        table = torch.cat([old.weight[:first_patch], patches])
        embeddings.image_position_embedding = nn.Embedding.from_pretrained(table, freeze=not old.weight.requires_grad)
        embeddings.grid_size, self.config.image_size = grid_size, image_size

    @only_known_arguments
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalised images, see [`VisCPMImageProcessor`].
            interpolate_pos_encoding (`bool`, defaults to `False`):
                Accept images of another size than `config.image_size` and resize the patch positions to them.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`] with `last_hidden_state` of shape
            `(batch_size, num_query_tokens, hidden_size)`, the normalised query rows, and `pooler_output` `None`.
            `hidden_states` are `(batch_size, image tokens + num_query_tokens, hidden_size)`, image tokens first,
            except the last, which is `last_hidden_state`; the last of the `attentions` has only queries as rows.

        Raises:
            ValueError: if the images have another size and `interpolate_pos_encoding` is off, or if a side is no
                multiple of the patch size.
        """
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        num_image_tokens = hidden_states.shape[1] - self.config.num_query_tokens
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, num_image_tokens, i == last)
        _, last_hidden_state = self.layer_norm(None, hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=last_hidden_state)


__all__ = ["Beit3Model", "Beit3PreTrainedModel"]
