"""What goes into the engine and what comes out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from transformers.utils import logging

from ..modeling.chat_processing import ImageViews, Prompt


logger = logging.get_logger(__name__)


class EngineBusyError(RuntimeError):
    """The queue is full; `retry_after` is a guess, in seconds, of when it won't be."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class EngineClosedError(RuntimeError):
    """The engine is shutting down."""


@dataclass(frozen=True)
class PreparedImage:
    """An image as the vision tower takes it."""

    views: ImageViews
    key: str


@dataclass(frozen=True)
class PreparedPrompt:
    """A question, its conversation and images, ready for the engine."""

    prompt: Prompt
    images: tuple[PreparedImage, ...] = ()

    @property
    def num_tokens(self) -> int:
        """The prompt's, image tokens included."""
        return len(self.prompt)


@dataclass(frozen=True)
class TextScore:
    """How probable a token was."""

    token: bytes
    logprob: float
    best: tuple[tuple[bytes, float], ...] = ()
    """The most probable tokens in its place."""


@dataclass(frozen=True)
class TextPiece:
    """New text of an answer."""

    choice: int
    text: str
    scores: tuple[TextScore, ...] = ()
    """Of its tokens, if they were asked for."""


@dataclass(frozen=True)
class Finished:
    """An answer has come to its end."""

    choice: int
    reason: str
    """`"stop"`: the model or a stop string ended it; `"length"`: it reached `max_new_tokens`."""
    num_tokens: int


@dataclass(frozen=True)
class Failed:
    """Nothing more comes of this request."""

    error: Exception


Event = TextPiece | Finished | Failed


@dataclass
class Answer:
    """A whole answer, for those who don't stream."""

    text: str = ""
    reason: str = ""
    num_tokens: int = 0
    scores: list[TextScore] = dataclasses.field(default_factory=list)

    def take(self, event: TextPiece | Finished) -> None:
        """Adds what an event tells of it."""
        if isinstance(event, TextPiece):
            self.text += event.text
            self.scores += event.scores
        else:
            self.reason, self.num_tokens = event.reason, event.num_tokens


class Ticket:
    """A submitted request.

    `listener` is called with every [`Event`], from the engine's thread: it has to return at once.
    """

    def __init__(self, prompt: PreparedPrompt, num_choices: int, listener: Callable[[Event], None]):
        self.prompt = prompt
        self.num_choices = num_choices
        self.is_cancelled = False
        self.is_over = False
        self._open = num_choices
        self._listener = listener

    def cancel(self) -> None:
        """Ends the request; what is running for it stops before the next step."""
        self.is_cancelled = True

    def tell(self, event: Event) -> None:
        if self.is_over or self.is_cancelled:
            return
        if isinstance(event, Finished):
            self._open -= 1
        self.is_over = self._open == 0 or isinstance(event, Failed)
        try:
            self._listener(event)
        except Exception:
            logger.exception("a listener failed; its request is cancelled")
            self.is_cancelled = True


@dataclass
class EngineStatistics:
    """Counters since the start."""

    requests: int = 0
    rejected: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0
    rows_in_steps: int = 0
    """Divided by `steps`: how many answers were decoded together on average."""


@dataclass(frozen=True)
class EngineLimits:
    """What the engine holds at most.

    Raises:
        ValueError: for a limit below its least value.
    """

    max_rows: int = 16
    """Answers decoded together."""
    max_waiting: int = 256
    """Answers that wait for their turn."""
    max_places: int = 16_384
    """Places of the key/value cache: rows times the longest prompt and answer."""
    image_cache_bytes: int = 256 * 2**20

    def __post_init__(self):
        for entry in dataclasses.fields(self):
            value, least = getattr(self, entry.name), 0 if entry.name == "image_cache_bytes" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{entry.name} must be a whole number of at least {least}, got {value!r}.")
