"""Several questions in one padded batch, each answered as it would be alone."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from transformers import BatchFeature
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..modeling.document_cpm_bee import EncodedDocument
from ..modeling.generation_cpm_bee import reference_decoding
from ..modeling.processing_viscpm_chat import ChatPrompt
from ..pipelines.safety import UnsafeImageError
from .turns import MODES, REFUSAL, ChatTurn, check_generation, open_picture, sampling


@dataclass(frozen=True)
class ChatRequest:
    """One question of a batch."""

    image: str | os.PathLike | bytes | PIL.Image.Image | None
    """The picture; None for none, or to go on with `vision_hidden_states`."""
    question: str
    context: str = ""
    """What an earlier turn returned as its context, to go on with that conversation."""
    vision_hidden_states: torch.Tensor | None = None
    """Likewise, `(images, queries, hidden)`: then the image isn't encoded again."""


@dataclass
class _Row:
    """A request on its way."""

    request: ChatRequest
    seed: int | None
    escaped: str = ""
    document: EncodedDocument | None = None
    picture: Any = None
    """Which of the batch's different pictures it is; None without a picture to encode."""
    vision_hidden_states: torch.Tensor | None = None
    ids: list[int] | None = None
    strings: Mapping[int, str] | None = None
    failure: Exception | None = None
    is_refused: bool = False

    @property
    def is_open(self) -> bool:
        return self.failure is None and not self.is_refused


def encode_request(chat: Any, request: ChatRequest) -> EncodedDocument:
    """The request's prompt as it goes into the model; its length is the prompt's. No picture is opened.

    Raises:
        ValueError: for values of the wrong type, context that is not document syntax, or a prompt that is too long.
    """
    for name in ("question", "context"):
        value = getattr(request, name)
        if not isinstance(value, str):
            raise ValueError(f"A {name} is a str, got {type(value).__name__}.")
    num_images = int(request.image is not None)
    if request.vision_hidden_states is not None:
        num_images = chat._check_vision_hidden_states(request.vision_hidden_states)
    processor = chat.processor
    document = {"context": request.context, "question": processor.tokenizer.escape(request.question), "<ans>": ""}
    encoded = processor.encode_prompt(ChatPrompt(document, num_images))
    processor.check_length(encoded)
    return encoded


@torch.no_grad()
def answer_batch(
    chat: Any,
    requests: Sequence[ChatRequest],
    *,
    mode: str = "reference",
    seed: int | Sequence[int | None] | None = None,
    return_exceptions: bool = False,
    generation: Mapping[str, Any] | None = None,
) -> list[ChatTurn]:
    """Answers several questions in one batch; every answer is that of `chat.ask` with the same seed.

    Different pictures are encoded once each, all in one batch. A picture is recognised by its path, its bytes, or as
    the same object.

    Args:
        chat: the model.
        requests: the questions.
        mode, generation: see [`VisCPMChat.ask`].
        seed: makes sampling repeatable: one for every request alone, or one for each (None: any). A row then draws on
            its own, whatever else is in the batch. Sampling with several beams (`num_beams` and `do_sample`) can't be
            told apart by rows: with the first row's seed it is repeatable for the same batch only.
        return_exceptions: a request that can't be answered gets its error (`ValueError`, `OSError`) in place of a
            turn, and the others their answers; else the first such error is raised.

    Returns:
        A turn for each request, in order. `seconds` is the time of the whole batch.
    """
    generation = dict(generation or {})
    if mode not in MODES:
        raise ValueError(f"mode is one of {', '.join(MODES)}, got {mode!r}.")
    decoding = reference_decoding(generation) if mode == "reference" else None
    check_generation(generation)
    rows = [_Row(request, own) for request, own in zip(requests, _seeds(seed, len(requests)), strict=True)]
    begin = time.perf_counter()

    pictures: dict[Any, Any] = {}
    for row in rows:
        try:
            _prepare(chat, row, pictures)
        except (ValueError, OSError) as error:
            if not return_exceptions:
                raise
            row.failure = error
    _encode_pictures(chat, [row for row in rows if row.is_open], pictures)
    answered = [row for row in rows if row.is_open]
    if answered and mode == "reference":
        _search(chat, answered, decoding)
    elif answered:
        _generate(chat, answered, generation)
    seconds = time.perf_counter() - begin
    return [row.failure or _turn(chat, row, seconds) for row in rows]


def _seeds(seed: int | Sequence[int | None] | None, count: int) -> list[int | None]:
    if seed is None or isinstance(seed, int):
        return [seed] * count
    seeds = list(seed)
    if len(seeds) != count:
        raise ValueError(f"Give one seed, or one for each request: got {len(seeds)} seeds for {count} requests.")
    return seeds


# -------------------------------------------------------------------------------------------------------------- before


def _prepare(chat: Any, row: _Row, pictures: dict[Any, Any]) -> None:
    """Encodes a row's prompt, and opens and checks its picture unless that is known already."""
    request = row.request
    row.document = encode_request(chat, request)
    row.escaped = chat.processor.tokenizer.escape(request.question)
    row.vision_hidden_states = request.vision_hidden_states
    if request.image is None or request.vision_hidden_states is not None:
        return
    image = request.image
    key = image if isinstance(image, (str, bytes)) else str(image) if isinstance(image, os.PathLike) else id(image)
    if key not in pictures:
        picture = open_picture(image, chat.processor.image_processor)
        if chat.image_safety_checker is not None and chat.image_safety_checker(picture):
            pictures[key] = None
        else:
            pictures[key] = chat.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    if pictures[key] is None:
        if chat.image_safety_policy == "raise":
            raise UnsafeImageError("The safety checker flagged the image, so the question about it isn't answered.")
        row.is_refused = True
    row.picture = key


def _encode_pictures(chat: Any, rows: list[_Row], pictures: dict[Any, Any]) -> None:
    keys = list(dict.fromkeys(row.picture for row in rows if row.picture is not None))
    if not keys:
        return
    pixel_values = torch.cat([pictures[key] for key in keys])
    features = chat.model.get_image_features(pixel_values.to(chat.device)).pooler_output
    by_key = dict(zip(keys, features.split(1), strict=True))
    for row in rows:
        if row.picture is not None:
            row.vision_hidden_states = by_key[row.picture]


def _inputs(chat: Any, rows: list[_Row], *, with_answer_start: bool) -> BatchFeature:
    prompts = [row.document.prompt(open_slot=0 if with_answer_start else None) for row in rows]
    inputs = chat.processor.tokenizer.collate(prompts, padding_side="left", return_tensors="pt").to(chat.device)
    encoded = [row.vision_hidden_states for row in rows if row.vision_hidden_states is not None]
    if encoded:
        together = torch.cat([features.to(chat.device, chat.model.dtype) for features in encoded])
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=together)}
    for row, strings in zip(rows, inputs.extension_strings, strict=True):
        row.strings = strings
    return inputs


# ----------------------------------------------------------------------------------------------------------- answering


def _search(chat: Any, rows: list[_Row], decoding: Any) -> None:
    inputs = _inputs(chat, rows, with_answer_start=False)
    slots = [[row.document.answer_slots[0].segment_id] for row in rows]
    for row, result in zip(rows, chat.model.reference_search(inputs, slots, decoding), strict=True):
        row.ids = result.token_ids[0]


def _generate(chat: Any, rows: list[_Row], generation: dict[str, Any]) -> None:
    inputs = _inputs(chat, rows, with_answer_start=True)
    with sampling([row.seed for row in rows], generation, chat.model.generation_config, chat.device) as options:
        for row, ids in zip(rows, chat._generate_rows(inputs, {**generation, **options}), strict=True):
            row.ids = ids


def _turn(chat: Any, row: _Row, seconds: float) -> ChatTurn:
    request = row.request
    if row.is_refused:
        return ChatTurn(request.question, REFUSAL, request.context, None, 0, seconds)
    tokenizer = chat.processor.tokenizer
    answer = tokenizer.decode(row.ids, extension_table=row.strings)
    return ChatTurn(
        question=request.question,
        answer=tokenizer.unescape(answer),
        context=f"{request.context}User: {row.escaped}\nAI: {answer}\n",
        vision_hidden_states=row.vision_hidden_states,
        num_tokens=len(row.ids),
        seconds=seconds,
    )


__all__ = ["ChatRequest", "answer_batch", "encode_request"]
