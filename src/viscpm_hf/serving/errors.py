"""What goes wrong, as HTTP answers in OpenAI's form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from ..images import DecoderBusyError, DecodingCancelledError
from ..pipelines.prompt_safety import UnsafePromptError
from ..pipelines.safety import UnsafeImageError
from .bodies import BodyError
from .guard import error_body
from .paint_engine import DrawingCancelledError
from .settings import ServerSettings
from .tickets import EngineBusyError, EngineClosedError
from .waiting import ClientGoneError


logger = logging.get_logger(__name__)


class ModelNotFoundError(ValueError):
    """The request names a model that isn't served."""

    def __init__(self, name: str, served: Sequence[str]):
        names = ", ".join(repr(entry) for entry in served)
        super().__init__(f"There is no model {name[:100]!r} here; this server has {names}.")


@dataclass(frozen=True)
class ErrorAnswer:
    """Status, JSON body and headers."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


def error_answer(error: Exception, settings: ServerSettings) -> ErrorAnswer:
    """The answer to a request that ended in `error`; of errors that aren't the client's it says nothing but that."""
    text = str(error)
    if isinstance(error, BodyError):
        return ErrorAnswer(error.status, error_body(text, "invalid_request_error", param=error.param))
    if isinstance(error, EngineBusyError | DecoderBusyError):
        retry = {"Retry-After": str(round(error.retry_after))}
        return ErrorAnswer(429, error_body(text, "rate_limit_error", "rate_limit_exceeded"), retry)
    if isinstance(error, EngineClosedError):
        return ErrorAnswer(503, error_body(text, "server_error", "shutting_down"), {"Retry-After": "30"})
    if isinstance(error, TimeoutError):
        text = text or f"There was no answer within {settings.timeout:g} seconds."
        return ErrorAnswer(504, error_body(text, "server_error", "timeout"))
    if isinstance(error, (UnsafeImageError, UnsafePromptError)):
        return ErrorAnswer(400, error_body(text, "invalid_request_error", "content_policy_violation"))
    if isinstance(error, ModelNotFoundError):
        return ErrorAnswer(404, error_body(text, "invalid_request_error", "model_not_found", "model"))
    if isinstance(error, (ClientGoneError, DecodingCancelledError, DrawingCancelledError)):
        text = "The client closed the connection, or its side of it, before there was an answer."
        return ErrorAnswer(499, error_body(text, "invalid_request_error"), {"Connection": "close"})
    if isinstance(error, ValueError):
        return ErrorAnswer(400, error_body(text, "invalid_request_error"))
    logger.error("a request failed", exc_info=error)
    return ErrorAnswer(500, error_body("The server failed on this request.", "server_error", "internal_error"))
