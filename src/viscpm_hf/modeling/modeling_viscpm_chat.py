"""VisCPM-Chat: images through BEiT-3 and a projector into the prompt of CPM-Bee.

Source: VisCPM (arXiv:2308.12038). The structure is LLaVA's in transformers; what CPM-Bee adds (documents, segments,
extension tokens) is explained in `document_cpm_bee`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel  # noqa: F401
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .compatibility import CACHE, WithImageOutputs, cache_of, only_known_arguments, slice_logits_to_keep, takes_cache
from .configuration_viscpm_chat import VisCPMChatConfig
from .document_call_cpm_bee import check_document_call, document_decoding
from .document_cpm_bee import EncodedDocument
from .generation_cpm_bee import CpmBeeGenerationMixin, encode_for_filling, fill_in_batches
from .image_processing_viscpm import images_in_order
from .modeling_beit3 import Beit3Model
from .modeling_cpm_bee import CpmBeeModel, CpmBeePreTrainedModel, project_to_vocabulary
from .processing_viscpm_chat import IMAGE_TOKEN, VisCPMChatProcessor
from .structure_cpm_bee import Structure, answers_alone


@dataclass
class VisCPMChatModelOutputWithPast(WithImageOutputs, BaseModelOutputWithPast):
    """`image_outputs`: what [`VisCPMChatModel.get_image_features`] returned; None without images."""

    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class VisCPMChatCausalLMOutputWithPast(WithImageOutputs, CausalLMOutputWithPast):
    """`image_outputs`: what [`VisCPMChatModel.get_image_features`] returned; None without images."""

    image_outputs: BaseModelOutputWithPooling | None = None


class VisCPMChatProjector(nn.Module):
    """`(images, queries, vision hidden)` -> `(images, queries, text hidden)`."""

    def __init__(self, config: VisCPMChatConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(image_features)))


class VisCPMChatPreTrainedModel(CpmBeePreTrainedModel):
    config: VisCPMChatConfig
    input_modalities = ("image", "text")
    _no_split_modules = ["CpmBeeDecoderLayer", "Beit3Layer"]
    _can_record_outputs = {}


class VisCPMChatModel(VisCPMChatPreTrainedModel):
    """VisCPM-Chat without its head."""

    def __init__(self, config: VisCPMChatConfig):
        super().__init__(config)
        self.vision_tower = Beit3Model(config.vision_config)
        self.multi_modal_projector = VisCPMChatProjector(config)
        self.language_model = CpmBeeModel(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> BaseModelOutputWithPooling:
        """`(images, 3, height, width)` -> the tower's output; `pooler_output (images, queries, text hidden)` is what
        takes the placeholders' place."""
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True, **kwargs)
        outputs.pooler_output = self.multi_modal_projector(outputs.last_hidden_state)
        return outputs

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.FloatTensor, image_features: torch.FloatTensor
    ) -> torch.Tensor:
        """Where the placeholders are, `(batch, sequence, 1)`; their number must be that of the image features."""
        if input_ids is None:
            token = torch.full((1, 1), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.language_model.embed_tokens(token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        num_tokens = mask.sum()
        num_features = image_features.shape[0] * image_features.shape[1]
        torch_compilable_check(
            num_tokens == num_features,
            f"Image features and image tokens do not match, tokens: {num_tokens}, features: {num_features}",
        )
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    @only_known_arguments
    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        segment_relations: torch.LongTensor | None = None,
        extension_table: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VisCPMChatModelOutputWithPast:
        """See [`CpmBeeModel`] for what describes the document. Images come as `pixel_values (images, 3, height,
        width)`, in the order of their placeholders, or already encoded as `mm_encoder_outputs={"image": ...}` (the
        output of `get_image_features`)."""
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")

        # Trainers that have a loss of their own call the model without its head.
        structure = Structure(token_type_ids, segment_ids, segment_relations)
        structure = structure.completed(self.language_model, input_ids, inputs_embeds, attention_mask, cache)
        embeddings = inputs_embeds
        if inputs_embeds is None:
            missing = {self.config.image_token_id} if pixel_values is None and image_outputs is None else set()
            self.language_model.check_ids(input_ids, extension_table, missing, structure.segment_ids)
            embeddings = self.language_model.embed_tokens(input_ids)
        inputs_embeds = self.language_model.fill_slots(embeddings, input_ids, extension_table)
        if image_outputs is None and pixel_values is not None:
            wanted = {name: kwargs[name] for name in ("output_attentions", "output_hidden_states") if name in kwargs}
            image_outputs = self.get_image_features(pixel_values, return_dict=True, **wanted)
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
            token_type_ids=structure.token_type_ids,
            segment_ids=structure.segment_ids,
            segment_relations=structure.segment_relations,
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        return VisCPMChatModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE: cache_of(outputs)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=image_outputs,
        )


class VisCPMChatForConditionalGeneration(VisCPMChatPreTrainedModel, CpmBeeGenerationMixin):
    """VisCPM-Chat. The logits' columns of slots are the row's own extension tokens, or masked."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: VisCPMChatConfig):
        super().__init__(config)
        self.model = VisCPMChatModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.set_default_generation()
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def language_model(self) -> CpmBeeModel:
        return self.model.language_model

    @property
    def query_num(self) -> int:
        """Placeholders of one image, by the original's name: `tokenizer.unk_token * model.query_num`."""
        return self.config.num_query_tokens

    def generate_documents(
        self,
        documents: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        tokenizer=None,
        processor=None,
        image: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        fast: bool | None = None,
        **generation,
    ) -> list[dict[str, Any]]:
        """`generate(documents, tokenizer, processor, image)`, the call of the Hub's own class.

        Args:
            documents: one or several, such as `{"context": "", "question": "...", "image": "<image>", "<ans>": ""}`,
                in document syntax; in place of `<image>` the original's `tokenizer.unk_token * model.query_num`.
            tokenizer: the model's `CpmBeeTokenizer`.
            processor: the model's image processor, or the `VisCPMChatProcessor` that has it.
            image: one image, a list for all documents in order, or a list of lists, one for each document.
            generation_config, fast, generation: see [`CpmBeeGenerationMixin.generate_documents`].

        Returns, raises:
            As there; a ValueError too if images and placeholders don't match in number.
        """
        documents = check_document_call(documents, tokenizer)
        decoding = document_decoding(self.generation_config, generation, generation_config)
        image_processor = getattr(processor, "image_processor", processor)
        if image is not None and not callable(image_processor):
            raise ValueError(
                "To look at images, generate needs the model's image processor: "
                "model.generate(documents, tokenizer, processor, image)."
            )
        whole = VisCPMChatProcessor(image_processor, tokenizer, num_query_tokens=self.query_num)

        def encode(document: Mapping[str, Any]) -> EncodedDocument:
            return whole.encode_prompt(whole.parse_prompt(document))

        def num_images(document: EncodedDocument) -> int:
            return sum(end - begin for begin, end in document.image_bounds) // self.query_num

        encoded = [encode_for_filling(document, encode, index) for index, document in enumerate(documents)]
        images = images_in_order(image, list(map(num_images, encoded)), image_processor, IMAGE_TOKEN)
        pixel_values = iter(image_processor(images, return_tensors="pt")["pixel_values"] if images else ())

        def fill(batch: list[EncodedDocument]) -> list[list[str | None]]:
            rows = list(islice(pixel_values, sum(map(num_images, batch))))
            return self._fill_by_reference(batch, tokenizer, decoding, fast, torch.stack(rows) if rows else None)

        return fill_in_batches(documents, encoded, fill)

    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> BaseModelOutputWithPooling:
        """See [`VisCPMChatModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values=pixel_values, **kwargs)

    def take_images_of(self, processor: Any) -> None:
        self.model.vision_tower.set_image_size(processor.image_processor.size["height"])

    def project(self, hidden_states: torch.Tensor, extension_table: torch.Tensor | None) -> torch.Tensor:
        """`(batch, sequence, hidden)` -> logits `(batch, sequence, vocab_size)`."""
        return project_to_vocabulary(hidden_states, self.lm_head, self.model.language_model, extension_table)

    @only_known_arguments
    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        segment_relations: torch.LongTensor | None = None,
        extension_table: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VisCPMChatCausalLMOutputWithPast:
        """See [`VisCPMChatModel`]. `labels (batch, sequence)`, -100 where nothing is learned, give the mean cross
        entropy over vocabulary and extension tokens; those of a prompt are left out.

        ```python
        >>> import viscpm_hf
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor

        >>> model = AutoModelForImageTextToText.from_pretrained("openbmb/VisCPM-Chat")
        >>> processor = AutoProcessor.from_pretrained("openbmb/VisCPM-Chat")
        >>> content = [{"type": "image", "path": "figures/vision.png"}, {"type": "text", "text": "What is this?"}]
        >>> inputs = processor.apply_chat_template(
        ...     [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        ... )
        >>> output = model.generate(**inputs, max_new_tokens=64)
        >>> answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        ```
        """
        structure = Structure(token_type_ids, segment_ids, segment_relations)
        if labels is not None:  # what is learned depends on it; otherwise the model without its head reads it off
            structure = structure.completed(self.language_model(), input_ids, inputs_embeds, attention_mask, cache)
        outputs: VisCPMChatModelOutputWithPast = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            token_type_ids=structure.token_type_ids,
            segment_ids=structure.segment_ids,
            segment_relations=structure.segment_relations,
            extension_table=extension_table,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.project(hidden_states, extension_table)
        loss = None
        if labels is not None:
            labels = answers_alone(labels, structure, self.config.get_text_config(decoder=True).bos_token_id)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return VisCPMChatCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: cache_of(outputs)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
        )


__all__ = ["VisCPMChatForConditionalGeneration", "VisCPMChatModel", "VisCPMChatPreTrainedModel"]
