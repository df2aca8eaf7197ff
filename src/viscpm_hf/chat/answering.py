"""Questions in one padded batch, each answered as it would be alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import PIL.Image
import torch
from transformers.generation.streamers import BaseStreamer

from ..modeling.answering import Decoding, GenerateDecoding
from ..modeling.chat_processing import AnswerText, ChatProcessing, EncodedImage, Grid, ImageViews, Prompt
from ..pipelines.safety import UnsafeImageError
from .turns import MODES, REFUSAL, ChatTurn, check_generation, open_picture, sampling


Picture = str | os.PathLike | bytes | PIL.Image.Image


@dataclass(frozen=True)
class ChatRequest:
    """One question of a batch."""

    image: Picture | Sequence[Picture] | None
    """See [`VisCPMChat.ask`]."""
    question: str
    context: str = ""
    """What an earlier turn returned as its context, to go on with that conversation."""
    vision_hidden_states: Any = None
    """Likewise: then the image isn't encoded again."""


@dataclass
class _Row:
    """A request on its way."""

    request: ChatRequest
    seed: int | None
    earlier: list[EncodedImage] = field(default_factory=list)
    """The conversation's images so far."""
    new: list[Any] = field(default_factory=list)
    """The images that come with this question; once they are open, their keys among the batch's different ones."""
    num_own: int = 0
    """How many of them the template puts into this question's message rather than the first one's."""
    images: list[EncodedImage] = field(default_factory=list)
    prompt: Prompt | None = None
    ids: list[int] = field(default_factory=list)
    failure: Exception | None = None
    is_refused: bool = False

    @property
    def is_open(self) -> bool:
        return self.failure is None and not self.is_refused


def answer_batch(
    chat: Any,
    requests: Sequence[ChatRequest],
    *,
    mode: str = "reference",
    seed: int | Sequence[int | None] | None = None,
    return_exceptions: bool = False,
    on_text: Callable[[str], None] | None = None,
    fast: bool | None = None,
    generation: Mapping[str, Any] | None = None,
) -> list[ChatTurn]:
    """Answers several questions in one batch; every answer is that of `chat.ask` with the same seed.

    Different images are encoded once each, all in one batch. An image is recognised by its path, its bytes, or as the
    same object.

    Args:
        chat: a [`VisCPMChat`].
        requests: the questions.
        mode, fast, generation: see [`VisCPMChat.ask`].
        on_text: likewise, of a single question.
        seed: makes sampling repeatable: one for every request alone, or one for each (None: any). A row then draws on
            its own, whatever else is in the batch. Sampling with several beams (`num_beams` and `do_sample`) can't be
            told apart by rows: with the first row's seed it is repeatable for the same batch only.
        return_exceptions: a request that can't be answered gets its error (`ValueError`, `OSError`) in place of a
            turn, and the others their answers; else the first such error is raised.

    Returns:
        A turn for each request, in order. `seconds` is the time of the whole batch.
    """
    begin = time.perf_counter()
    decoding = _decoding(chat, mode, dict(generation or {}), on_text)
    rows = [_Row(request, own) for request, own in zip(requests, _seeds(seed, len(requests)), strict=True)]
    views: dict[Any, ImageViews | None] = {}
    for row in rows:
        try:
            _read(chat, row)
            _open_images(chat, row, views)
        except (ValueError, OSError) as error:
            if not return_exceptions:
                raise
            row.failure = error
    open_rows = [row for row in rows if row.is_open]
    if open_rows:
        _encode_images(chat, open_rows, views)
        _answer(chat, open_rows, decoding, on_text, fast)
    seconds = time.perf_counter() - begin
    return [row.failure or _turn(chat, row, seconds) for row in rows]


def prompt_of(chat: Any, request: ChatRequest) -> Prompt:
    """The request's prompt as far as it is known before its image is opened: as if that had one view.

    Raises:
        ValueError: for values of the wrong type, a context that is none, or a prompt that is too long.
    """
    row = _Row(request, None)
    _read(chat, row)
    return row.prompt


# -------------------------------------------------------------------------------------------------------------- before


def _decoding(chat: Any, mode: str, generation: dict[str, Any], on_text: Any) -> Decoding:
    if mode not in MODES:
        raise ValueError(f"mode is one of {', '.join(MODES)}, got {mode!r}.")
    decoding = chat.model.chat_decoding(mode, generation)
    check_generation(generation)
    if on_text is not None and not decoding.can_stream:
        needed = decoding.streaming_condition
        raise ValueError(f"Beam search knows its answer only at the end: on_text needs {needed}.")
    return decoding


def _seeds(seed: int | Sequence[int | None] | None, count: int) -> list[int | None]:
    if seed is None or isinstance(seed, Integral):
        return [seed if seed is None else int(seed)] * count
    if not isinstance(seed, Iterable) or isinstance(seed, (str, bytes)):
        raise ValueError(f"A seed is a whole number, got {seed!r}.")
    seeds = [own if own is None else int(own) for own in seed]
    if len(seeds) != count:
        raise ValueError(f"Give one seed, or one for each request: got {len(seeds)} seeds for {count} requests.")
    return seeds


def _read(chat: Any, row: _Row) -> None:
    """Encodes a row's prompt, every new image with one view: what is wrong with the text is known before an image is
    opened."""
    image, handed_on = row.request.image, row.request.vision_hidden_states
    if handed_on is not None:
        row.earlier = chat.processor.handed_on(handed_on, chat.model.config.get_text_config(decoder=True).hidden_size)
    if isinstance(image, (list, tuple)):
        if not chat.family.has_images_in_turns:
            raise ValueError(
                f"A conversation with {chat.family.title} is about one image, got a list of {len(image)}."
            )
        row.new, row.num_own = list(image), len(image)
    elif image is not None and handed_on is None:
        row.new = [image]
    _encode(chat, row, [(0, 0)] * len(row.new))


def _encode(chat: Any, row: _Row, new: list[Grid]) -> None:
    grids = [*(image.grid for image in row.earlier), *new]
    row.prompt = chat.processor.encode_turn(row.request.question, row.request.context, grids, row.num_own)


def _open_images(chat: Any, row: _Row, views: dict[Any, ImageViews | None]) -> None:
    """Opens and checks a row's images unless they are known already; `views` has None for flagged ones."""
    for place, image in enumerate(row.new):
        key = image if isinstance(image, (str, bytes)) else str(image) if isinstance(image, os.PathLike) else id(image)
        if key not in views:
            picture = open_picture(image, chat.processor.image_processor)
            is_flagged = chat.image_safety_checker is not None and chat.image_safety_checker(picture)
            views[key] = None if is_flagged else chat.processor.views_of(picture)
        row.new[place] = key
    row.is_refused = any(views[key] is None for key in row.new)
    if row.is_refused:
        if chat.image_safety_policy == "raise":
            raise UnsafeImageError("The safety checker flagged the image, so the question about it isn't answered.")
        return
    grids = [views[key].grid for key in row.new]
    if any(grid != (0, 0) for grid in grids):
        _encode(chat, row, grids)


def _encode_images(chat: Any, rows: list[_Row], views: Mapping[Any, ImageViews | None]) -> None:
    keys = list(dict.fromkeys(key for row in rows for key in row.new))
    encoded = chat.processor.encode_images(chat.model, [views[key] for key in keys]) if keys else []
    by_key = dict(zip(keys, encoded, strict=True))
    for row in rows:
        row.images = [*row.earlier, *(by_key[key] for key in row.new)]


# ----------------------------------------------------------------------------------------------------------- answering


def _answer(
    chat: Any, rows: list[_Row], decoding: Decoding, on_text: Callable[[str], None] | None, fast: bool | None
) -> None:
    model, processor = chat.model, chat.processor
    features = [[image.features.to(model.device) for image in row.images] for row in rows]
    images = [torch.cat(own) if own else None for own in features]
    inputs = processor.pad_prompts([row.prompt for row in rows], images, model)
    given = decoding.options if isinstance(decoding, GenerateDecoding) else {"do_sample": False}
    with sampling([row.seed for row in rows], given, model.generation_config, chat.device) as options:
        if on_text is not None:
            options["streamer"] = AnswerStreamer(processor, on_text, rows[0].prompt)
        answers = model.answers(inputs, decoding, processor.tokenizer, fast=fast, **options)
    for row, answer in zip(rows, answers, strict=True):
        row.ids = answer.ids


def _turn(chat: Any, row: _Row, seconds: float) -> ChatTurn:
    request, processor = row.request, chat.processor
    if row.is_refused:
        return ChatTurn(request.question, REFUSAL, request.context, None, 0, seconds)
    return ChatTurn(
        question=request.question,
        answer=processor.answer_text(row.ids, row.prompt),
        context=processor.next_context(
            request.context, request.question, row.ids, row.prompt, len(row.images), row.num_own
        ),
        vision_hidden_states=processor.hand_on(row.images) if row.new else request.vision_hidden_states,
        num_tokens=len(row.ids),
        seconds=seconds,
    )


class AnswerStreamer(BaseStreamer):
    """Hands every new piece of an answer to a function; together they are the answer."""

    def __init__(self, processor: ChatProcessing, on_text: Callable[[str], None], prompt: Prompt | None = None):
        self.on_text = on_text
        self._text = AnswerText(processor, prompt)
        self._ids: list[int] = []
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self._ids += value.flatten().tolist()
            self._tell(self._text.new_text(self._ids))
        self._has_prompt = True

    def end(self) -> None:
        self._tell(self._text.new_text(self._ids, is_last=True))

    def _tell(self, piece: str) -> None:
        if piece:
            self.on_text(piece)
