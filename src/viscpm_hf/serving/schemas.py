"""The API's requests and answers, in OpenAI's terms; what they don't have is marked as an extension.

Of the official API's fields, those that are null or ask for nothing are taken: clients send them unasked. What would
change the answer and isn't there is refused by its name, never ignored.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)


MAX_TEXT = 65_536
MAX_CHOICES = 8
MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def only(*neutral: Any, hint: str = "") -> AfterValidator:
    """A field that may be there as long as it asks for nothing."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(entry) and value == entry for entry in neutral):
            raise ValueError(f"This isn't supported here: leave it out{hint}.")
        return value

    return AfterValidator(check)


class Request(BaseModel):
    """An unknown field is an error, not ignored: nothing that was asked for is silently left out. Null is the same as
    not given, as everywhere in the official API."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        needed = {name for name, field in cls.model_fields.items() if field.is_required()}
        return {name: entry for name, entry in value.items() if entry is not None or name in needed}


# ------------------------------------------------------------------------------------------------------------ chat


class ImageUrl(Request):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class CacheControl(Request):
    """Says where a provider's cache may begin, which changes no answer."""

    type: Literal["ephemeral"]
    ttl: str | None = None


class TextPart(Request):
    type: Literal["text"]
    text: Text
    cache_control: CacheControl | None = None
    annotations: Annotated[list[Any], only([])] | None = None


def _with_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class ImagePart(Request):
    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_with_url)]
    """An object, or the address itself."""
    cache_control: CacheControl | None = None


def kind_of_part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in ("text", "image_url") else None


Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")],
    Discriminator(
        kind_of_part,
        custom_error_type="part_type",
        custom_error_message="A part is an object whose type is 'text' or 'image_url'; others aren't supported here.",
    ),
]


def kind_of_content(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<parts>" if isinstance(value, list) else None


Content = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[Part], Field(max_length=64), Tag("<parts>")],
    Discriminator(
        kind_of_content,
        custom_error_type="content_type",
        custom_error_message="The content of a message is text, or a list of parts.",
    ),
]


class Message(Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None
    cache_control: CacheControl | None = None
    # As answers have them; see `ChatCompletionRequest` for what is refused.
    refusal: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None
    tool_calls: Annotated[Any, only([])] = None
    reasoning_content: Annotated[Any, only("")] = None

    @model_validator(mode="before")
    @classmethod
    def _empty_answer(cls, value: Any) -> Any:
        """An answer without content, as it may be given back, says nothing."""
        if isinstance(value, dict) and value.get("role") == "assistant" and value.get("content") is None:
            return {**value, "content": ""}
        return value


class StreamOptions(Request):
    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(Request):
    """What an answer has to look like."""

    name: Annotated[str, StringConstraints(max_length=64)]
    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")] = Field(default_factory=dict)
    description: Text | None = None
    strict: bool | None = None


class ResponseFormat(Request):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("The type json_schema needs the field json_schema, which no other type has.")
        return self


def check_stop(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MAX_STOPS:
        raise ValueError(f"There may be up to {MAX_STOPS} stop strings, got {len(value)}.")
    return value


def kind_of_stop(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<texts>" if isinstance(value, list) else None


Stop = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[Text], Field(max_length=MAX_STOPS), Tag("<texts>")],
    Discriminator(kind_of_stop, custom_error_type="stop_type", custom_error_message="A string, or a list of strings."),
    BeforeValidator(check_stop),
]


class ChatCompletionRequest(Request):
    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0, the best token each time, unless given."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    """Gives the log-probability of every token, before temperature and penalties."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    # Taken as long as they ask for nothing.
    tool_choice: Annotated[Any, only("none", "auto", hint=", or send 'none'")] = None
    tools: Any = None
    function_call: Annotated[Any, only("none", "auto")] = None
    functions: Annotated[Any, only([])] = None
    logit_bias: Annotated[Any, only({})] = None
    frequency_penalty: Annotated[Any, only(0, 0.0, hint=", or send 0")] = None
    presence_penalty: Annotated[Any, only(0, 0.0, hint=", or send 0")] = None
    modalities: Annotated[Any, only(["text"], [], hint=", or send ['text']")] = None
    audio: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None
    reasoning_effort: Annotated[Any, only("none", "medium", hint=": the model doesn't think before it answers")] = None
    verbosity: Annotated[Any, only("medium")] = None
    # Say nothing about the answer.
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None
    service_tier: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    # Extensions.
    mode: Literal["generate", "reference"] = "generate"
    """`reference`: the original's beam search, whose parameters are those below."""
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    num_beams: Annotated[int, Field(ge=1, le=8)] | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None

    @field_validator("tools")
    @classmethod
    def _no_tools(cls, value: Any, information: ValidationInfo) -> Any:
        if value in (None, []) or (isinstance(value, list) and information.data.get("tool_choice") == "none"):
            return value
        raise ValueError("The model can't call tools: leave them out, or send tool_choice 'none'.")

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_length(cls, value: int | None, information: ValidationInfo) -> int | None:
        other = information.data.get("max_tokens")
        if None not in (value, other) and value != other:
            raise ValueError(f"It is {value}, but max_tokens, its old name, is {other}: send one of them.")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: int | None, information: ValidationInfo) -> int | None:
        if value and not information.data.get("logprobs"):
            raise ValueError("It needs logprobs: true.")
        return value


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: Logprobs | None = None


class Usage(BaseModel):
    prompt_tokens: int
    """With those of the images."""
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
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    """With `include_usage` null in all chunks but the last; without, it isn't there."""

    def as_event(self, with_usage: bool) -> str:
        """A server-sent event; of a delta, only what is new is there."""
        fields = self.model_dump(exclude=None if with_usage else {"usage"})
        for choice in fields["choices"]:
            choice["delta"] = {name: value for name, value in choice["delta"].items() if value is not None}
        return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"


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
    # Taken as long as they ask for nothing.
    background: Annotated[Any, only("auto", "opaque")] = None
    moderation: Annotated[Any, only("auto")] = None
    style: Annotated[Any, only()] = None
    stream: Annotated[Any, only(False)] = None
    partial_images: Annotated[Any, only(0)] = None
    output_compression: Annotated[Any, only(100)] = None
    # Says nothing about the image.
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
    """Extension: draws this image again. To the last bit, if it was asked for with a seed; what is drawn beside other
    requests may differ from that by a level of 255."""
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
