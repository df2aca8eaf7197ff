"""The API's requests and answers, in OpenAI's terms; what they don't have is marked as an extension."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints


MAX_TEXT = 65_536
MAX_CHOICES = 8

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Request(BaseModel):
    """An unknown field is an error, not ignored: nothing that was asked for is silently left out."""

    model_config = ConfigDict(extra="forbid")


# ------------------------------------------------------------------------------------------------------------ chat


class ImageUrl(Request):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(Request):
    type: Literal["text"]
    text: Text


class ImagePart(Request):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(max_length=64)]
    name: str | None = None
    refusal: None = None


class StreamOptions(Request):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatCompletionRequest(Request):
    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0, the best token each time, unless given."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Taken for the sake of clients that send them; other values are refused.
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    # Say nothing about the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    # Extensions.
    mode: Literal["generate", "reference"] = "generate"
    """`reference`: the original's beam search, whose parameters are those below."""
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    num_beams: Annotated[int, Field(ge=1, le=8)] | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class Usage(BaseModel):
    prompt_tokens: int
    """With those of the pictures."""
    completion_tokens: int
    total_tokens: int


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    return int(time.time())


class ChatCompletion(BaseModel):
    id: str = Field(default_factory=lambda: new_id("chatcmpl"))
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=now)
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ViscpmRequest(Request):
    """The original's endpoint."""

    image: str | None = None
    """Base64 of an image file."""
    question: Text
    context: Text = ""
    """What an earlier answer returned, to go on with its conversation."""


class ViscpmAnswer(BaseModel):
    answer: str
    context: str
    """Give it back with the next question."""


# ----------------------------------------------------------------------------------------------------------- paint


class ImagesRequest(Request):
    prompt: Annotated[str, StringConstraints(min_length=1, max_length=4096)]
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    size: Annotated[str, StringConstraints(pattern=r"^([1-9]\d{0,3}x[1-9]\d{0,3}|auto)$")] | None = None
    quality: Literal["auto", "low", "medium", "standard", "high", "hd"] | None = None
    """`low`: 10 steps, `medium` and `standard`: 25, `high` and `hd`: 50."""
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    user: str | None = None
    # Extensions.
    negative_prompt: Annotated[str, StringConstraints(max_length=4096)] | None = None
    seed: Seed | None = None
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=50)] | None = None
    preset: Literal["fast", "quality", "reference"] | None = None
    """Scheduler, steps and guidance; `steps` and `guidance_scale` beside it count, `quality` is refused."""


class DrawnImage(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    revised_prompt: None = None
    seed: int | None = None
    """Extension: draws this very picture again."""
    flagged: bool = False
    """Extension: whether a checker flagged it; it is black then."""


class ImagesAnswer(BaseModel):
    created: int = Field(default_factory=now)
    data: list[DrawnImage]


# ---------------------------------------------------------------------------------------------------------- others


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "viscpm-hf"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok", "closing"]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    error: ErrorDetail
