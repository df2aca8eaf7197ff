"""CPM-Bee: a prefix language model with a relative bias over positions and document segments.

Source: CPM-Bee-10B as used by VisCPM (arXiv:2308.12038). For documents, segments, answers and extension tokens see
`document_cpm_bee`. The original divides every product by the square root of its input width; here these factors lie in
the weights, so all layers are plain `nn.Linear` and the head is tied to the embedding.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_cpm_bee import CpmBeeCache
from .compatibility import CACHE, CACHE_NAMES, cache_of, only_known_arguments, slice_logits_to_keep, takes_cache
from .configuration_cpm_bee import CpmBeeConfig
from .fast_decoding_cpm_bee import with_graphs
from .fused_projections_cpm_bee import (
    FusibleModule,
    fuse_projections,
    is_fused,
    unfuse_projections,
    unfused_state_dict,
)
from .generation_cpm_bee import CpmBeeGenerationMixin
from .layer_steps_cpm_bee import step_layers
from .packed_linear import register_packed
from .structure_cpm_bee import Structure, answers_alone
from .token_ids_cpm_bee import padded_vocab_size
from .token_space_cpm_bee import slot_rows, write_slots


logger = logging.get_logger(__name__)

register_packed()


class CpmBeeRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.float()
        variance = (hidden_states * hidden_states).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(dtype)


class CpmBeePositionBias(nn.Module):
    """Additive attention bias: T5 buckets of distances within a segment, one bucket per relation between segments."""

    def __init__(self, config: CpmBeeConfig):
        super().__init__()
        self.num_buckets = config.position_bias_num_buckets
        self.max_distance = config.position_bias_max_distance
        num_embeddings = config.position_bias_num_buckets + config.position_bias_num_segment_buckets
        self.relative_attention_bias = nn.Embedding(num_embeddings, config.num_attention_heads)

    def distance_bucket(self, distance: torch.Tensor) -> torch.Tensor:
        """Bucket of `key position - query position`: one half for each direction, exact at first, then logarithmic."""
        half = self.num_buckets // 2
        exact = half // 2
        magnitude = distance.abs()
        logarithmic = (
            torch.log(magnitude.clamp(min=1).float() / exact) / math.log(self.max_distance / exact) * (half - exact)
        )
        bucket = torch.where(magnitude < exact, magnitude, (exact + logarithmic.long()).clamp(max=half - 1))
        return bucket + (distance > 0) * half

    def last_buckets(self, num_keys: int, device: torch.device) -> torch.Tensor:
        """Of all keys as the last of them sees them, `(1, 1, keys)`; a step would take as long to make them anew as
        for a layer."""
        known = self.__dict__.get("_last_buckets")
        if known is None or len(known) < num_keys or known.device != device:
            with torch.inference_mode(False):  # it serves training too
                distances = torch.arange(1 - 2 * max(num_keys, 512), 1, device=device)
                known = self.__dict__["_last_buckets"] = self.distance_bucket(distances)
        return known[None, None, -num_keys:]

    def forward(
        self,
        query_positions: torch.Tensor,
        key_positions: torch.Tensor,
        query_segments: torch.Tensor | None = None,
        key_segments: torch.Tensor | None = None,
        segment_relations: torch.Tensor | None = None,
        bucket: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            query_positions, key_positions: `(batch or 1, queries)` and `(batch or 1, keys)`.
            query_segments, key_segments: segment ids of the same; None where everything is one segment.
            segment_relations: `(batch, segments, segments)`.
            bucket: of all distances, `(batch or 1, queries, keys)`, if it is known.

        Returns:
            `(batch or 1, heads, queries, keys)`.
        """
        if bucket is None:
            bucket = self.distance_bucket(key_positions[:, None, :] - query_positions[:, :, None])
        if query_segments is not None:
            num_segments = segment_relations.shape[-1]
            pair = query_segments[:, :, None] * num_segments + key_segments[:, None, :]
            relation = segment_relations.flatten(1).gather(1, pair.flatten(1)).view_as(pair)
            bucket = torch.where(relation == 0, bucket, self.num_buckets - 1 + relation)
        return self.relative_attention_bias(bucket).permute(0, 3, 1, 2)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class CpmBeeAttention(FusibleModule):
    """Multi-head attention. Mask and bias arrive merged as one `position_bias`, the same for all layers."""

    _fusible_projections = ("qkv_proj", ("q_proj", "k_proj", "v_proj"))

    def __init__(self, config: CpmBeeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False  # the merged bias says who sees whom
        inner_size = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner_size, bias=False)
        self.o_proj = nn.Linear(inner_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor,
        blind_queries: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query, key, value = (states.view(hidden_shape).transpose(1, 2) for states in self.project(hidden_states))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            None,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            position_bias=position_bias,
            **kwargs,
        )
        output = output.reshape(*input_shape, -1)
        if blind_queries is not None:
            # A query that sees no key attends to nothing at all; softmax alone would give it the mean of all values.
            output = output.masked_fill(blind_queries[..., None], 0.0)
        return self.o_proj(output), weights


class CpmBeeMLP(FusibleModule):
    _fusible_projections = ("gate_up_proj", ("gate_proj", "up_proj"))

    def __init__(self, config: CpmBeeConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.project(hidden_states)
        return self.down_proj(self.act_fn(gate) * up)


class CpmBeeDecoderLayer(GradientCheckpointingLayer):
    """A block of attention and one of feed-forward, as far as pruning left them (`config.mask_modules`).

    Args:
        layer_idx: of the layer.
        cache_idx: of its keys and values; only layers with attention count.
    """

    def __init__(self, config: CpmBeeConfig, layer_idx: int, cache_idx: int):
        super().__init__()
        self.residual_scale = 1 / config.residual_divisor
        self.self_attn = self.mlp = None
        if config.has_attention(layer_idx):
            self.input_layernorm = CpmBeeRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.self_attn = CpmBeeAttention(config, cache_idx)
        if config.has_mlp(layer_idx):
            self.post_attention_layernorm = CpmBeeRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.mlp = CpmBeeMLP(config)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor,
        blind_queries: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        if self.self_attn is not None:
            attention_output, _ = self.self_attn(
                self.input_layernorm(hidden_states),
                position_bias,
                blind_queries,
                cache=cache,
                **kwargs,
            )
            hidden_states = (hidden_states + attention_output) * self.residual_scale
        if self.mlp is not None:
            mlp_output = self.mlp(self.post_attention_layernorm(hidden_states))
            hidden_states = (hidden_states + mlp_output) * self.residual_scale
        return hidden_states


class CpmBeePreTrainedModel(PreTrainedModel):
    config: CpmBeeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CpmBeeDecoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False  # its kernels take no additive bias
    _supports_attention_backend = False  # neither do paged ones
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": CpmBeeDecoderLayer, "attentions": CpmBeeAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        is_loaded = getattr(getattr(module, "weight", None), "_is_hf_initialized", False)
        super()._init_weights(module)
        if module is getattr(self, "embed_tokens", None) and not is_loaded:
            rows = slot_rows(self.config.num_words, self.config.hidden_size) * self.config.hidden_size**-0.5
            slots = module.weight[self.config.num_words :][: len(rows)]
            slots.copy_(rows[: len(slots)])  # fewer if vocab_size was set after the configuration was checked

    @property
    def device(self) -> torch.device:
        """Where inputs belong. With a `device_map` accelerate's hook knows; the first weight may be on the disk."""
        device = getattr(getattr(self, "_hf_hook", None), "execution_device", None)
        return super().device if device is None else torch.device(device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "hf_device_map" and isinstance(value, Mapping):
            check_whole_layers(self, value)
        super().__setattr__(name, value)

    # diffusers reads the signature to see which arguments there are.
    @functools.wraps(PreTrainedModel.save_pretrained, assigned=(), updated=())
    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs):
        """As in transformers, but always with today's names, however the model was loaded.

        Raises:
            ValueError: if the embedding was resized below what words, slots and placeholder take.
        """
        text = self.config.get_text_config(decoder=True)
        if text.vocab_size < (least := padded_vocab_size(text.num_words)):
            raise ValueError(
                f"The embedding has {text.vocab_size:,} rows, but {text.num_words:,} words, the slots of extension "
                f"tokens and the placeholder of images take {least:,}: call resize_token_embeddings(len(tokenizer)), "
                "which counts them all, before saving."
            )
        if is_fused(self):
            kwargs["state_dict"] = unfused_state_dict(self, kwargs.get("state_dict") or self.state_dict())
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    def fuse_projections(self) -> None:
        """See [`~fused_projections_cpm_bee.fuse_projections`]; `unfuse_projections` undoes it."""
        fuse_projections(self)

    def unfuse_projections(self) -> None:
        unfuse_projections(self)

    def get_compiled_call(self, *args, **kwargs):
        return with_graphs(self, super().get_compiled_call(*args, **kwargs))


def check_whole_layers(model: nn.Module, device_map: Mapping[str, Any]) -> None:
    """Warns of a device map that divides layers, which scripts for the Hub's own class make: it knows other names.

    Raises:
        ValueError: if parts of a layer would compute on different devices, which can't be.
    """
    layers = {name for name, module in model.named_modules() if isinstance(module, CpmBeeDecoderLayer)}
    places: dict[str, set[str]] = {}
    for name, place in device_map.items():
        parts = name.split(".")
        for layer in layers.intersection(".".join(parts[:end]) for end in range(1, len(parts))):
            places.setdefault(layer, set()).add(str(place))
    divided = {layer: found for layer, found in places.items() if len(found) > 1}
    if not divided:
        return
    layer, found = next(iter(divided.items()))
    message = (
        f"The device map divides {len(divided)} layers ({layer}: {', '.join(sorted(found))}). Layers are to "
        f'stay whole: no_split_module_classes=["{CpmBeeDecoderLayer.__name__}"], which the Hub\'s own class calls '
        "CpmBeeTransformerBlock."
    )
    # What is kept on the CPU or the disk computes on the first GPU, if there is one.
    offloaded = {"cpu", "disk"}
    main = next((place for place in map(str, device_map.values()) if place not in offloaded), "cpu")
    if any(len({main if place in offloaded else place for place in found}) > 1 for found in divided.values()):
        raise ValueError(message)
    logger.warning(message)


class CpmBeeModel(CpmBeePreTrainedModel):
    """CPM-Bee without its head. Also takes the additional arguments below.

    - `token_type_ids (batch, sequence)`: 0 = context (every token sees all context), 1 = answer (sees all context and
      the answer up to itself). Without them everything is an answer, as in a causal language model.
    - `segment_ids (batch, keys or fewer)`, `segment_relations (batch, segments, segments)`: the document's structure;
      keys beyond the given ids belong to the last one's segment. Without them everything is one segment.
    - `extension_table (batch, E, 3 + characters)`: base id and number of the token with id `num_words + e`.
    - `position_bias (batch, heads, queries, keys)`: in place of all masks and structure, the merged additive bias.
    """

    # What the kernel of `layer_steps_cpm_bee` knows to do.
    _layer_classes = (CpmBeeDecoderLayer, CpmBeeAttention, CpmBeeMLP, CpmBeeRMSNorm)

    def __init__(self, config: CpmBeeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.position_bias = CpmBeePositionBias(config)
        with_attention = [config.has_attention(index) for index in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(
            CpmBeeDecoderLayer(config, index, sum(with_attention[:index])) for index in range(config.num_hidden_layers)
        )
        self.norm = CpmBeeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def embed(self, input_ids: torch.Tensor, extension_table: torch.Tensor | None = None) -> torch.Tensor:
        """Token embeddings `(batch, sequence, hidden)`, those of the rows' extension tokens from their table."""
        return self.fill_slots(self.embed_tokens(input_ids), input_ids, extension_table)

    def check_ids(
        self,
        input_ids: torch.Tensor,
        extension_table: torch.Tensor | None,
        forbidden: Collection[int] = (),
        segment_ids: torch.Tensor | None = None,
    ) -> None:
        """Checks that every slot in a prompt stands for something, and every token is of a segment.

        Raises:
            ValueError: for a slot that the row's table doesn't have, a `forbidden` id, the placeholder of an image
                that isn't there, or fewer segment ids than tokens.
        """
        if segment_ids is not None and segment_ids.shape[1] < input_ids.shape[1]:
            raise ValueError(
                f"There are {segment_ids.shape[1]:,} segment_ids for {input_ids.shape[1]:,} input_ids: each token "
                "needs one."
            )
        is_step = input_ids.shape[1] == 1  # chosen by `generate`, which knows what a row has
        if is_step or input_ids.device.type == "meta" or torch.compiler.is_compiling():
            return
        num_slots = self.config.num_extension_slots
        slot = input_ids - self.config.num_words
        is_wrong = (slot >= 0) & (slot < num_slots)
        if extension_table is not None and extension_table.shape[1] > 0:
            owned = (extension_table[..., 1] > 0).to(slot.device).expand(slot.shape[0], -1)
            is_owned = owned.gather(1, slot.clamp(0, owned.shape[1] - 1)) & (slot < owned.shape[1])
            is_wrong &= ~is_owned
        for token in forbidden:
            is_wrong |= input_ids == token
        if is_wrong.any():
            token = int(input_ids[is_wrong][0])
            if token in forbidden:
                raise ValueError(
                    f"input_ids have {int((input_ids == token).sum())} placeholders of images (id {token}), but there "
                    "are no images: give pixel_values."
                )
            raise ValueError(
                f"input_ids have the token {token}, a slot for an extension token, but the extension_table of its row "
                "doesn't say for which one. Hand on the extension_table that came with the ids; a text in several "
                "pieces has to be tokenised as one."
            )

    def fill_slots(
        self,
        embeddings: torch.Tensor,
        input_ids: torch.Tensor | None,
        extension_table: torch.Tensor | None,
    ) -> torch.Tensor:
        """Puts the extension tokens' embeddings where their slots are. Without `input_ids`, slots are told by the rows
        that the embedding layer has for them."""
        if extension_table is None or extension_table.shape[1] == 0:
            return embeddings
        num_entries = extension_table.shape[1]
        if input_ids is None:
            is_slot, slot = self._find_slots(embeddings, num_entries)
        else:
            slot = (input_ids - self.config.num_words).to(embeddings.device)
            is_slot = (slot >= 0) & (slot < num_entries)
        slot = slot.clamp(0, num_entries - 1)[..., None].expand(*slot.shape, embeddings.shape[-1])
        extensions = self.embed_extensions(extension_table).to(embeddings)
        return torch.where(is_slot[..., None], extensions.gather(1, slot), embeddings)

    def _find_slots(self, embeddings: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which embeddings `(batch, sequence, hidden)` are looked-up rows of the first slots, and of which of them,
        each `(batch, sequence)`."""
        begin = self.config.num_words
        marks = self.embed_tokens(torch.arange(begin, begin + count, device=embeddings.device)).to(embeddings)
        is_mark = (embeddings[..., 2:] == 0).all(-1)
        same = (embeddings[..., None, :2] == marks[:, :2]).all(-1) & is_mark[..., None]
        return same.any(-1), same.int().argmax(-1)

    def embed_extensions(self, extension_table: torch.Tensor) -> torch.Tensor:
        """`(batch, E, ...)` -> rotated base embeddings `(batch, E, hidden)`."""
        embeddings = self.embed_tokens(extension_table[..., 0])
        return self.rotate(embeddings, extension_table[..., 1].to(embeddings.device))

    @staticmethod
    def rotate(embeddings: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """Rotates base embeddings `(..., hidden)` by the number `(...)` of the extension token, in fp32."""
        half = embeddings.shape[-1] // 2
        exponent = torch.arange(half, device=embeddings.device, dtype=torch.float32) / half
        angle = 16.0 * number[..., None].float() * (1.0 / 10000.0**exponent)
        cos, sin = torch.cat([angle.cos()] * 2, dim=-1), torch.cat([angle.sin()] * 2, dim=-1)
        first, second = embeddings.float().chunk(2, dim=-1)
        rotated = torch.cat([first, second], dim=-1) * cos + torch.cat([-second, first], dim=-1) * sin
        return rotated.to(embeddings.dtype)

    def visible_keys(
        self,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        query_index: torch.Tensor,
        num_keys: int,
    ) -> torch.Tensor:
        """Which keys a query sees, `(batch or 1, queries, keys)`: all context, and answers up to the query's own token
        (unless the query is context itself); never padding, and padding sees nothing."""
        num_queries, device = query_index.shape[0], query_index.device
        key_index = torch.arange(num_keys, device=device)
        visible = (key_index[None, :] <= query_index[:, None])[None]
        if token_type_ids is not None and num_queries > 1:  # a single new token sees all that is there
            is_context = (token_type_ids[:, -num_queries:] == 0).to(device)
            context_keys = is_context.new_zeros(is_context.shape[0], num_keys)
            context_keys[:, query_index] = is_context
            visible = context_keys[:, None, :] | (visible & ~is_context[:, :, None])
        if attention_mask is not None:
            # Keys after the mask's end are new tokens, or free places of a static cache that causality hides.
            not_padding = nn.functional.pad(attention_mask.bool(), (0, num_keys - attention_mask.shape[1]), value=True)
            visible = visible & not_padding[:, None, :]
            if num_queries > 1:
                visible = visible & not_padding[:, query_index, None]
        return visible

    def merge_bias(self, position_bias: torch.Tensor, visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """One additive bias `(batch, heads, queries, keys)` from the position bias and who sees whom."""
        # Half of the lowest number: adding a score must not overflow to -inf.
        hidden = torch.finfo(dtype).min / 2
        return torch.where(visible[:, None], position_bias.to(visible.device, dtype), hidden).contiguous()

    @only_known_arguments
    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        segment_relations: torch.LongTensor | None = None,
        extension_table: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        position_bias: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            self.check_ids(input_ids, extension_table, {self.config.placeholder_token_id}, segment_ids)
            inputs_embeds = self.embed(input_ids, extension_table)
        else:
            inputs_embeds = self.fill_slots(inputs_embeds, None, extension_table)
        if use_cache and cache is None:
            cache = CpmBeeCache()

        blind_queries = None
        if position_bias is None:
            position_bias, blind_queries = self.prepare_bias(
                inputs_embeds, attention_mask, token_type_ids, segment_ids, segment_relations, cache
            )

        hidden_states = self.run_layers(inputs_embeds, position_bias, blind_queries, cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE: cache})

    def run_layers(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor,
        blind_queries: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """All layers and the norm after them, `(batch, sequence, hidden)`."""
        wanted = [f"output_{name}" for name in self._can_record_outputs]
        if blind_queries is None and not any(kwargs.get(it, getattr(self.config, it, False)) for it in wanted):
            stepped = step_layers(self, hidden_states, position_bias, cache)
            if stepped is not None:
                return stepped
        for layer in self.layers:
            device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
            if device is not None:
                # accelerate's hook would move the bias for this layer alone; so it goes to every device once.
                position_bias = position_bias.to(device)
                blind_queries = None if blind_queries is None else blind_queries.to(device)
            # By the installed release's name: gradient checkpointing takes it away.
            hidden_states = layer(hidden_states, position_bias, blind_queries, **{CACHE: cache}, **kwargs)
        return self.norm(hidden_states)

    @staticmethod
    def num_before_document(
        num_queries: int, num_past: int | torch.Tensor, num_places: int, cache: Cache | None
    ) -> int:
        """Virtual tokens before the document, which prefix and prompt tuning learn; the cache remembers them.

        Raises:
            ValueError: if there are fewer tokens than places of the document.
        """
        known = getattr(cache, "num_before_document", None)
        if known is None:
            # They are in the cache already, or there are more tokens than the document has places.
            is_static = isinstance(num_past, torch.Tensor)
            is_first = num_queries >= num_places and (num_queries > 1 or num_past == 0) if not is_static else False
            known = num_past + num_queries - num_places if is_first else 0
            if cache is not None:
                cache.num_before_document = known
        return known

    def prepare_bias(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        segment_relations: torch.Tensor | None,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The merged bias of this forward pass, and which queries see no key at all (None: no such query)."""
        num_queries, device = inputs_embeds.shape[1], inputs_embeds.device
        num_past, num_keys = 0, num_queries
        if cache is not None:
            num_past = cache.get_seq_length()
            if isinstance(num_past, torch.Tensor):  # the static cache counts in place
                num_past = num_past.clone().to(device)
            num_keys, _ = cache.get_mask_sizes(num_queries, 0)
        query_index = torch.arange(num_queries, device=device) + num_past
        key_index = torch.arange(num_keys, device=device)

        query_segments = key_segments = None
        if segment_ids is not None:
            num_before = self.num_before_document(num_queries, num_past, segment_ids.shape[1], cache)
            segment_ids, segment_relations = segment_ids.to(device), segment_relations.to(device)
            if num_before:
                segment_ids, segment_relations = with_tokens_before(segment_ids, segment_relations, num_before)
            missing = num_keys - segment_ids.shape[1]
            key_segments = torch.cat([segment_ids, segment_ids[:, -1:].expand(-1, missing)], 1)
            query_segments = key_segments[:, query_index]
        is_step = num_queries == 1 and isinstance(num_past, int) and num_keys == num_past + 1
        is_real = type(inputs_embeds) is torch.Tensor  # what is looked up outlives the mode of a fake one
        is_step = is_step and is_real and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        bucket = self.position_bias.last_buckets(num_keys, device) if is_step else None
        # Only differences of positions within a segment count, so the places in the cache serve as positions.
        bias = self.position_bias(
            query_index[None], key_index[None], query_segments, key_segments, segment_relations, bucket
        )

        if attention_mask is not None and attention_mask.ndim == 4:
            is_bool = attention_mask.dtype == torch.bool
            visible = (attention_mask if is_bool else attention_mask >= 0)[:, 0].to(device)
        elif is_step and attention_mask is not None and attention_mask.shape[1] == num_keys:
            visible = attention_mask.to(device).bool()[:, None]  # and all places are the past's
        else:
            attention_mask = None if attention_mask is None else attention_mask.to(device)
            visible = self.visible_keys(attention_mask, token_type_ids, query_index, num_keys)
        blind_queries = None
        if attention_mask is not None and num_queries > 1:
            blind_queries = ~visible.any(-1)
        return self.merge_bias(bias, visible, inputs_embeds.dtype), blind_queries


class CpmBeeForCausalLM(CpmBeePreTrainedModel, CpmBeeGenerationMixin):
    """CPM-Bee with its head. The logits' columns of slots are the row's own extension tokens, or masked."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: CpmBeeConfig):
        super().__init__(config)
        self.model = CpmBeeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.set_default_generation()
        self.post_init()

    def project(self, hidden_states: torch.Tensor, extension_table: torch.Tensor | None) -> torch.Tensor:
        """`(batch, sequence, hidden)` -> logits `(batch, sequence, vocab_size)`."""
        return project_to_vocabulary(hidden_states, self.lm_head, self.model, extension_table)

    @only_known_arguments
    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        segment_relations: torch.LongTensor | None = None,
        extension_table: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """See [`CpmBeeModel`]. `labels (batch, sequence)`, -100 where nothing is learned, give the mean cross entropy
        over vocabulary and extension tokens; those of a prompt are left out."""
        structure = Structure(token_type_ids, segment_ids, segment_relations)
        structure = structure.completed(self.model, input_ids, inputs_embeds, attention_mask, cache)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=structure.token_type_ids,
            segment_ids=structure.segment_ids,
            segment_relations=structure.segment_relations,
            extension_table=extension_table,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.project(hidden_states, extension_table)
        loss = None
        if labels is not None:
            labels = answers_alone(labels, structure, self.config.bos_token_id)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: cache_of(outputs)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def with_tokens_before(
    segment_ids: torch.Tensor, segment_relations: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Segments of a document with tokens before it that are of none of them: to all of it they are what another sample
    in the context is, in both directions."""
    own = segment_relations.shape[1]
    relations = nn.functional.pad(segment_relations, (0, 1, 0, 1), value=1)
    relations[:, own, own] = 0
    return nn.functional.pad(segment_ids, (count, 0), value=own), relations


def project_to_vocabulary(
    hidden_states: torch.Tensor, lm_head: nn.Module, model: CpmBeeModel, extension_table: torch.Tensor | None
) -> torch.Tensor:
    """`(batch, sequence, hidden)` -> logits `(batch, sequence, vocab_size)`."""
    extensions = owned = None
    if extension_table is not None and extension_table.shape[1] > 0:
        extensions, owned = model.embed_extensions(extension_table), extension_table[..., 1] > 0
    return write_slots(lm_head(hidden_states), hidden_states, model.config, extensions, owned)


__all__ = ["CpmBeePreTrainedModel", "CpmBeeModel", "CpmBeeForCausalLM"]
