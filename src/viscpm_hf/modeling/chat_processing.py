"""What the processors of all models that chat have in common: all that a chat and a server need of them.

A *prompt* is a conversation up to where its answer begins, as the family's tokens: of VisCPM-Chat a document whose
last token is the answer's `<s>`, of the others a list of ids. Whoever has one knows no more of it than `len`, its
number of tokens. A *grid* is the rows and columns of an image's tiles, (0, 0) for an image of one view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.nn.functional import pad
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import is_pil_image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .continued_messages import with_continued_brackets, written


try:
    from jinja2 import TemplateError
except ImportError:  # which transformers asks for only when it renders a template
    TemplateError = ()

Prompt: TypeAlias = Sized
Grid: TypeAlias = tuple[int, int]


# That go through the tower together.
MOST_VIEWS = 32


@dataclass(frozen=True, eq=False)
class ImageViews:
    """An image in the sizes in which the vision tower takes it."""

    pixel_values: torch.Tensor
    """`(views, 3, height, width)`: levels, uint8; what the image processor makes of them, fp32, if that was given."""
    image_sizes: torch.Tensor | None = None
    """`(views, 2)`: height and width of each view without padding, where views differ."""
    grid: Grid = (0, 0)


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image as the language model sees it."""

    features: torch.Tensor
    """`(views, queries, hidden)`"""
    grid: Grid = (0, 0)


class ChatProcessing(ProcessorMixin):
    """A base of processors: conversations to prompts, tokens to answers, images to views.

    A subclass has `tokenizer`, `image_processor`, `num_query_tokens` and what raises `NotImplementedError` here.
    """

    tokenizer: Any
    image_processor: Any
    num_query_tokens: int
    """Placeholders of one view."""

    def vocabulary_problem(self, model: Any) -> str | None:
        """Why a model can't be the one that the tokenizer is of; None if it can."""
        tokens, rows = len(self.tokenizer), model.config.get_text_config(decoder=True).vocab_size
        return self._other_vocabulary(tokens, rows) if tokens > rows else None

    def _other_vocabulary(self, tokens: int, rows: int) -> str:
        return f"The vocabulary has {tokens:,} tokens, but the model {rows:,}: they are not of the same checkpoint."

    # ------------------------------------------------------------------------------------------------------- prompts

    def apply_chat_template(self, conversation: Any, *args, **kwargs) -> Any:
        """As in transformers, but a conversation that the template refuses is a `ValueError`, and one that is
        continued (`continue_final_message`) may have any text."""
        continues = kwargs.get("continue_final_message")
        try:
            rendered = super().apply_chat_template(
                with_continued_brackets(conversation) if continues else conversation, *args, **kwargs
            )
        except TemplateError as error:
            raise ValueError(str(error)) from error
        return written(rendered, self.write_brackets) if continues else rendered

    def write_brackets(self, text: str) -> str:
        """A rendered prompt with each [`CONTINUED_BRACKET`] as the template writes a `<` of an answer."""
        raise NotImplementedError

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], grids: Sequence[Grid] = ()) -> Prompt:
        """The prompt of a conversation as the chat template takes it, the user's message last.

        Args:
            grids: of all images, in order.

        Raises:
            ValueError: for a conversation out of turn, another number of images, or a prompt that is too long.
        """
        raise NotImplementedError

    def encode_turn(self, question: str, context: str = "", grids: Sequence[Grid] = (), num_own: int = 0) -> Prompt:
        """The prompt of one more question.

        Args:
            context: what [`next_context`] returned for the turn before; "" begins a conversation.
            grids: of all images of the conversation, in order.
            num_own: how many of them, the last ones, come with this question. The others stand where the context
                says, or else in the first question.

        Raises:
            ValueError: for values of the wrong type, a context that is none, or a prompt that is too long.
        """
        raise NotImplementedError

    def next_context(
        self,
        context: str,
        question: str,
        answer: str | Sequence[int],
        prompt: Prompt | None = None,
        num_images: int = 0,
        num_own: int = 0,
    ) -> str:
        """The context with one more turn.

        Args:
            answer: its text, or its tokens, which came of `prompt`; they may have special tokens, which a text hasn't.
            num_images, num_own: of the conversation and of this question, see [`encode_turn`]. With images of its own
                the context says where all of them stand.
        """
        raise NotImplementedError

    def with_answer(self, prompt: Prompt, ids: Sequence[int]) -> Prompt:
        """The prompt with the beginning of its answer."""
        raise NotImplementedError

    def pad_prompts(
        self, prompts: Sequence[Prompt], images: Sequence[torch.Tensor | None] = (), model: Any = None
    ) -> dict[str, torch.Tensor]:
        """Model inputs of prompts, padded on the left, for `generate` and `model.answers`.

        Args:
            images: encoded views of all prompts' images in order, each `(views, queries, hidden)`; None for a prompt
                without.
            model: on whose device they are to be, and of whose dtype.
        """
        inputs = self._pad_prompts(prompts)
        if model is not None:
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        features = [entry for entry in images if entry is not None]
        if features:
            if model is not None:
                features = [entry.to(model.device, model.dtype) for entry in features]
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=torch.cat(features))}
        return inputs

    def _pad_prompts(self, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------- answers

    def answer_text(self, ids: Sequence[int], prompt: Prompt | None = None) -> str:
        """The text of an answer's tokens to its end, for people.

        Args:
            prompt: what they were generated for; where a token's meaning depends on it, it is unknown without.
        """
        raise NotImplementedError

    def settles(self, token: int, last: int | None = None) -> bool:
        """Whether nothing behind this token of an answer changes its text or that of the tokens before it.

        Args:
            last: the last one before it that did so.
        """
        return True

    def token_bytes(self, token: int, prompt: Prompt | None = None) -> bytes:
        """What a token adds to an answer, in UTF-8, or its name if that is nothing."""
        raise NotImplementedError

    def vocabulary_bytes(self) -> list[bytes]:
        """Likewise of all tokens by their ids: nothing for special ones. What a prompt brings along isn't there."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------------------------------- images

    def views_of(self, image: Any) -> ImageViews:
        """An image, opened or as the image processor opens it, as views. Needs no model and may run in any thread.

        Raises:
            ValueError: for what is no image, or one outside the limits.
        """
        picture = self.image_processor.fetch_images(image)
        # A quarter of the memory while it waits; see `_pixel_values`.
        options = {"do_rescale": False, "do_normalize": False} if is_pil_image(picture) else {}
        inputs: BatchFeature = self.image_processor(picture, **options, return_tensors="pt")
        (grid,) = inputs["grids"].tolist() if "grids" in inputs else [(0, 0)]
        return ImageViews(inputs["pixel_values"], inputs.get("image_sizes"), tuple(grid))

    def grid_of(self, size: tuple[int, int], **kwargs) -> Grid:
        """Rows and columns of the tiles of an image of (height, width), (0, 0) without tiles."""
        return (0, 0)

    @torch.no_grad()
    def encode_images(self, model: Any, images: Sequence[ImageViews]) -> list[EncodedImage]:
        """Images through a model's tower, a few dozen views at a time."""
        groups, count = [[]], 0
        for image in images:
            count += len(image.pixel_values)
            if count > MOST_VIEWS and groups[-1]:
                groups.append([])
                count = len(image.pixel_values)
            groups[-1].append(image)
        return [encoded for group in groups for encoded in self._encode_images(model, group)]

    def _encode_images(self, model: Any, images: Sequence[ImageViews]) -> list[EncodedImage]:
        height, width = (max(image.pixel_values.shape[axis] for image in images) for axis in (-2, -1))
        views = [self._pixel_values(image, model.device) for image in images]
        padded = [pad(own, (0, width - own.shape[-1], 0, height - own.shape[-2])) for own in views]
        sizes = [image.image_sizes for image in images if image.image_sizes is not None]
        options = {"image_sizes": torch.cat(sizes).to(model.device)} if sizes else {}
        features = model.get_image_features(torch.cat(padded), **options).pooler_output
        split = features.split([len(own) for own in views])
        return [EncodedImage(own, image.grid) for own, image in zip(split, images, strict=True)]

    def _pixel_values(self, image: ImageViews, device: torch.device) -> torch.Tensor:
        """Views as the tower takes them, fp32."""
        levels = image.pixel_values.to(device)
        if levels.dtype != torch.uint8:
            return levels
        table = torch.from_numpy(self.image_processor.values_of_levels(levels.shape[1])).to(device)
        values = table.new_empty(levels.shape)
        for place, channel in enumerate(table):
            values[:, place] = channel.index_select(0, levels[:, place].int().flatten()).view_as(levels[:, place])
        if image.image_sizes is not None:
            for view, (height, width) in zip(values, image.image_sizes.tolist(), strict=True):
                view[:, height:], view[:, :, width:] = 0, 0
        return values

    def hand_on(self, images: Sequence[EncodedImage]) -> Any:
        """Encoded images as a chat gives them back for the next turn; None if there are none."""
        raise NotImplementedError

    def handed_on(self, value: Any, hidden_size: int) -> list[EncodedImage]:
        """The other way round.

        Args:
            hidden_size: the language model's.

        Raises:
            ValueError: for what isn't of [`hand_on`]'s type, or another model's.
        """
        raise NotImplementedError

    def _check_encoded(self, features: torch.Tensor, what: str, hidden_size: int) -> None:
        expected = (self.num_query_tokens, hidden_size)
        if features.ndim != 3 or tuple(features.shape[1:]) != expected:
            raise ValueError(
                f"vision_hidden_states has shape {tuple(features.shape)}, but this model's are "
                f"({what}, {expected[0]}, {expected[1]}): hand on what an earlier turn of the same model returned."
            )


class AnswerText:
    """The text of an answer as its tokens come. Every token is decoded a few times, however long the answer gets:
    with what follows it, and as the beginning of that."""

    def __init__(self, processor: ChatProcessing, prompt: Prompt | None = None):
        self.processor = processor
        self.prompt = prompt
        self._num_seen = self._num_told = 0
        self._is_over = False

    def new_text(self, ids: Sequence[int], is_last: bool = False) -> str:
        """What is to be told beyond what was; `ids` are all tokens so far, an end token included."""
        if self._is_over:
            return ""
        told = end = self._num_told
        new = ids[self._num_seen :]
        self._is_over = is_last or self.processor.tokenizer.eos_token_id in new
        if self._is_over:
            end = len(ids)
        else:
            for place, token in enumerate(new, self._num_seen + 1):
                if self.processor.settles(token, ids[end - 1] if end else None):
                    end = place
        self._num_seen, self._num_told = len(ids), end
        if end == told:
            return ""
        # The token before them says whether a space between is theirs.
        last = ids[max(told - 1, 0) : told]
        text = self.processor.answer_text([*last, *ids[told:end]], self.prompt)
        return text[len(self.processor.answer_text(last, self.prompt)) :]


def check_turn(question: Any, context: Any) -> None:
    """Raises `ValueError` for a question or a context that is no text."""
    for name, value in (("question", question), ("context", context)):
        if not isinstance(value, str):
            raise ValueError(f"A {name} is a str, got {type(value).__name__}.")


def check_messages(messages: Sequence[Mapping[str, Any]], num_images: int) -> None:
    """Raises `ValueError` for a conversation that doesn't end with a question, or has another number of images."""
    if not messages:
        raise ValueError("The conversation has no messages.")
    if messages[-1].get("role") != "user":
        raise ValueError("The last message is the one to answer, so it has to be the user's.")
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content or ()]
    found = sum(part.get("type") == "image" for part in parts)
    if found != num_images:
        raise ValueError(f"The messages have {found} images, but {num_images} were given.")


__all__ = ["AnswerText", "ChatProcessing", "EncodedImage", "ImageViews", "check_messages", "check_turn"]
