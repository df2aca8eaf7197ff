"""What CPM-Bee adds to `generate`: extension tokens of the row only, its cache, and the reference decoding."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache

from .beam_search_cpm_bee import ReferenceBeamSearch, ReferenceDecodingConfig, SlotAnswers
from .cache_cpm_bee import CpmBeeCache
from .document_cpm_bee import EncodedDocument, fill_document


DEFAULT_MAX_NEW_TOKENS = 512


class ExtensionTokenProcessor(LogitsProcessor):
    """Leaves every row only the unknown strings of its own prompt.

    Args:
        extension_mask: `(batch, 1 + E)` as of `CpmBeeTokenizer.collate`; rows are repeated for beams and samples.
    """

    def __init__(self, extension_mask: torch.Tensor, unk_token_id: int, vocab_size: int):
        self.extension_mask = extension_mask
        self.unk_token_id = unk_token_id
        self.vocab_size = vocab_size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        mask = self.extension_mask.to(scores.device, torch.bool)
        forbidden = ~mask.repeat_interleave(scores.shape[0] // mask.shape[0], dim=0)
        scores = scores.clone()
        scores[:, self.unk_token_id].masked_fill_(forbidden[:, 0], -torch.inf)
        scores[:, self.vocab_size :].masked_fill_(forbidden[:, 1:], -torch.inf)
        return scores


class CpmBeeGenerationMixin(GenerationMixin):
    """`generate` for models that hold a CPM-Bee."""

    def language_model(self):
        """The `CpmBeeModel` within."""
        return self.model

    def set_default_generation(self) -> None:
        """Fills what a `generation_config.json` leaves open (the original has none): CPM-Bee's tokens, and the
        original's length of answers. Greedy, since streamers take one sequence."""
        config, defaults = self.config.get_text_config(decoder=True), self.generation_config
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(defaults, name) is None:
                setattr(defaults, name, getattr(config, name))
        if defaults.max_new_tokens is None and defaults.max_length is None:
            defaults.max_new_tokens = DEFAULT_MAX_NEW_TOKENS

    def adjust_generation_fn(self, *args, **kwargs):
        # An original folder may have neither of the files looked for; transformers then opens None.
        with contextlib.suppress(OSError, TypeError):
            super().adjust_generation_fn(*args, **kwargs)
        self.set_default_generation()

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args,
        extension_mask: torch.Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs,
    ):
        """As `GenerationMixin.generate`; `extension_mask (batch, 1 + E)` comes with the tokenizer's inputs."""
        if kwargs.get("prefill_chunk_size") is not None:
            raise ValueError(
                "prefill_chunk_size can't be used with CPM-Bee: its prompt attends in both directions, so it has to "
                "be read in one piece."
            )
        num_beams = kwargs.get("num_beams")
        if num_beams is not None and num_beams < 1:
            raise ValueError(f"num_beams must be a whole number of at least 1, got {num_beams!r}.")
        if extension_mask is not None:
            config = self.config.get_text_config(decoder=True)
            own_strings = ExtensionTokenProcessor(extension_mask, config.unk_token_id, config.vocab_size)
            logits_processor = LogitsProcessorList([own_strings, *(logits_processor or [])])
        return super().generate(inputs, *args, logits_processor=logits_processor, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        wants_default = generation_config.cache_implementation in (None, "dynamic")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False and wants_default:
            model_kwargs["past_key_values"] = CpmBeeCache()
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    @staticmethod
    def create_masks_for_generate(
        attention_mask: torch.Tensor | None, past_key_values: Cache, **kwargs
    ) -> torch.Tensor | None:
        """For a static cache: a mask of constant shape, since a growing one would need a new graph for every token.

        The model merges mask and bias itself; places that are still free are hidden by causality.
        """
        if attention_mask is None:
            return None
        missing = past_key_values.get_max_length() - attention_mask.shape[1]
        return torch.nn.functional.pad(attention_mask, (0, missing), value=1)

    def reference_search(
        self,
        inputs: Mapping[str, torch.Tensor],
        answer_segments: Sequence[Sequence[int]],
        decoding: ReferenceDecodingConfig | None = None,
        progress: Any = None,
    ) -> list[SlotAnswers]:
        """Decodes as the original does, token for token (see [`ReferenceBeamSearch`]).

        Args:
            inputs: the prompts' tensors, left-padded, without any answer token (`<s>` of the slot included).
            answer_segments: for every row the segment ids of the answers to fill, in order.
            decoding: its parameters; the original's defaults if None.
            progress: called with the number of decoding steps done so far, if given.
        """
        return ReferenceBeamSearch(self, decoding or ReferenceDecodingConfig())(inputs, answer_segments, progress)

    def fill(
        self,
        documents: Sequence[Mapping[str, Any]],
        tokenizer,
        *,
        mode: str = "reference",
        batch_size: int = 16,
        **generation,
    ) -> list[dict[str, Any]]:
        """Fills the answer slots of documents.

        Args:
            documents: documents such as `{"input": "...", "<ans>": {"a": "", "b": ""}}`, in document syntax.
            tokenizer: the model's `CpmBeeTokenizer`.
            mode: `"reference"`, the original's beam search, or `"generate"` for everything `generate` offers.
            batch_size: documents decoded together.
            generation: parameters of [`ReferenceDecodingConfig`], or of `generate`.

        Returns:
            Copies of the documents with the answers, in document syntax, in place; `None` for a slot that the length
            limit left unreached.

        Raises:
            ValueError: for a malformed document, one without an empty answer slot, or a bad parameter.
        """
        if isinstance(documents, Mapping):
            raise ValueError("fill takes a list of documents; put a single one into a list.")
        documents = list(documents)
        encoded = [encode_for_filling(document, tokenizer, index) for index, document in enumerate(documents)]
        if mode == "reference":
            decoding = reference_decoding(generation)
            fill = partial(self._fill_by_reference, tokenizer=tokenizer, decoding=decoding)
        elif mode == "generate":
            fill = partial(self._fill_by_generate, tokenizer=tokenizer, generation=generation)
        else:
            raise ValueError(f'mode is "reference" or "generate", got {mode!r}.')

        filled = []
        for begin in range(0, len(documents), batch_size):
            batch = encoded[begin : begin + batch_size]
            for document, source, answers in zip(documents[begin:], batch, fill(batch), strict=False):
                by_path = {slot.path: answer for slot, answer in zip(source.answer_slots, answers, strict=True)}
                filled.append(fill_document(document, by_path))
        return filled

    def _fill_by_reference(
        self, batch: list[EncodedDocument], tokenizer, decoding: ReferenceDecodingConfig
    ) -> list[list[str | None]]:
        inputs = tokenizer.collate(
            [document.prompt() for document in batch], padding_side="left", return_tensors="pt"
        ).to(self.device)
        segments = [[slot.segment_id for slot in document.answer_slots] for document in batch]
        strings = inputs.extension_strings
        results = self.reference_search(inputs, segments, decoding)
        return [
            [None if ids is None else tokenizer.decode(ids, extension_table=row) for ids in result.token_ids]
            for row, result in zip(strings, results, strict=True)
        ]

    def _fill_by_generate(
        self, batch: list[EncodedDocument], tokenizer, generation: Mapping[str, Any]
    ) -> list[list[str | None]]:
        answers: list[list[str | None]] = [[] for _ in batch]
        for slot in range(max(len(document.answer_slots) for document in batch)):
            rows = [index for index, document in enumerate(batch) if slot < len(document.answer_slots)]
            inputs = tokenizer.collate(
                [batch[row].prompt(open_slot=slot) for row in rows], padding_side="left", return_tensors="pt"
            ).to(self.device)
            sequences = self.generate(**inputs, **generation)[:, inputs["input_ids"].shape[1] :].tolist()
            table = inputs["extension_table"].tolist()
            for row, ids, extensions, strings in zip(rows, sequences, table, inputs.extension_strings, strict=True):
                if tokenizer.eos_token_id in ids:
                    ids = ids[: ids.index(tokenizer.eos_token_id)]
                answers[row].append(tokenizer.decode(ids, extension_table=strings))
                batch[row] = with_answer(batch[row], slot, ids, extensions, len(tokenizer))
        return answers


def reference_decoding(generation: Mapping[str, Any]) -> ReferenceDecodingConfig:
    """[`ReferenceDecodingConfig`] of keyword arguments.

    Raises:
        ValueError: for a name that the reference decoding doesn't know, or a value outside its range.
    """
    names = [entry.name for entry in fields(ReferenceDecodingConfig)]
    unknown = sorted(set(generation) - set(names))
    if unknown:
        raise ValueError(
            f"The reference decoding has no parameter {', '.join(unknown)}; it has {', '.join(names)}. "
            'Everything that `generate` offers works with mode="generate".'
        )
    return ReferenceDecodingConfig(**generation)


def encode_for_filling(document: Mapping[str, Any], tokenizer, index: int) -> EncodedDocument:
    """Encodes a document whose answer slots are all empty."""
    try:
        encoded = tokenizer.encode_document(document)
    except ValueError as error:
        raise ValueError(f"Document {index}: {error}") from error
    if not encoded.answer_slots:
        raise ValueError(f'Document {index} has no answer to fill: give it a key "<ans>", e.g. {{"<ans>": ""}}.')
    for slot in encoded.answer_slots:
        if slot.end - slot.begin > 1:
            raise ValueError(
                f'Document {index} has text at {" > ".join(slot.path)}, which is to be filled: leave it "" there.'
            )
    return encoded


def with_answer(
    document: EncodedDocument, slot: int, ids: Sequence[int], extension_table: Sequence[Sequence[int]], known: int
) -> EncodedDocument:
    """`document` with generated `ids` as the answer of `slot`, appended at the end."""
    pairs = [(token, 0) if token < known else tuple(extension_table[token - known]) for token in ids]
    target = document.answer_slots[slot]
    begin = len(document)
    slots = list(document.answer_slots)
    slots[slot] = replace(target, begin=begin, end=begin + 1 + len(pairs))
    first = document.input_ids[target.begin]
    return replace(
        document,
        input_ids=[*document.input_ids, first, *(base for base, _ in pairs)],
        sub_ids=[*document.sub_ids, 0, *(number for _, number in pairs)],
        token_type_ids=[*document.token_type_ids, *[1] * (1 + len(pairs))],
        segment_ids=[*document.segment_ids, *[target.segment_id] * (1 + len(pairs))],
        answer_slots=slots,
    )


__all__ = ["CpmBeeGenerationMixin", "ExtensionTokenProcessor"]
