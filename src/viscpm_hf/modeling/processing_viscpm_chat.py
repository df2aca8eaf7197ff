"""Processor of VisCPM-Chat: conversations, or CPM-Bee documents, and images to model inputs.

The text form of a prompt is document syntax, the special tokens marking the segments:

    <s><root></s><s>image</s><s><image></s><s>context</s><s>User: ...\\nAI: ...\\n</s>
        <s>question</s><s>...</s><s><ans></s><s>

The chat template writes it and doubles every `<` of a message, so no message can forge a special token. A text that
doesn't begin so is tokenised as it is, as one segment: plain text, or, with `<s>` or `</s>` in it, a piece of a
rendered template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, Unpack

from .chat_processing import ChatProcessing, EncodedImage, Grid, check_messages, check_turn
from .continued_messages import CONTINUED_BRACKET
from .document_cpm_bee import ANSWER_KEY, IMAGE_KEY, ROOT_TEXT, EncodedDocument, own_strings
from .image_processing_viscpm import VisCPMImageProcessor, images_in_order
from .sequences_cpm_bee import TokenSequences
from .tokenization_cpm_bee import IMAGE_TOKEN, CpmBeeTokenizer


MARKUP_BEGIN = f"<s>{ROOT_TEXT}</s>"
SEGMENT_MARKS = ("<s>", "</s>")

# Earlier turns go into the document's context; the images of all turns into its one image field.
CHAT_TEMPLATE = """\
{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}
        {{- message['content'] | replace('<', '<<') -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}{{- part['text'] | replace('<', '<<') -}}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set turn = namespace(images=0, context='', question=none, answer=none) -%}
{%- for message in messages -%}
    {%- if message['content'] is not string -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}{%- set turn.images = turn.images + 1 -%}
            {%- elif part['type'] != 'text' -%}
                {{- raise_exception("VisCPM-Chat takes text and images, not " ~ part['type'] ~ ".") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if message['role'] == 'system' -%}
        {%- set turn.context = turn.context ~ text_of(message) ~ '\\n' -%}
    {%- elif message['role'] == 'user' -%}
        {%- if turn.question is not none -%}
            {{- raise_exception("Two user messages follow each other; user and assistant take turns.") -}}
        {%- endif -%}
        {%- set turn.question = text_of(message) -%}
    {%- elif message['role'] == 'assistant' -%}
        {%- if turn.question is none -%}
            {{- raise_exception("An assistant message needs a user message before it.") -}}
        {%- endif -%}
        {%- if loop.last -%}
            {%- set turn.answer = text_of(message) -%}
        {%- else -%}
            {%- set turn.context = turn.context ~ 'User: ' ~ turn.question ~ '\\nAI: ' ~ text_of(message) ~ '\\n' -%}
            {%- set turn.question = none -%}
        {%- endif -%}
    {%- else -%}
        {{- raise_exception("Roles are system, user and assistant, not " ~ message['role'] ~ ".") -}}
    {%- endif -%}
{%- endfor -%}
{%- if turn.question is none -%}
    {{- raise_exception("The conversation has no question: its last message is the user's or an answer.") -}}
{%- endif -%}
<s><root></s>
{%- if turn.images -%}<s>image</s><s>{{- '<image>' * turn.images -}}</s>{%- endif -%}
<s>context</s><s>{{- turn.context -}}</s><s>question</s><s>{{- turn.question -}}</s><s><ans></s><s>
{%- if turn.answer is not none -%}
    {%- generation -%}{{- turn.answer -}}</s>{%- endgeneration -%}
{%- endif -%}
"""


class VisCPMChatFeatures(BatchFeature):
    """Inputs that know what their extension tokens stand for, wherever they are copied or sent to."""

    @property
    def extension_strings(self) -> list[dict[int, str]]:
        """For every row, `id -> string` of what is no token of the vocabulary; `batch_decode` takes it."""
        return own_strings(self.data["extension_table"])


class VisCPMChatProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": True}}


@dataclass(frozen=True)
class ChatPrompt:
    """One document of a batch before its images are known."""

    document: dict[str, Any]
    """Without its image field."""
    num_images: int = 0
    is_answer_closed: bool = False
    """Whether the answer given ends with `</s>` rather than being continued."""
    text: str | None = None
    """In place of a document: text of one segment, in document syntax."""


class VisCPMChatProcessor(ChatProcessing):
    r"""
    Makes model inputs of conversations (`apply_chat_template`), CPM-Bee documents or texts, and images.

    Args:
        image_processor ([`VisCPMImageProcessor`]): prepares images.
        tokenizer ([`CpmBeeTokenizer`]): encodes documents.
        chat_template (`str`): Jinja template; VisCPM's own if None.
        num_query_tokens (`int`): placeholders of one image, the tower's number of queries.
    """

    valid_processor_kwargs = VisCPMChatProcessorKwargs

    def __init__(
        self,
        image_processor: VisCPMImageProcessor | None = None,
        tokenizer: CpmBeeTokenizer | None = None,
        chat_template: str | None = None,
        num_query_tokens: int = 64,
        **kwargs,
    ):
        self.num_query_tokens = num_query_tokens
        self.image_token = IMAGE_TOKEN
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    @property
    def image_token_id(self) -> int:
        """After the slots for extension tokens; nothing that a user types can be mistaken for it."""
        return self.tokenizer.image_token_id

    @property
    def model_input_names(self) -> list[str]:
        return [
            "input_ids",
            "attention_mask",
            "token_type_ids",
            "segment_ids",
            "segment_relations",
            "extension_table",
            "pixel_values",
        ]

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput] | None = None,
        text: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | None = None,
        return_labels: bool | None = None,
        **kwargs: Unpack[VisCPMChatProcessorKwargs],
    ) -> BatchFeature:
        """
        Args:
            images: one image, a list for all texts in order, or a list of lists, one for each text.
            text: one or several of: a prompt as the chat template writes it; a CPM-Bee document (dict) whose `image`
                field has the `<image>`s; or any other text, which is tokenised as it is, an `<image>` standing for
                each of its images. It is no question: those are asked in a conversation.
            return_labels: add `labels`, the answers' tokens and `</s>`, for training.
            max_length: the most tokens of a prompt, `tokenizer.model_max_length` unless given; longer ones are an
                error, never cut.

        Returns:
            What the model takes, on lists or tensors; `pixel_values (images, 3, height, width)`. Its
            `extension_strings` has, for every row, the strings that ids without a token stand for: give it to
            `batch_decode`.

        Raises:
            ValueError: if texts and images don't match in number, a prompt is too long, or a document is malformed.
        """
        if text is None:
            raise ValueError("VisCPMChatProcessor needs text: a chat-template prompt, a document or plain text.")
        merged = self._merge_kwargs(
            self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        text_kwargs = merged["text_kwargs"]
        texts = [text] if isinstance(text, (str, Mapping)) else list(text)
        if not texts:
            raise ValueError("VisCPMChatProcessor needs at least one text, got an empty list.")
        prompts = [self.parse_prompt(entry) for entry in texts]
        pixel_inputs: Mapping[str, Any] = {}
        wanted = [prompt.num_images for prompt in prompts]
        limit = merged["images_kwargs"].get("max_image_pixels")
        flat_images = images_in_order(images, wanted, self.image_processor, IMAGE_TOKEN, limit)
        if flat_images:
            pixel_inputs = self.image_processor(flat_images, **merged["images_kwargs"])

        documents = [self.encode_prompt(prompt, close_answers=bool(return_labels)) for prompt in prompts]
        max_length = text_kwargs.get("max_length")
        for index, document in enumerate(documents):
            self.check_length(document, index, max_length)
            if return_labels and not any(slot.end - slot.begin > 2 for slot in document.answer_slots):
                raise ValueError(f"Text {index} has no answer to make labels of.")
        padding = text_kwargs.get("padding")
        if padding is False and len({len(document) for document in documents}) > 1:
            padding = True  # documents carry tables of the whole batch, so rows need one length
        encoding = self.tokenizer.collate(
            documents,
            with_labels=bool(return_labels),
            padding_side=text_kwargs.get("padding_side"),
            pad_to_multiple_of=text_kwargs.get("pad_to_multiple_of"),
            min_length=(max_length or 0) if padding == "max_length" else 0,
            return_tensors=text_kwargs.get("return_tensors"),
        )
        data = {**encoding, **pixel_inputs}
        if text_kwargs.get("return_mm_token_type_ids", merged.get("return_mm_token_type_ids")):
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(encoding["input_ids"])
        return VisCPMChatFeatures(data, tensor_type=text_kwargs.get("return_tensors"))

    # ------------------------------------------------------------------------------------------------------- prompts

    def apply_chat_template(self, conversation: Any, *args, **kwargs) -> Any:
        """As in transformers. `assistant_masks` are of the last answer: those before it are part of the prompt, which
        attends in both directions, so nothing can be learned of them."""
        wants_mask = kwargs.pop("return_assistant_tokens_mask", False)
        result = super().apply_chat_template(conversation, *args, **kwargs)
        if wants_mask:
            if not isinstance(result, BatchFeature):
                raise ValueError("return_assistant_tokens_mask needs tokenize=True and return_dict=True.")
            begin = self.tokenizer.bos_token_id
            rows = zip(result["input_ids"], result["token_type_ids"], strict=True)
            masks = [
                [int(int(kind) == 1 and int(token) != begin) for token, kind in zip(*row, strict=True)] for row in rows
            ]
            is_tensor = isinstance(result["input_ids"], torch.Tensor)
            result["assistant_masks"] = torch.tensor(masks) if is_tensor else masks
        return result

    def write_brackets(self, text: str) -> str:
        return text.replace(CONTINUED_BRACKET, "<<")

    def parse_prompt(self, text: str | Mapping[str, Any]) -> ChatPrompt:
        """A document, a chat-template prompt or a text -> [`ChatPrompt`]."""
        if isinstance(text, Mapping):
            document = dict(text)
            return ChatPrompt(document, self._count_placeholders(document.pop(IMAGE_KEY, "")))
        if not isinstance(text, str):
            raise ValueError(f"A text is a str or a document (dict), got {type(text).__name__}.")
        text = self.write_brackets(text)
        if text.startswith(MARKUP_BEGIN):
            return self._parse_markup(text)
        if any(mark in text for mark in SEGMENT_MARKS):
            parts = self.tokenizer.split_document_syntax(text)
            return ChatPrompt({}, sum(is_special and part == IMAGE_TOKEN for part, is_special in parts), text=text)
        parts = text.split(IMAGE_TOKEN)
        return ChatPrompt({}, len(parts) - 1, text=IMAGE_TOKEN.join(map(self.tokenizer.escape, parts)))

    def _parse_markup(self, text: str) -> ChatPrompt:
        values: list[str] = []
        current: list[str] | None = None
        for part, is_special in self.tokenizer.split_document_syntax(text):
            if is_special and part == "<s>" and current is None:
                current = []
            elif is_special and part == "</s>" and current is not None:
                values.append("".join(current))
                current = None
            elif current is not None:
                current.append(part if is_special else self.tokenizer.escape(part))
            else:
                raise ValueError(f"The prompt has text outside its segments <s>...</s>: {part[:40]!r}.")
        is_closed = current is None
        if current is not None:
            values.append("".join(current))
        keys, fields = values[1::2], values[2::2]
        if len(keys) != len(fields) or len(set(keys)) != len(keys):
            raise ValueError(
                f"The prompt is no list of fields: after {MARKUP_BEGIN} it has {len(keys)} keys "
                f"({len(set(keys))} different ones) and {len(fields)} values."
            )
        document = dict(zip(keys, fields, strict=True))
        num_images = self._count_placeholders(document.pop(IMAGE_KEY, ""))
        return ChatPrompt(document, num_images, is_answer_closed=is_closed)

    def _count_placeholders(self, field: Any) -> int:
        """Images of a document's image field: `<image>` once each, or the original's `<unk>` once per query."""
        if not isinstance(field, str):
            raise ValueError(f"A document's image field is a str, got {type(field).__name__}.")
        num_images = field.count(IMAGE_TOKEN)
        num_unknown = field.count("<unk>")
        if field == IMAGE_TOKEN * num_images:
            return num_images
        if field == "<unk>" * num_unknown and num_unknown % self.num_query_tokens == 0:
            return num_unknown // self.num_query_tokens
        raise ValueError(
            f"A document's image field has nothing but {IMAGE_TOKEN!r} for every image (or '<unk>' "
            f"{self.num_query_tokens} times), got {field[:40]!r} with {num_images} and {num_unknown} of them."
        )

    def encode_prompt(self, prompt: ChatPrompt, *, close_answers: bool = False) -> EncodedDocument:
        """Encodes a prompt, its image placeholders in place."""
        if prompt.text is not None:
            return self._encode_text(prompt.text)
        document = prompt.document
        num_placeholders = prompt.num_images * self.num_query_tokens
        if num_placeholders:
            document = {IMAGE_KEY: str(self.tokenizer.unk_token) * num_placeholders, **document}
        encoded = self.tokenizer.encode_document(document, close_answers=close_answers or prompt.is_answer_closed)
        for begin, end in encoded.image_bounds:
            encoded.input_ids[begin:end] = [self.image_token_id] * (end - begin)
        return encoded

    def _encode_text(self, text: str) -> EncodedDocument:
        """Text in document syntax as one segment, in which a token sees those before it."""
        ids, table = self.tokenizer.encode_text(text)
        images = {index for index, string in table.items() if string == IMAGE_TOKEN}
        strings = {index: string for index, string in table.items() if string != IMAGE_TOKEN}
        if strings and any(mark in text for mark in SEGMENT_MARKS):
            raise ValueError(
                f"A piece of a prompt has strings without a token ({', '.join(strings.values())[:40]}), which are "
                "numbered over the whole prompt: give it in one piece, as apply_chat_template makes it."
            )
        numbered = self.tokenizer.number_extensions(strings, strings.values())
        pairs: list[tuple[int, int]] = []
        for index in ids:
            if index in images:
                pairs += [(self.image_token_id, 0)] * self.num_query_tokens
            else:
                pairs.append(numbered.get(index, (index, 0)))
        count = len(pairs)
        return EncodedDocument(
            [base for base, _ in pairs], [number for _, number in pairs], [1] * count, [0] * count, [[0]], [], [],
            strings, {pair: strings[index] for index, pair in numbered.items()},
        )  # fmt: skip

    def check_length(self, document: EncodedDocument, index: int = 0, max_length: int | None = None) -> None:
        """Raises `ValueError` for a prompt that is longer than `max_length` or else the tokenizer's limit."""
        limit = max_length or self.tokenizer.model_max_length
        if len(document) > limit:
            raise ValueError(
                f"Prompt {index} has {len(document):,} tokens, more than the limit of {limit:,}. Shorten the question "
                "or the conversation before it, or raise the limit (max_length); nothing is cut off silently."
            )

    # ---------------------------------------------------------------------------------------------------------- chats

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], grids: Sequence[Grid] = ()) -> EncodedDocument:
        """See [`ChatProcessing.encode_chat`]."""
        check_messages(messages, len(grids))
        return self._open_prompt(self.parse_prompt(self.apply_chat_template(list(messages), tokenize=False)))

    def encode_turn(
        self, question: str, context: str = "", grids: Sequence[Grid] = (), num_own: int = 0
    ) -> EncodedDocument:
        """See [`ChatProcessing.encode_turn`]; a document has its images in one place, whichever turn's they are."""
        check_turn(question, context)
        document = {"context": context, "question": self.tokenizer.escape(question), ANSWER_KEY: ""}
        return self._open_prompt(ChatPrompt(document, len(grids)))

    def _open_prompt(self, prompt: ChatPrompt) -> EncodedDocument:
        encoded = self.encode_prompt(prompt)
        self.check_length(encoded)
        return encoded.prompt(open_slot=0)

    def vocabulary_problem(self, model: Any) -> str | None:
        """A vocabulary of another number of words is another one, whatever room there is."""
        tokens, rows = self.tokenizer.num_words, model.config.text_config.num_words
        return self._other_vocabulary(tokens, rows) if tokens != rows else None

    def next_context(
        self,
        context: str,
        question: str,
        answer: str | Sequence[int],
        prompt: EncodedDocument | None = None,
        num_images: int = 0,
        num_own: int = 0,
    ) -> str:
        """See [`ChatProcessing.next_context`]; a context is document syntax."""
        escape = self.tokenizer.escape
        written = escape(answer) if isinstance(answer, str) else self._written(answer, prompt)
        return f"{context}User: {escape(question)}\nAI: {written}\n"

    def with_answer(self, prompt: EncodedDocument, ids: Sequence[int]) -> EncodedDocument:
        pairs = [prompt.pair(token, self.tokenizer.num_words) for token in ids]
        return replace(
            prompt,
            input_ids=[*prompt.input_ids, *(base for base, _ in pairs)],
            sub_ids=[*prompt.sub_ids, *(number for _, number in pairs)],
            token_type_ids=[*prompt.token_type_ids, *[1] * len(pairs)],
            segment_ids=[*prompt.segment_ids, *prompt.segment_ids[-1:] * len(pairs)],
        )

    def _pad_prompts(self, prompts: Sequence[EncodedDocument]) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer.collate(prompts, padding_side="left", return_tensors="pt"))

    def answer_text(self, ids: Sequence[int], prompt: EncodedDocument | None = None) -> str:
        """See [`ChatProcessing.answer_text`]: special tokens by name, every `<` once."""
        return self.tokenizer.unescape(self._written(ids, prompt))

    def _written(self, ids: Sequence[int], prompt: EncodedDocument | None) -> str:
        """An answer in document syntax."""
        ids, end = list(ids), self.tokenizer.eos_token_id
        ids = ids[: ids.index(end)] if end in ids else ids
        strings = None if prompt is None else prompt.strings(self.tokenizer.num_words)
        return self.tokenizer.decode(ids, extension_table=strings)

    def token_bytes(self, token: int, prompt: EncodedDocument | None = None) -> bytes:
        strings = None if prompt is None else prompt.strings(self.tokenizer.num_words)
        return self.tokenizer.unescape(self.tokenizer.decode([token], extension_table=strings)).encode()

    def vocabulary_bytes(self) -> list[bytes]:
        special = self.tokenizer.special_ids
        return [b"" if token in special else self.token_bytes(token) for token in range(len(self.tokenizer.vocab))]

    def hand_on(self, images: Sequence[EncodedImage]) -> torch.Tensor | None:
        """`(images, queries, hidden)`"""
        return torch.cat([image.features for image in images]) if images else None

    def handed_on(self, value: Any, hidden_size: int) -> list[EncodedImage]:
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"vision_hidden_states is a tensor, got {type(value).__name__}.")
        self._check_encoded(value, "images", hidden_size)
        return [EncodedImage(value[place : place + 1]) for place in range(len(value))]

    # ------------------------------------------------------------------------------------------------------- decoding

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        extension_strings: Sequence[Mapping[int, str]] | None = None,
        **kwargs,
    ) -> list[str]:
        """Decodes rows of ids; `extension_strings` is the attribute of that name of the inputs."""
        if extension_strings is None:
            return self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens, **kwargs)
        repeats = len(sequences) // len(extension_strings)
        return [
            self.tokenizer.decode(
                row,
                skip_special_tokens=skip_special_tokens,
                extension_table=extension_strings[index // repeats],
                **kwargs,
            )
            for index, row in enumerate(sequences)
        ]

    def decode(self, token_ids: Any, *args, extension_strings: Mapping[int, str] | None = None, **kwargs) -> Any:
        """As in transformers; what `generate` returned brings its strings along. `extension_strings` are those of the
        row, for ids of other origin."""
        if extension_strings is not None:
            kwargs["extension_table"] = extension_strings
        return self.tokenizer.decode(token_ids, *args, **kwargs)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:
        """As in transformers. Callers cut off what the prompt's ids alone give, so strings are written in the answer
        only."""
        if not isinstance(generated_outputs, TokenSequences) or generated_outputs.ndim != 2:
            return super().post_process_image_text_to_text(
                generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
            )
        begin = generated_outputs.prompt_length
        options = {"skip_special_tokens": skip_special_tokens, **kwargs}
        prompts = self.tokenizer.batch_decode(generated_outputs[:, :begin].tolist(), **options)
        answers = self.tokenizer.batch_decode(generated_outputs[:, begin:], **options)
        return [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]

    def save_pretrained(self, *args, **kwargs) -> list[str]:
        """As in transformers, but the saved folder's `auto_map` is not left on this object (loading drops it too)."""
        files = super().save_pretrained(*args, **kwargs)
        self.__dict__.pop("auto_map", None)
        return files

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs
    ) -> MultiModalData:
        """Every image takes the same number of tokens, whatever its size."""
        count = len(image_sizes or ())
        return MultiModalData(num_image_tokens=[self.num_query_tokens] * count, num_image_patches=[1] * count)


__all__ = ["VisCPMChatProcessor"]
