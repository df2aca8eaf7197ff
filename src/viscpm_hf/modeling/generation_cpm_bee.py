"""What CPM-Bee adds to `generate`: extension tokens of the row only, its cache, and the reference decoding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from .answering import Answer, Decoding, GenerateDecoding
from .beam_search_cpm_bee import ReferenceBeamSearch, ReferenceDecodingConfig, RowVocabulary, SlotAnswers
from .cache_cpm_bee import CpmBeeCache
from .compatibility import CACHE, named_cache
from .continuous_rows import RowState
from .document_call_cpm_bee import check_document_call, document_decoding, is_document_call
from .document_cpm_bee import EncodedDocument, fill_document, own_strings
from .fast_decoding import check_fast_decoding, has_kernel
from .fast_decoding_cpm_bee import FastDecoder, FastDecodingCache
from .fused_projections_cpm_bee import fusing_problem
from .generation_images import ImageGenerationMixin, with_drawing_last
from .huge_pages import gather_weights
from .layer_steps_cpm_bee import looking_once
from .row_products import use_row_products
from .sequences_cpm_bee import TokenSequences
from .token_space_cpm_bee import AllowedTokens


DEFAULT_MAX_NEW_TOKENS = 512
# Documents decoded together.
FILL_BATCH_SIZE = 16
# Of the generation_config.json of CPM-Bee's Hub repositories, what today's libraries have no word for.
HUB_GENERATION_KEYS = ("is_constraint_gen_mode", "is_contrastive_search_gen_mode", "num_beam_groups", "vocab_size")


class ExtensionTokenProcessor(LogitsProcessor):
    """Leaves every row only the unknown strings of its own prompt.

    Args:
        allowed: of the prompts; rows are repeated for beams and samples.
    """

    def __init__(self, allowed: AllowedTokens):
        self.allowed = allowed

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.allowed = self.allowed.repeated(scores.shape[0])
        return self.allowed.forbid(scores[:, None].clone(), -torch.inf)[:, 0]


class RowSampling(LogitsProcessor):
    """Draws every row's token with a generator of its own, so that a row's answer depends on no other row.

    Comes after all other processors. Leaves the drawn token alone possible, which `generate` then has to draw.

    Args:
        generators: one for each row.
    """

    comes_last = True

    def __init__(self, generators: Sequence[torch.Generator]):
        self.generators = list(generators)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        drawn = torch.full_like(scores, -torch.inf)
        for row, (generator, own) in enumerate(zip(self.generators, scores, strict=True)):
            drawn[row, torch.multinomial(own.softmax(-1), 1, generator=generator)] = 0.0
        return drawn


class CpmBeeGenerationMixin(ImageGenerationMixin):
    """`generate` for models that hold a CPM-Bee."""

    row_places = ("attention_mask", "segment_ids")
    row_tables = ("segment_relations", "extension_table")

    def language_model(self):
        """The `CpmBeeModel` within."""
        return self.model

    def set_default_generation(self) -> None:
        """Fills what a `generation_config.json` leaves open: CPM-Bee's tokens, and the original's length of answers.
        Greedy, since streamers take one sequence. Of the Hub's own files only what has a meaning stays."""
        config, defaults = self.config.get_text_config(decoder=True), self.generation_config
        if any(hasattr(defaults, name) for name in HUB_GENERATION_KEYS):
            for name in HUB_GENERATION_KEYS:
                defaults.__dict__.pop(name, None)
            defaults.pad_token_id = None  # that of cpm-bee-10b is a space
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

    def row_positions(self, state: RowState, count: int) -> dict[str, torch.Tensor]:
        """Nothing: only differences of places within a segment count."""
        return {}

    def row_vocabulary(self, state: RowState) -> RowVocabulary:
        if state.kept is None:
            state.kept = RowVocabulary(self, state.tables["extension_table"])
        return state.kept

    def row_logits(self, state: RowState, logits: torch.Tensor) -> torch.Tensor:
        return self.row_vocabulary(state).forbid(logits[:, None])[:, 0]

    @torch.no_grad()
    def step_rows(self, state: RowState, tokens: Sequence[int]) -> torch.Tensor:
        """See [`ContinuousRowsMixin.step_rows`]. Nothing is looked up in the tables at each step, or checked: it would
        take a twentieth of a small model's time."""
        state.grow()
        model, vocabulary, segments = self.language_model(), self.row_vocabulary(state), state.places["segment_ids"]
        embeddings = vocabulary.embed(torch.tensor(tokens, device=segments.device)[:, None])
        places = torch.arange(segments.shape[1], device=segments.device)[None]
        bias = model.position_bias(
            places[:, -1:], places, segments[:, -1:], segments, state.tables["segment_relations"]
        )
        bias = model.merge_bias(bias, state.visible[:, None], embeddings.dtype)
        outputs = model(inputs_embeds=embeddings, position_bias=bias, cache=state.cache, use_cache=True)
        return vocabulary.forbid(vocabulary.logits(outputs.last_hidden_state))[:, 0]

    @property
    def fast_decoder(self) -> FastDecoder:
        """The graphs of this model; with `fast_decoder.enabled` they decode whatever doesn't say `fast=False`."""
        return self.__dict__.setdefault("_fast_decoder", FastDecoder())

    def _decodes_fast(self, fast: bool | None) -> bool:
        """Whether graphs decode."""
        # Not from the beginning: bitsandbytes quantises what is an `nn.Linear` to the letter.
        parts = self.language_model(), self.lm_head
        use_row_products(*parts)
        if not (fast or (fast is None and self.fast_decoder.enabled)):
            return False
        check_fast_decoding(*parts)
        if not has_kernel(*parts):
            return True
        # Beside the kernels that take ordinary steps graphs gain nothing.
        gather_weights(self, *parts)
        return False

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args,
        logits_processor: LogitsProcessorList | None = None,
        fast: bool | None = None,
        **kwargs,
    ):
        """As `GenerationMixin.generate`. `fast` decodes with [`FastDecoder`]'s graphs, greedily or by sampling (on a
        CPU whose kernels take the weights, in ordinary steps with weights in huge pages); if None, as
        `fast_decoder.enabled` says.

        Given documents and their tokenizer, it fills them as the Hub's own class does: see [`generate_documents`]."""
        documents = kwargs.pop("data_list", inputs)
        if is_document_call(documents):
            given = {"logits_processor": logits_processor, "fast": fast}
            return self.generate_documents(documents, *args, **kwargs, **given)
        if kwargs.get("prefill_chunk_size") is not None:
            raise ValueError(
                "prefill_chunk_size can't be used with CPM-Bee: its prompt attends in both directions, so it has to "
                "be read in one piece."
            )
        num_beams = kwargs.get("num_beams")
        if num_beams is not None and num_beams < 1:
            raise ValueError(f"num_beams must be a whole number of at least 1, got {num_beams!r}.")
        allowed = AllowedTokens(self.config.get_text_config(decoder=True), kwargs.get("extension_table"))
        logits_processor = LogitsProcessorList([ExtensionTokenProcessor(allowed), *(logits_processor or [])])
        kwargs = named_cache(kwargs)
        ids = kwargs.get("input_ids", inputs)
        check_earlier_cache(kwargs.get(CACHE), ids, kwargs.get("segment_ids"))
        kwargs["logits_processor"] = logits_processor
        with telling_strings(kwargs.get("streamer"), kwargs.get("extension_table")), looking_once():
            if not self._decodes_fast(fast):
                outputs = super().generate(inputs, *args, **kwargs)
            elif kwargs.get(CACHE) is not None:
                raise ValueError(f"Fast decoding has a cache of its own: leave out {CACHE}, or say fast=False.")
            else:
                with self.fast_decoder.lock:
                    kwargs[CACHE] = FastDecodingCache(self.fast_decoder)
                    outputs = super().generate(inputs, *args, **kwargs)
                if not isinstance(outputs, torch.Tensor):
                    setattr(outputs, CACHE, None)  # it holds the prompt alone
        return with_strings(outputs, kwargs.get("extension_table"), 0 if ids is None else ids.shape[1])

    def _prepare_generation_config(self, generation_config, *args, **kwargs):
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)
        # `max_new_tokens` as the model's default is not to win against a `max_length` that was asked for.
        names = ("max_length", "max_new_tokens")
        length, new = (kwargs.get(name) or getattr(generation_config, name, None) for name in names)
        if length is not None and new is None:
            prepared.max_new_tokens = None
        return prepared, model_kwargs

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        table = (kwargs.get("model_kwargs") or {}).get("extension_table")
        for processor in processors:
            if table is not None and isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                # The half without a prompt has to know the tokens that the other half answers with.
                processor.model = partial(processor.model, extension_table=table)
        return with_drawing_last(processors, args[0] if args else kwargs["generation_config"])

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        if isinstance(model_kwargs.get(CACHE), FastDecodingCache):
            check_fast_generation(generation_config, generation_mode)
        wants_default = generation_config.cache_implementation in (None, "dynamic")
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False and wants_default:
            model_kwargs[CACHE] = CpmBeeCache()
            return
        is_given = model_kwargs.get(CACHE) is not None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        if not is_given and model_kwargs.get(CACHE) is not None:
            # The library makes an entry for every layer, but pruned ones have no keys and values.
            del model_kwargs[CACHE].layers[self.language_model().config.num_attention_layers :]

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        if isinstance(model_kwargs.get(CACHE), FastDecodingCache):
            return True
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor | None:
        """For a static cache: a mask of constant shape, since a growing one would need a new graph for every token.

        The model merges mask and bias itself; places that are still free are hidden by causality.
        """
        if attention_mask is None:
            return None
        missing = kwargs[CACHE].get_max_length() - attention_mask.shape[1]
        return torch.nn.functional.pad(attention_mask, (0, missing), value=1)

    def generate_documents(
        self,
        documents: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        tokenizer=None,
        generation_config: GenerationConfig | None = None,
        *,
        fast: bool | None = None,
        **generation,
    ) -> list[dict[str, Any]]:
        """`generate(documents, tokenizer)`, the call of the Hub's own class.

        Args:
            documents: one or several, such as `{"input": "...", "<ans>": ""}`, in document syntax; answers may be
                nested, and other keys are context.
            tokenizer: the model's `CpmBeeTokenizer`.
            generation_config: in place of the model's.
            fast: whether to decode with [`FastDecoder`]'s graphs; if None, as `fast_decoder.enabled` says.
            generation: `num_beams` (that of the generation configuration, or 3), `max_new_tokens` or `max_length` (of
                the answer), `min_new_tokens` or `min_length` (likewise), `repetition_penalty` (on what is generated),
                `length_penalty`, `temperature`.

        Returns:
            A list of copies of the documents with the answers, in document syntax, in place; `None` for a slot that
            the length limit left unreached.

        Raises:
            ValueError: for a malformed document, one without an empty answer slot, or a bad parameter.
        """
        documents = check_document_call(documents, tokenizer)
        decoding = document_decoding(self.generation_config, generation, generation_config)
        encoded = [
            encode_for_filling(document, tokenizer.encode_document, index) for index, document in enumerate(documents)
        ]
        fill = partial(self._fill_by_reference, tokenizer=tokenizer, decoding=decoding, fast=fast)
        return fill_in_batches(documents, encoded, fill)

    def enable_fast_decoding(self) -> None:
        """See [`AnsweringMixin.enable_fast_decoding`]; where graphs are compiled, projections of the same input are
        fused if the weights are plain."""
        check_fast_decoding(self.language_model(), self.lm_head)
        use_row_products(self.language_model(), self.lm_head)
        if not has_kernel(self.language_model(), self.lm_head) and fusing_problem(self) is None:
            self.fuse_projections()
        self.fast_decoder.enabled = True

    def chat_decoding(self, mode: str, options: Mapping[str, Any]) -> Decoding:
        """See [`AnsweringMixin.chat_decoding`]; the original's is [`ReferenceDecodingConfig`]'s search."""
        if mode == "reference":
            return reference_decoding(options)
        return GenerateDecoding(answer_generation(self.generation_config, options))

    def answers(
        self,
        inputs: Mapping[str, Any],
        decoding: Decoding,
        tokenizer: Any,
        *,
        progress: Callable[[int], None] | None = None,
        fast: bool | None = None,
        **options: Any,
    ) -> list[Answer]:
        """See [`AnsweringMixin.answers`]."""
        if not isinstance(decoding, ReferenceDecodingConfig):
            return super().answers(inputs, decoding, tokenizer, progress=progress, fast=fast, **options)
        # The search reads the answer's `<s>`, the last token, itself.
        of_places = ("input_ids", "attention_mask", "token_type_ids", "segment_ids")
        prompts = {name: value[:, :-1] if name in of_places else value for name, value in inputs.items()}
        segments = inputs["segment_ids"][:, -1:].tolist()
        return [
            Answer(found.token_ids[0], found.num_tokens > decoding.last_step)
            for found in self.reference_search(prompts, segments, decoding, progress, fast)
        ]

    def reference_search(
        self,
        inputs: Mapping[str, torch.Tensor],
        answer_segments: Sequence[Sequence[int]],
        decoding: ReferenceDecodingConfig | None = None,
        progress: Any = None,
        fast: bool | None = None,
    ) -> list[SlotAnswers]:
        """Decodes as the original does, token for token (see [`ReferenceBeamSearch`]).

        Args:
            inputs: the prompts' tensors, left-padded, without any answer token (`<s>` of the slot included).
            answer_segments: for every row the segment ids of the answers to fill, in order.
            decoding: its parameters; the original's defaults if None.
            progress: called with the number of decoding steps done so far, if given.
            fast: whether to decode with [`FastDecoder`]'s graphs; if None, as `fast_decoder.enabled` says.
        """
        search = ReferenceBeamSearch(self, decoding or ReferenceDecodingConfig())
        if not self._decodes_fast(fast):
            with looking_once():
                return search(inputs, answer_segments, progress)
        with self.fast_decoder.lock:
            return search(inputs, answer_segments, progress, self.fast_decoder)

    def fill(
        self,
        documents: Sequence[Mapping[str, Any]],
        tokenizer,
        *,
        mode: str = "reference",
        batch_size: int = FILL_BATCH_SIZE,
        fast: bool | None = None,
        **generation,
    ) -> list[dict[str, Any]]:
        """Fills the answer slots of documents.

        Args:
            documents: documents such as `{"input": "...", "<ans>": {"a": "", "b": ""}}`, in document syntax.
            tokenizer: the model's `CpmBeeTokenizer`.
            mode: `"reference"`, the original's beam search, or `"generate"` for everything `generate` offers.
            batch_size: documents decoded together.
            fast: whether to decode with [`FastDecoder`]'s graphs; if None, as `fast_decoder.enabled` says.
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
        encoded = [
            encode_for_filling(document, tokenizer.encode_document, index) for index, document in enumerate(documents)
        ]
        if mode == "reference":
            decoding = reference_decoding(generation)
            fill = partial(self._fill_by_reference, tokenizer=tokenizer, decoding=decoding, fast=fast)
        elif mode == "generate":
            fill = partial(self._fill_by_generate, tokenizer=tokenizer, generation={**generation, "fast": fast})
        else:
            raise ValueError(f'mode is "reference" or "generate", got {mode!r}.')
        return fill_in_batches(documents, encoded, fill, batch_size)

    def _fill_by_reference(
        self,
        batch: list[EncodedDocument],
        tokenizer,
        decoding: ReferenceDecodingConfig,
        fast: bool | None,
        pixel_values: torch.Tensor | None = None,
    ) -> list[list[str | None]]:
        inputs = tokenizer.collate(
            [document.prompt() for document in batch], padding_side="left", return_tensors="pt"
        ).to(self.device)
        segments = [[slot.segment_id for slot in document.answer_slots] for document in batch]
        strings = inputs.extension_strings
        if pixel_values is not None:
            inputs["pixel_values"] = pixel_values.to(self.device)
        results = self.reference_search(inputs, segments, decoding, fast=fast)
        return [
            [None if ids is None else tokenizer.decode(ids, extension_table=row) for ids in result.token_ids]
            for row, result in zip(strings, results, strict=True)
        ]

    def _fill_by_generate(
        self, batch: list[EncodedDocument], tokenizer, generation: Mapping[str, Any]
    ) -> list[list[str | None]]:
        answers: list[list[str | None]] = [[] for _ in batch]
        generation = answer_generation(self.generation_config, generation)
        for slot in range(max(len(document.answer_slots) for document in batch)):
            rows = [index for index, document in enumerate(batch) if slot < len(document.answer_slots)]
            inputs = tokenizer.collate(
                [batch[row].prompt(open_slot=slot) for row in rows], padding_side="left", return_tensors="pt"
            ).to(self.device)
            sequences = self.generate(**inputs, **generation)[:, inputs["input_ids"].shape[1] :].tolist()
            for row, ids, strings in zip(rows, sequences, inputs.extension_strings, strict=True):
                if tokenizer.eos_token_id in ids:
                    ids = ids[: ids.index(tokenizer.eos_token_id)]
                answers[row].append(tokenizer.decode(ids, extension_table=strings))
                batch[row] = with_answer(batch[row], slot, ids, tokenizer.num_words)
        return answers


def check_earlier_cache(cache: Any, input_ids: torch.Tensor | None, segment_ids: torch.Tensor | None) -> None:
    """Raises a ValueError for the cache of an earlier turn; one of the same prompt and answer is gone on with."""
    known = 0 if cache is None or segment_ids is None else int(cache.get_seq_length())
    num_ids, num_prompt = (0 if tensor is None else tensor.shape[1] for tensor in (input_ids, segment_ids))
    if known and (num_ids <= num_prompt or known < num_prompt):
        raise ValueError(
            f"{CACHE} holds {known} tokens of an earlier turn, which CPM-Bee can't go on with: its prompt attends in "
            "both directions, so all of it changes with every word that is added. Leave it out; the conversation is "
            "read anew."
        )


@contextlib.contextmanager
def telling_strings(streamer: Any, extension_table: torch.Tensor | None) -> Iterator[None]:
    """Lets a streamer of transformers decode the prompt's extension tokens for as long as it is needed."""
    decode_kwargs = getattr(streamer, "decode_kwargs", None)
    if extension_table is None or not isinstance(decode_kwargs, dict) or "extension_table" in decode_kwargs:
        yield
        return
    decode_kwargs["extension_table"] = own_strings(extension_table)[0]
    try:
        yield
    finally:
        del decode_kwargs["extension_table"]


def with_strings(outputs: Any, extension_table: torch.Tensor | None, prompt_length: int) -> Any:
    """What `generate` returned, its sequences as [`TokenSequences`]."""
    if extension_table is None:
        return outputs
    if isinstance(outputs, torch.Tensor):
        return TokenSequences.of(outputs, extension_table, prompt_length)
    outputs.sequences = TokenSequences.of(outputs.sequences, extension_table, prompt_length)
    return outputs


def check_fast_generation(generation_config, generation_mode: GenerationMode) -> None:
    """Raises a ValueError for what the graphs of [`FastDecoder`] don't do."""
    if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            "Fast decoding is for greedy decoding, sampling and the reference search, not for "
            f"{generation_mode.value}: say fast=False."
        )
    for name in ("output_attentions", "output_hidden_states", "cache_implementation"):
        if getattr(generation_config, name):
            raise ValueError(f"Fast decoding can't be combined with {name}: leave it out, or say fast=False.")
    if generation_config.use_cache is False:
        raise ValueError("Fast decoding needs its cache: leave out use_cache=False, or say fast=False.")


def answer_generation(defaults: GenerationConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` for an answer: one beam and the original's length unless something else is asked for.

    The Hub's `generation_config.json` searches with 3 beams, which nothing streams, and its `max_length` of 100 is the
    answer's, where transformers' counts the prompt and its image.
    """
    generation = dict(given)
    if "generation_config" in generation:
        return generation
    generation.setdefault("num_beams", 1)
    if not any(generation.get(name) is not None for name in ("max_new_tokens", "max_length")):
        generation["max_new_tokens"] = defaults.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    if generation.get("max_new_tokens") is not None:
        generation.setdefault("max_length", None)  # or the library says of each call that both are there
    return generation


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


def fill_in_batches(
    documents: Sequence[Mapping[str, Any]],
    encoded: Sequence[EncodedDocument],
    fill: Callable[[list[EncodedDocument]], list[list[str | None]]],
    batch_size: int = FILL_BATCH_SIZE,
) -> list[dict[str, Any]]:
    """Copies of the documents with the answers that `fill` gives for a batch of them."""
    filled = []
    for begin in range(0, len(documents), batch_size):
        batch = list(encoded[begin : begin + batch_size])
        for document, source, answers in zip(documents[begin:], batch, fill(batch), strict=False):
            by_path = {slot.path: answer for slot, answer in zip(source.answer_slots, answers, strict=True)}
            filled.append(fill_document(document, by_path))
    return filled


def encode_for_filling(
    document: Mapping[str, Any], encode: Callable[[Mapping[str, Any]], EncodedDocument], index: int
) -> EncodedDocument:
    """Encodes a document whose answer slots are all empty."""
    try:
        encoded = encode(document)
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


def with_answer(document: EncodedDocument, slot: int, ids: Sequence[int], num_words: int) -> EncodedDocument:
    """`document` with generated `ids` as the answer of `slot`, appended at the end."""
    pairs = [document.pair(token, num_words) for token in ids]
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


__all__ = ["CpmBeeGenerationMixin", "ExtensionTokenProcessor", "RowSampling"]
