"""VisCPM's siblings: OmniLMM-12B, MiniCPM-V 1.0 and 2.0, VisualCLA-7B.

A vision tower and a language model of transformers with a resampler between them. An image is one or more views, and
every view becomes the same number of tokens, however large it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LogitsProcessor, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging, torch_compilable_check

from .answering import Answer, GenerateDecoding
from .chat_minicpmv import MiniCPMVChatMixin
from .compatibility import CACHE, CACHE_NAMES, WithImageOutputs, only_known_arguments, takes_cache
from .configuration_vision_resampler import MiniCPMVConfig, OmniLMMConfig, VisionResamplerConfig, VisualCLAConfig
from .decoding_presets import default_preset
from .fast_decoding import check_fast_decoding, compilation_problem, has_kernel
from .generation_images import ImageGenerationMixin, with_drawing_last
from .huge_pages import gather_weights
from .packed_linear import register_packed
from .resamplers import RESAMPLERS, ConcatenatingResampler, PerceiverResampler, sincos_position_embedding
from .row_products import use_row_products
from .sibling_towers import VISION_TOWERS


register_packed()
logger = logging.get_logger(__name__)


@dataclass
class VisionResamplerCausalLMOutputWithPast(WithImageOutputs, CausalLMOutputWithPast):
    """`image_outputs`: what [`VisionResamplerForConditionalGeneration.get_image_features`] returned; None without."""

    image_outputs: BaseModelOutputWithPooling | None = None


class ScaledEmbedding(nn.Embedding):
    """An embedding whose values are multiplied when they are looked up."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, scale: float):
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.scale = scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.scale


class WithoutPrompt(LogitsProcessor):
    """Shows another processor the generated tokens alone."""

    def __init__(self, processor: LogitsProcessor, prompt_length: int):
        self.processor = processor
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return self.processor(input_ids[:, self.prompt_length :], scores)


class VisionResamplerPreTrainedModel(PreTrainedModel):
    config: VisionResamplerConfig
    base_model_prefix = ""
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (PerceiverResampler, ConcatenatingResampler)):
            init.trunc_normal_(module.query, std=self.config.resampler_config.initializer_range)
        if isinstance(module, PerceiverResampler):
            width = module.pos_embed.shape[1]
            init.copy_(module.pos_embed, sincos_position_embedding(module.side, module.side, width))

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs):
        """As in transformers, but always with today's names, however the model was loaded."""
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


class VisionResamplerForConditionalGeneration(VisionResamplerPreTrainedModel, ImageGenerationMixin):
    """Vision tower, resampler, language model.

    `inputs_embeds` are what `get_input_embeddings()` returns, so already scaled where the configuration says so.
    """

    def __init__(self, config: VisionResamplerConfig):
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        if vision.model_type not in VISION_TOWERS:
            raise ValueError(
                f"There is no vision tower for the model type {vision.model_type!r}; known are "
                f"{', '.join(VISION_TOWERS)}."
            )
        self.vision_tower = VISION_TOWERS[vision.model_type]._from_config(vision)
        resampler = RESAMPLERS[config.resampler_config.resampler_type]
        self.resampler = resampler(config.resampler_config, vision.hidden_size, text.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(text)
        if config.text_embedding_scale != 1:
            embedding = self.language_model.get_input_embeddings()
            self.language_model.set_input_embeddings(
                ScaledEmbedding(*embedding.weight.shape, embedding.padding_idx, config.text_embedding_scale)
            )
        self._is_fast = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    @only_known_arguments
    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        image_sizes: torch.LongTensor | None = None,
        num_views: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encodes views.

        Args:
            pixel_values: `(views, 3, height, width)`, of all samples one after the other, padded on the right and at
                the bottom to the largest.
            image_sizes: `(views, 2)`, height and width of each without that padding; None if there is none.
            num_views: `(batch,)`, how many belong to each sample; not needed here.

        Returns:
            `pooler_output (views, queries, text hidden)`, what takes the placeholders' place; what the tower returned
            as `last_hidden_state` and so on, if all views have one size.
        """
        if image_sizes is None:
            sizes = [tuple(pixel_values.shape[-2:])] * pixel_values.shape[0]
        else:
            sizes = [tuple(size) for size in image_sizes.tolist()]
        if len(sizes) != pixel_values.shape[0]:
            raise ValueError(f"There are {pixel_values.shape[0]} views, but {len(sizes)} image_sizes.")
        pixel_values = pixel_values.to(self.vision_tower.dtype)
        features: list[torch.Tensor | None] = [None] * len(sizes)
        outputs = BaseModelOutputWithPooling()
        for size in dict.fromkeys(sizes):
            members = [index for index, other in enumerate(sizes) if other == size]
            views = pixel_values if len(members) == len(sizes) else pixel_values[members]
            outputs, tokens = self._encode(views[..., : size[0], : size[1]], **kwargs)
            for index, token in zip(members, tokens, strict=True):
                features[index] = token
        if len(set(sizes)) != 1:
            outputs = BaseModelOutputWithPooling()
        outputs.pooler_output = torch.stack(features)
        return outputs

    def _encode(self, views: torch.Tensor, **kwargs) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        """Views of one size: the tower's output, and `(views, queries, text hidden)`."""
        patch_size = self.config.vision_config.patch_size
        height, width = views.shape[-2:]
        views = nn.functional.pad(views, (0, -width % patch_size, 0, -height % patch_size))
        outputs = self.vision_tower(
            views, interpolate_pos_encoding=self.config.interpolate_pos_encoding, return_dict=True, **kwargs
        )
        if self.config.vision_post_norm:
            outputs.last_hidden_state = self.vision_tower.post_layernorm(outputs.last_hidden_state)
        grid = (views.shape[-2] // patch_size, views.shape[-1] // patch_size)
        return outputs, self.resampler(outputs.last_hidden_state[:, self.config.num_prefix_tokens :], *grid)

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.FloatTensor, image_features: torch.FloatTensor
    ) -> torch.Tensor:
        """Where the placeholders are, `(batch, sequence, 1)`; their number must be that of the image features."""
        if input_ids is None:
            token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        num_tokens, num_features = mask.sum(), image_features.shape[0] * image_features.shape[1]
        torch_compilable_check(
            num_tokens == num_features,
            f"Image features and image tokens do not match, tokens: {num_tokens}, features: {num_features}",
        )
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    @only_known_arguments(attention_arguments=True)
    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        num_views: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VisionResamplerCausalLMOutputWithPast:
        """Views come as of [`get_image_features`], in the order of their placeholders, or already encoded as
        `mm_encoder_outputs={"image": ...}`, which is what that returns.

        ```python
        >>> import viscpm_hf
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor

        >>> model = AutoModelForImageTextToText.from_pretrained("openbmb/MiniCPM-V-2")
        >>> processor = AutoProcessor.from_pretrained("openbmb/MiniCPM-V-2")
        >>> content = [{"type": "image", "path": "figures/vision.png"}, {"type": "text", "text": "What is this?"}]
        >>> inputs = processor.apply_chat_template(
        ...     [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        ... )
        >>> output = model.generate(**inputs, max_new_tokens=64)
        ```
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            wanted = {name: kwargs[name] for name in ("output_attentions", "output_hidden_states") if name in kwargs}
            image_outputs = self.get_image_features(pixel_values, image_sizes, num_views, return_dict=True, **wanted)
        if image_outputs is not None:
            image_features = image_outputs.pooler_output
            if not isinstance(image_features, torch.Tensor):
                image_features = torch.stack(list(image_features))
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
            labels=labels,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        return VisionResamplerCausalLMOutputWithPast(**outputs, image_outputs=image_outputs)

    def enable_fast_decoding(self) -> None:
        """See [`AnsweringMixin.enable_fast_decoding`]."""
        check_fast_decoding(self.language_model)
        self._is_fast = True

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *args, fast: bool | None = None, **kwargs):
        """As `GenerationMixin.generate`. `fast` decodes on a GPU with the language model's own static cache and
        compiled graphs, on a CPU with the products of `row_products`; if None, as `enable_fast_decoding` set it up."""
        if not (self._is_fast if fast is None else fast):
            return super().generate(inputs, *args, **kwargs)
        check_fast_decoding(self.language_model)
        if self.device.type == "cpu":
            self._use_kernel()
            return super().generate(inputs, *args, **kwargs)
        problem = compilation_problem(self, self.device)
        if problem is not None:
            logger.warning_once(f"Fast decoding goes without compilation: {problem}.")
        elif kwargs.get(CACHE) is None:
            kwargs.setdefault("cache_implementation", "static")
        return super().generate(inputs, *args, **kwargs)

    def _use_kernel(self) -> None:
        use_row_products(self.language_model)
        if not has_kernel(self.language_model):
            logger.warning_once(
                "Fast decoding has nothing to gain here: on a CPU it needs weights in float32 or bfloat16, or packed "
                "in 8 or 4 bits, and a C++ compiler (g++, clang++) on Linux."
            )
            return
        gather_weights(self, self.language_model)

    def chat_decoding(self, mode: str, options: Mapping[str, Any]) -> GenerateDecoding:
        """See [`AnsweringMixin.chat_decoding`]; the original's is the first of its presets."""
        preset = default_preset(self.config)
        usual = preset if mode == "reference" else {"max_new_tokens": preset["max_new_tokens"]}
        return GenerateDecoding({**usual, **options})

    def answers(
        self, inputs: Mapping[str, Any], decoding: GenerateDecoding, tokenizer: Any, **options
    ) -> list[Answer]:
        """See [`AnsweringMixin.answers`]. What ends an answer the tokenizer knows: original folders may have no
        `generation_config.json` that says so."""
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        return super().answers(inputs, GenerateDecoding({**ends, **decoding.options}), tokenizer, **options)

    def _get_logits_processor(self, generation_config, input_ids_seq_length=None, *args, **kwargs):
        """The originals generate from embeddings, so that no penalty of theirs knows the prompt."""
        processors = super()._get_logits_processor(generation_config, input_ids_seq_length, *args, **kwargs)
        own = kwargs.get("logits_processor") or ()  # a user's see everything
        for index, processor in enumerate(processors):
            if any(processor is other for other in own):
                continue
            if isinstance(processor, RepetitionPenaltyLogitsProcessor):
                processors[index] = RepetitionPenaltyLogitsProcessor(
                    processor.penalty, prompt_ignore_length=input_ids_seq_length
                )
            elif isinstance(processor, NoRepeatNGramLogitsProcessor):
                processors[index] = WithoutPrompt(processor, input_ids_seq_length)
        return with_drawing_last(processors, generation_config)


class OmniLMMForConditionalGeneration(VisionResamplerForConditionalGeneration):
    """OmniLMM-12B."""

    config: OmniLMMConfig


class MiniCPMVForConditionalGeneration(MiniCPMVChatMixin, VisionResamplerForConditionalGeneration):
    """MiniCPM-V 1.0 (OmniLMM-3B) and 2.0."""

    config: MiniCPMVConfig


class VisualCLAForConditionalGeneration(VisionResamplerForConditionalGeneration):
    """VisualCLA-7B."""

    config: VisualCLAConfig


__all__ = [
    "MiniCPMVForConditionalGeneration",
    "OmniLMMForConditionalGeneration",
    "VisionResamplerForConditionalGeneration",
    "VisionResamplerPreTrainedModel",
    "VisualCLAForConditionalGeneration",
]
