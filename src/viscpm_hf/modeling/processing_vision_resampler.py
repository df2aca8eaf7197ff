"""What the processors of OmniLMM, MiniCPM-V and VisualCLA share.

A chat template writes the prompt with one mark per image; the processor puts the image's placeholders there. The
templates follow every `<` of a message by a character that no text has (U+FDD0, which Unicode reserves for such uses),
so that a special token in a message, `<image>` or `</s>`, stays the text that somebody typed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from transformers import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, Unpack

from .chat_processing import ChatProcessing, EncodedImage, Grid, check_messages, check_turn
from .continued_messages import CONTINUED_BRACKET
from .image_processing_viscpm import VisCPMImageProcessor, images_in_order


ESCAPE = "\ufdd0"
# Of SentencePiece: a single byte, and what stands for the blank before a word.
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_WORD_BEGIN = "\u2581"

# Texts of a message, escaped, and its images; `text_of(message)`, `images_of(message)` in the templates.
TEMPLATE_MACROS = """\
{%- macro text_of(message) -%}
    {%- set hidden = '\\ufdd1' if message['role'] == 'user' else '' -%}
    {%- if message['content'] is string -%}
        {{- message['content'] | replace('<', '<\\ufdd0') | replace(hidden, '') -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}
                {{- part['text'] | replace('<', '<\\ufdd0') | replace(hidden, '') -}}
            {%- elif part['type'] != 'image' -%}
                {{- raise_exception("The model takes text and images, not " ~ part['type'] ~ ".") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro images_of(message, mark) -%}
    {%- if message['content'] is not string -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {%- if message['role'] != 'user' -%}
                    {{- raise_exception("Images belong to the user, not to the " ~ message['role'] ~ ".") -}}
                {%- endif -%}
                {{- mark -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro check_turns(messages, knows_system) -%}
    {%- set turns = namespace(last='assistant') -%}
    {%- for message in messages -%}
        {%- if message['role'] == 'system' and knows_system and loop.first -%}
        {%- elif message['role'] not in ('user', 'assistant') -%}
            {{- raise_exception(
                "A conversation has messages of the user and the assistant" ~ (", and may begin with the system's"
                if knows_system else "") ~ "; message " ~ loop.index0 ~ " is the " ~ message['role'] ~ "'s."
            ) -}}
        {%- elif message['role'] == turns.last -%}
            {{- raise_exception(
                "User and assistant take turns, the user first; message " ~ loop.index0 ~ " is the " ~ turns.last
                ~ "'s out of turn."
            ) -}}
        {%- else -%}
            {%- set turns.last = message['role'] -%}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
"""


class VisionResamplerProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": True, "padding_side": "left"}}


class VisionResamplerProcessor(ChatProcessing):
    r"""
    Makes model inputs of prompts, as the chat template writes them, and images.

    Args:
        image_processor: prepares images.
        tokenizer: encodes prompts.
        chat_template (`str`): Jinja template; the model's own if None.
        num_query_tokens (`int`): placeholders of one view of an image.
        max_input_length (`int`): the most tokens of a prompt.
    """

    valid_processor_kwargs = VisionResamplerProcessorKwargs
    own_chat_template: ClassVar[str]
    image_token: ClassVar[str] = "<image>"
    """The mark of an image in a prompt."""
    image_tokens: ClassVar[tuple[str, ...]]
    """Tokens around and between an image's placeholders, and these: no message can contain one."""
    answer_tokens: ClassVar[tuple[str, ...]] = ()
    """Special tokens that the model writes in its answers: in those of a conversation they stay such tokens."""
    prompt_begins: ClassVar[tuple[str, ...]] = ("<s>",)
    """What a prompt as the chat template writes it begins with, one of them."""
    strips_answers: ClassVar[bool] = True
    """Whether an answer is told without the white space around it, as the original did."""
    image_token_id: int
    """The placeholder's."""

    def __init__(
        self,
        image_processor: VisCPMImageProcessor | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_query_tokens: int = 64,
        max_input_length: int = 2048,
        **kwargs,
    ):
        self.num_query_tokens = num_query_tokens
        self.max_input_length = max_input_length
        super().__init__(image_processor, tokenizer, chat_template=chat_template or self.own_chat_template)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token

    @property
    def model_input_names(self) -> list[str]:
        names = ("input_ids", "attention_mask", *self.image_processor.model_input_names, "num_views")
        return list(dict.fromkeys(names))

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput] | None = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Unpack[VisionResamplerProcessorKwargs],
    ) -> BatchFeature:
        """
        Args:
            images: one image, a list for all texts in order, or a list of lists, one for each text.
            text: one or several prompts as the chat template writes them.
            max_length: the most tokens of a prompt, `max_input_length` unless given; longer ones are an error, never
                cut.
            add_special_tokens: whether `<s>` goes before a text that doesn't begin with it; True unless given. It
                always goes before a prompt as the chat template writes it.

        Returns:
            `input_ids` and `attention_mask` `(texts, length)`, padded on the left unless asked otherwise; with images
            also `pixel_values` `(views, 3, height, width)` of all texts one after the other, `num_views` `(texts,)`,
            and what else the image processor returns of each view.

        Raises:
            ValueError: if texts and images don't match in number, or a prompt is too long.
        """
        if text is None:
            raise ValueError(f"{type(self).__name__} needs text: a prompt as its chat template writes it.")
        merged = self._merge_kwargs(
            self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        text_kwargs = merged["text_kwargs"]
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError(f"{type(self).__name__} needs at least one text, got an empty list.")
        for index, entry in enumerate(texts):
            if not isinstance(entry, str):
                raise ValueError(f"A text is a str, but text {index} is of type {type(entry).__name__}.")
        texts = list(map(self.write_brackets, texts))

        num_images = [entry.count(self.image_token) for entry in texts]
        limit = merged["images_kwargs"].get("max_image_pixels")
        flat_images = images_in_order(images, num_images, self.image_processor, self.image_token, limit)
        data: dict[str, Any] = {}
        expansions: list[str] = []
        num_views: list[int] = []
        if flat_images:
            # Before any padding is known, arrays will do: tensors are made of everything at the end.
            features = self.image_processor(flat_images, **{**merged["images_kwargs"], "return_tensors": "np"})
            expansions, views_of_images = self._expansions(features, len(flat_images))
            data = dict(features)
            places = iter(views_of_images)
            num_views = [sum(next(places) for _ in range(count)) for count in num_images]
            data["num_views"] = num_views

        rows = []
        replacements = iter(expansions)
        for index, entry in enumerate(texts):
            expanded = self.expand(entry, [next(replacements) for _ in range(num_images[index])])
            is_prompt = entry.startswith(self.prompt_begins)  # the templates leave `<s>` to this
            ids = self.encode(expanded, is_prompt or text_kwargs.get("add_special_tokens") is not False)
            self._check(ids, index, num_views[index] if num_views else 0, text_kwargs.get("max_length"))
            rows.append(ids)
        padding = text_kwargs.get("padding")
        encoding = self.tokenizer.pad(
            {"input_ids": rows, "attention_mask": [[1] * len(ids) for ids in rows]},
            padding=padding,
            max_length=text_kwargs.get("max_length") if padding == "max_length" else None,
            padding_side=text_kwargs.get("padding_side"),
            pad_to_multiple_of=text_kwargs.get("pad_to_multiple_of"),
        )
        data = {**encoding, **data}
        if text_kwargs.get("return_mm_token_type_ids", merged.get("return_mm_token_type_ids")):
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(encoding["input_ids"])
        return BatchFeature(data, tensor_type=text_kwargs.get("return_tensors"))

    # ------------------------------------------------------------------------------------------------------- prompts

    def view_text(self) -> str:
        """The text that stands for one view."""
        raise NotImplementedError

    def image_text(self, grid: tuple[int, int] = (0, 0)) -> str:
        """The text that stands for one image; `grid`: rows and columns of its tiles."""
        return self.view_text()

    def expand(self, text: str, images: Sequence[str]) -> str:
        """The prompt with the images' texts in place of their marks."""
        parts = text.split(self.image_token)
        return parts[0] + "".join(image + part for image, part in zip(images, parts[1:], strict=True))

    def escape_answer(self, text: str) -> str:
        """An answer as the chat template writes it into a prompt."""
        return self._with_answer_tokens(text.replace("<", f"<{ESCAPE}"), f"<{ESCAPE}")

    def _with_answer_tokens(self, text: str, bracket: str) -> str:
        """A text in which the model's own tokens are such tokens, `bracket` being what stands there for a `<`."""
        for token in self.answer_tokens:
            text = text.replace(bracket + token[1:], token)
        return text

    def prompt_text(self, conversation: list[dict[str, Any]], grids: Sequence[tuple[int, int]] = ()) -> str:
        """The conversation's prompt as the original builds it, for people to read.

        Args:
            grids: of each image, rows and columns of its tiles; one view each if empty.
        """
        text = self.apply_chat_template(conversation, add_generation_prompt=True)
        count = text.count(self.image_token)
        texts = [self.image_text(grid) for grid in grids] if grids else [self.image_text()] * count
        return self.expand(text, texts).replace(ESCAPE, "")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of an expanded prompt, `<s>` first; what messages have of special tokens stays text."""
        bos = self.tokenizer.bos_token
        has_bos = bos is None or text.startswith(bos) or not add_special_tokens
        ids = [] if has_bos else [self.tokenizer.bos_token_id]
        special = {*self.tokenizer.all_special_tokens, *self.image_tokens}
        endings = "|".join(re.escape(token[1:]) for token in special if token.startswith("<"))
        # A cut behind its `<` keeps a typed special token from being seen as one, by whatever vocabulary.
        for part in re.split(f"(?<=<){ESCAPE}(?={endings})", text):
            part = part.replace(ESCAPE, "")
            ids += self.tokenizer(part, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return ids

    # ---------------------------------------------------------------------------------------------------------- chats

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], grids: Sequence[Grid] = ()) -> list[int]:
        """See [`ChatProcessing.encode_chat`]."""
        check_messages(messages, len(grids))
        text = self.apply_chat_template(list(messages), add_generation_prompt=True)
        ids = self.encode(self.expand(text, [self.image_text(grid) for grid in grids]))
        self._check(ids, 0, sum(1 + rows * columns for rows, columns in grids), None)
        return ids

    def encode_turn(self, question: str, context: str = "", grids: Sequence[Grid] = (), num_own: int = 0) -> list[int]:
        """See [`ChatProcessing.encode_turn`]; a context is JSON of the messages so far."""
        return self.encode_chat(self.messages_of_turn(question, context, len(grids), num_own), grids)

    def messages_of_turn(
        self, question: str, context: str = "", num_images: int | None = 0, num_own: int = 0
    ) -> list[dict[str, Any]]:
        """A question with those before it, as the chat template takes them; see [`encode_turn`]. Without a number of
        images as the context has them."""
        check_turn(question, context)
        messages = [*_read_context(context), _message("user", question)]
        if num_images is None:
            return messages
        messages[-1] = _message("user", question, num_own)
        num_others = num_images - sum(map(_count_images, messages))
        if num_others < 0:
            raise ValueError(
                f"The conversation has {num_images - num_others} images, but {num_images} were given: hand on what "
                "the earlier turn returned, encoded images too."
            )
        if num_others:
            first = next(place for place, message in enumerate(messages) if message["role"] == "user")
            messages[first] = _message("user", messages[first]["content"], num_others)
        return messages

    def next_context(
        self,
        context: str,
        question: str,
        answer: str | Sequence[int],
        prompt: Sequence[int] | None = None,
        num_images: int = 0,
        num_own: int = 0,
    ) -> str:
        """See [`ChatProcessing.next_context`]."""
        text = answer if isinstance(answer, str) else self.answer_text(answer)
        messages = self.messages_of_turn(question, context, num_images if num_own else None, num_own)
        return json.dumps([*messages, _message("assistant", text)], ensure_ascii=False)

    def with_answer(self, prompt: Sequence[int], ids: Sequence[int]) -> list[int]:
        return [*prompt, *ids]

    def _pad_prompts(self, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        rows = {"input_ids": list(map(list, prompts)), "attention_mask": [[1] * len(ids) for ids in prompts]}
        return dict(self.tokenizer.pad(rows, padding_side="left", return_tensors="pt"))

    def answer_text(self, ids: Sequence[int], prompt: Sequence[int] | None = None) -> str:
        """The text of an answer's tokens, to its end."""
        ids = list(ids)
        end = self.tokenizer.eos_token_id
        ids = ids[: ids.index(end)] if end in ids else ids
        text = self._answer_text(ids)
        return text.strip() if self.strips_answers else text

    def settles(self, token: int, last: int | None = None) -> bool:
        """One more byte may change what those before it stand for; so may one behind tokens without a text."""
        is_byte = _BYTE.fullmatch(self.tokenizer.convert_ids_to_tokens(token)) is not None
        return not is_byte and self.answer_text([token]) != ""

    def _answer_text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def token_bytes(self, token: int, prompt: Sequence[int] | None = None) -> bytes:
        name = self.tokenizer.convert_ids_to_tokens(token)
        byte = _BYTE.fullmatch(name)
        return bytes([int(byte[1], 16)]) if byte else name.replace(_WORD_BEGIN, " ").encode()

    def vocabulary_bytes(self) -> list[bytes]:
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return [b"" if token in special else self.token_bytes(token) for token in range(len(self.tokenizer))]

    def hand_on(self, images: Sequence[EncodedImage]) -> EncodedImage | tuple[EncodedImage, ...] | None:
        """An image as it is, several as a tuple."""
        return (images[0] if len(images) == 1 else tuple(images)) if images else None

    def handed_on(self, value: Any, hidden_size: int) -> list[EncodedImage]:
        images = list(value) if isinstance(value, (list, tuple)) else [value]
        for image in images:
            if not isinstance(image, EncodedImage):
                raise ValueError(
                    "vision_hidden_states is an EncodedImage, or several, as an earlier turn returned it, got "
                    f"{type(image).__name__}."
                )
            self._check_encoded(image.features, "views", hidden_size)
        return images

    # ------------------------------------------------------------------------------------------------------ templates

    def apply_chat_template(self, conversation: Any, *args, **kwargs):
        """As in transformers, but `return_assistant_tokens_mask`, which needs a tokenizer that knows places in its
        text, is a `ValueError`, and so is what the template refuses."""
        if isinstance(conversation, Sequence) and not conversation:
            raise ValueError("The conversation has no messages.")
        if kwargs.get("return_assistant_tokens_mask"):
            raise ValueError(
                "return_assistant_tokens_mask isn't there for this model: its tokens have no places in the text. "
                "`viscpm-hf train` learns answers alone."
            )
        return super().apply_chat_template(conversation, *args, **kwargs)

    def write_brackets(self, text: str) -> str:
        return self._with_answer_tokens(text, CONTINUED_BRACKET).replace(CONTINUED_BRACKET, f"<{ESCAPE}")

    def _expansions(self, features: BatchFeature, num_images: int) -> tuple[list[str], list[int]]:
        """The texts of the images and their numbers of views; takes out of `features` what only this needs."""
        return [self.image_text()] * num_images, [1] * num_images

    def _check(self, ids: Sequence[int], index: int, num_views: int, max_length: int | None) -> None:
        limit = max_length or self.max_input_length
        if len(ids) > limit:
            raise ValueError(
                f"Prompt {index} has {len(ids):,} tokens, more than the limit of {limit:,}. Shorten the question or "
                "the conversation before it, or raise the limit (max_length); nothing is cut off silently."
            )
        found = sum(token == self.image_token_id for token in ids)
        if found != num_views * self.num_query_tokens:
            raise ValueError(
                f"Prompt {index} has {found} placeholders after tokenisation, but its {num_views} views take "
                f"{num_views * self.num_query_tokens}: the tokenizer is not this model's."
            )

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs
    ) -> MultiModalData:
        """`image_sizes`: (height, width) of each image."""
        grids = [self.grid_of(size, **kwargs) for size in image_sizes or ()]
        return MultiModalData(
            num_image_tokens=[(1 + rows * columns) * self.num_query_tokens for rows, columns in grids],
            num_image_patches=[1 + rows * columns for rows, columns in grids],
        )

    def save_pretrained(self, *args, **kwargs) -> list[str]:
        """As in transformers, but the saved folder's `auto_map` is not left on this object (loading drops it too)."""
        files = super().save_pretrained(*args, **kwargs)
        self.__dict__.pop("auto_map", None)
        return files


def _read_context(context: str) -> list[dict[str, Any]]:
    """The messages of a context.

    Raises:
        ValueError: for one that is none.
    """
    try:
        messages = json.loads(context) if context else []
    except json.JSONDecodeError as error:
        raise ValueError(f"The context is not what an earlier turn returned: {error}.") from error
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and "role" in message and _is_content(message.get("content")) for message in messages
    ):
        raise ValueError("The context is not what an earlier turn returned: a JSON list of messages.")
    return messages


def _is_content(content: Any) -> bool:
    """Whether that is a text, or a list of texts and images."""
    if not isinstance(content, list):
        return isinstance(content, str)
    return all(
        isinstance(part, dict) and (part.get("type") == "image" or isinstance(part.get("text"), str))
        for part in content
    )


def _message(role: str, content: str | list[dict[str, Any]], num_images: int = 0) -> dict[str, Any]:
    """A message with so many more images before what it has."""
    if num_images:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        content = [*({"type": "image"} for _ in range(num_images)), *parts]
    return {"role": role, "content": content}


def _count_images(message: Mapping[str, Any]) -> int:
    content = message["content"]
    return 0 if isinstance(content, str) else sum(part.get("type") == "image" for part in content)


__all__ = ["VisionResamplerProcessor"]
