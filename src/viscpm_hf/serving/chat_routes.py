"""`POST /v1/chat/completions`, and the original's `POST /viscpm`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import PIL.Image
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from ..images import ImageDecoder
from .bodies import body_of, documented
from .constraints import ANY_OBJECT
from .engine import ChatEngine
from .errors import ModelNotFoundError, error_answer
from .images import fetch, is_remote, read_base64, read_image_url
from .preparing import Picture
from .sampling import SamplingSettings
from .schemas import (
    MAX_TEXT,
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Choice,
    ChunkChoice,
    Delta,
    ImagePart,
    Logprobs,
    ResponseFormat,
    TokenLogprob,
    TopLogprob,
    Usage,
    ViscpmAnswer,
    ViscpmRequest,
    new_id,
    now,
)
from .settings import ServerSettings
from .tickets import Answer, PreparedPrompt, TextPiece, TextScore
from .waiting import EventStream, ImageInMemory, LargeImages, Places, unless_gone


if TYPE_CHECKING:
    from ..modeling.answering import Decoding

DEFAULT_MAX_TOKENS = 512
# All texts of a conversation together.
MAX_CONVERSATION = 4 * MAX_TEXT
REFERENCE_ONLY = ("num_beams", "length_penalty")
GENERATE_ONLY = ("top_p", "stop", "seed", "logprobs", "response_format")

content_log = logging.getLogger("viscpm_hf.serving.content")


def chat_router(
    engine: ChatEngine, names: Sequence[str], settings: ServerSettings, decoder: ImageDecoder, bodies: Places
) -> APIRouter:
    """
    Args:
        names: what the model may be called in requests.
        decoder: of images.
        bodies: where large bodies are read.
    """
    router = APIRouter(tags=["chat"])
    read_chat, read_viscpm = (body_of(kind, settings, bodies) for kind in (ChatCompletionRequest, ViscpmRequest))
    # Who has no images waits for nobody's; who has none elsewhere, for no host.
    texts, hosts = Places(4, "texts"), Places(8, "hosts")
    large = LargeImages()
    images = Places(decoder.num_workers + (decoder.num_slow or 0), "images")

    async def prepared(body: ChatCompletionRequest, gone: threading.Event) -> PreparedPrompt:
        urls = image_urls(body)
        if len(urls) > settings.max_images:
            raise ValueError(f"The conversation has more than {settings.max_images} images.")
        there = [url for url in dict.fromkeys(urls) if is_remote(url)]
        remote = await hosts.run(fetch_all, there, settings.remote_image_hosts) if there else {}

        def prepare() -> PreparedPrompt:
            with ImageInMemory(large, gone) as memory:

                def opened(url: str) -> PIL.Image.Image:
                    data = read_image_url(url, settings.remote_image_hosts, remote)
                    return decoder.decode(data, gone, memory.comes)

                return prepare_messages(engine, body, opened)

        return await (images if urls else texts).run(prepare)

    async def prepared_turn(body: ViscpmRequest, gone: threading.Event) -> PreparedPrompt:
        def prepare() -> PreparedPrompt:
            if body.image is None:
                return engine.prepare.turn(None, body.question, body.context)
            with ImageInMemory(large, gone) as memory:
                image = decoder.decode(read_base64(body.image), gone, memory.comes)
                return engine.prepare.turn(image, body.question, body.context)

        return await (texts if body.image is None else images).run(prepare)

    async def unless_left(request: Request, prepare: Callable, body: BaseModel) -> PreparedPrompt:
        gone = threading.Event()
        try:
            return await unless_gone(request, prepare(body, gone), settings.timeout)
        finally:
            gone.set()

    @router.post(
        "/v1/chat/completions", response_model=ChatCompletion, openapi_extra=documented(ChatCompletionRequest)
    )
    async def chat_completions(request: Request, body: ChatCompletionRequest = read_chat):
        """An answer to a conversation, whole or (`stream`) piece by piece as server-sent events."""
        if body.model not in names:
            raise ModelNotFoundError(body.model, names)
        prompt = await unless_left(request, prepared, body)
        if schema_of(body.response_format) is None:
            decoding = decoding_of(body, engine, prompt)
        else:  # which takes its time
            decoding = await texts.run(decoding_of, body, engine, prompt)
        events = EventStream(body.n or 1)
        ticket = engine.submit(prompt, decoding, events, body.n or 1)
        if body.stream:
            chunks = stream_chunks(body, prompt, events, settings)
            return StreamingResponse(cancel_at_end(chunks, ticket.cancel), media_type="text/event-stream")
        try:
            answers = await unless_gone(request, events.collect(), settings.timeout)
        finally:
            ticket.cancel()
        log_content(settings, messages=body.model_dump(exclude_none=True)["messages"], answers=answers)
        return ChatCompletion(
            model=body.model,
            choices=[
                Choice(
                    index=index,
                    message=AnswerMessage(content=answer.text),
                    finish_reason=answer.reason,
                    logprobs=logprobs_of(body, answer.scores),
                )
                for index, answer in enumerate(answers)
            ],
            usage=usage_of(prompt, answers),
        )

    @router.post("/viscpm", response_model=ViscpmAnswer, openapi_extra=documented(ViscpmRequest))
    async def viscpm(request: Request, body: ViscpmRequest = read_viscpm):
        """The original's endpoint: its answer, token for token, to a question about an image."""
        prompt = await unless_left(request, prepared_turn, body)
        events = EventStream(1)
        ticket = engine.submit(prompt, engine.reference(), events)
        try:
            (answer,) = await unless_gone(request, events.collect(), settings.timeout)
        finally:
            ticket.cancel()
        log_content(settings, question=body.question, context=body.context, answers=[answer])
        context = engine.chat.processor.next_context(body.context, body.question, answer.text)
        return ViscpmAnswer(answer=answer.text, context=context)

    return router


# ------------------------------------------------------------------------------------------------------- preparing


def image_urls(body: ChatCompletionRequest) -> list[str]:
    parts = (part for message in body.messages if not isinstance(message.content, str) for part in message.content)
    return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


def fetch_all(urls: Sequence[str], allowed_hosts: tuple[str, ...]) -> dict[str, bytes]:
    """Files on other hosts by their addresses."""
    return {url: fetch(url, allowed_hosts) for url in urls}


def texts_of(body: ChatCompletionRequest) -> Iterator[str]:
    for message in body.messages:
        if isinstance(message.content, str):
            yield message.content
        else:
            yield from (part.text for part in message.content if not isinstance(part, ImagePart))


def prepare_messages(
    engine: ChatEngine, body: ChatCompletionRequest, opened: Callable[[str], PIL.Image.Image]
) -> PreparedPrompt:
    """The messages as the processor's chat template takes them, and their images, each as `opened` by its address."""
    messages: list[dict[str, Any]] = []
    images: list[Picture] = []
    if sum(map(len, texts_of(body))) > MAX_CONVERSATION:
        raise ValueError(f"The conversation has more than {MAX_CONVERSATION:,} characters: shorten it.")
    for message in body.messages:
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            messages.append({"role": role, "content": message.content})
            continue
        content = []
        for part in message.content:
            if not isinstance(part, ImagePart):
                content.append({"type": "text", "text": part.text})
                continue
            if role != "user":
                raise ValueError(f"Images come in user messages, not in those of the {role}.")
            images.append(functools.partial(opened, part.image_url.url))
            content.append({"type": "image"})
        messages.append({"role": role, "content": content})
    return engine.prepare.messages(messages, images)


def decoding_of(
    body: ChatCompletionRequest, engine: ChatEngine, prompt: PreparedPrompt
) -> SamplingSettings | Decoding:
    """The decoding that was asked for; an answer is as long as there is room if nothing was said of its length."""
    max_tokens = body.max_completion_tokens or body.max_tokens
    given = {name: getattr(body, name) for name in ("temperature", "repetition_penalty") if getattr(body, name)}
    is_reference = body.mode == "reference"
    schema = schema_of(body.response_format)
    for name in GENERATE_ONLY if is_reference else REFERENCE_ONLY:
        value = schema if name == "response_format" else getattr(body, name)
        if value not in (None, False, []):
            other = "generate" if is_reference else "reference"
            raise ValueError(f'{name} belongs to mode "{other}".')
    if is_reference:
        given |= {name: getattr(body, name) for name in REFERENCE_ONLY if getattr(body, name) is not None}
        return engine.reference(max_new_tokens=max_tokens or DEFAULT_MAX_TOKENS, **given)
    room = engine.limits.max_places - prompt.num_tokens
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return SamplingSettings(
        max_new_tokens=max_tokens or max(1, min(DEFAULT_MAX_TOKENS, room)),
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stop=stop,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=None if schema is None else engine.constraints.of_schema(schema),
        **given,
    )


def schema_of(form: ResponseFormat | None) -> Any:
    """The JSON schema that an answer has to have; None for plain text."""
    if form is None or form.type == "text":
        return None
    return ANY_OBJECT if form.json_schema is None else form.json_schema.schema_


# ------------------------------------------------------------------------------------------------------- answering


def logprobs_of(body: ChatCompletionRequest, scores: Sequence[TextScore]) -> Logprobs | None:
    """If they were asked for."""
    if not body.logprobs:
        return None

    def fields(token: bytes, logprob: float) -> dict[str, Any]:
        return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}

    return Logprobs(
        content=[
            TokenLogprob(
                **fields(score.token, score.logprob), top_logprobs=[TopLogprob(**fields(*best)) for best in score.best]
            )
            for score in scores
        ]
    )


def usage_of(prompt: PreparedPrompt, answers: Sequence[Answer]) -> Usage:
    num_tokens = sum(answer.num_tokens for answer in answers)
    total = prompt.num_tokens + num_tokens
    return Usage(prompt_tokens=prompt.num_tokens, completion_tokens=num_tokens, total_tokens=total)


async def stream_chunks(
    body: ChatCompletionRequest, prompt: PreparedPrompt, events: EventStream, settings: ServerSettings
) -> AsyncIterator[str]:
    """Server-sent events; an error on the way is the last of them, as in OpenAI's API."""
    chunk_id, created = new_id("chatcmpl"), now()
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    answers = [Answer() for _ in range(events.num_choices)]

    def chunk(choices: list[ChunkChoice], **fields) -> str:
        entry = ChatCompletionChunk(id=chunk_id, created=created, model=body.model, choices=choices, **fields)
        return entry.as_event(with_usage)

    for index in range(events.num_choices):
        yield chunk([ChunkChoice(index=index, delta=Delta(role="assistant", content=""))])
    try:
        async with asyncio.timeout(settings.timeout):
            async for event in events:
                answers[event.choice].take(event)
                if isinstance(event, TextPiece):
                    logprobs = logprobs_of(body, event.scores)
                    yield chunk([ChunkChoice(index=event.choice, delta=Delta(content=event.text), logprobs=logprobs)])
                else:
                    yield chunk([ChunkChoice(index=event.choice, delta=Delta(), finish_reason=event.reason)])
    except Exception as error:
        yield f"data: {json.dumps(error_answer(error, settings).body)}\n\n"
        return
    if with_usage:
        yield chunk([], usage=usage_of(prompt, answers))
    yield "data: [DONE]\n\n"
    log_content(settings, messages=body.model_dump(exclude_none=True)["messages"], answers=answers)


async def cancel_at_end(chunks: AsyncIterator[str], cancel) -> AsyncIterator[str]:
    """The chunks; when they end, or nobody reads them any more, the request is cancelled."""
    try:
        async with contextlib.aclosing(chunks) as pieces:
            async for chunk in pieces:
                yield chunk
    finally:
        cancel()


def log_content(settings: ServerSettings, **fields) -> None:
    """Prompts and answers, if asked for; pictures never."""
    if settings.log_content:
        fields["answers"] = [answer.text for answer in fields["answers"]]
        content_log.info(json.dumps({"event": "answer", **_without_pictures(fields)}, ensure_ascii=False))


def _without_pictures(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: "..." if key == "url" else _without_pictures(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_pictures(entry) for entry in value]
    return value
