"""The engine: one thread that answers the questions of many requests together.

Requests are prepared (tokenised, images decoded) by whoever submits them and wait in a bounded queue. The engine's
thread takes them into a [`ContinuousBatch`] as soon as there is room, between two steps of those already running.
Questions to be answered by the reference decoding are searched in groups of the same parameters; between two steps of
a search the continuous batch makes one of its own, so neither waits for the other to end as long as there is room for
both.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers.utils import logging

from ..chat.chat import VisCPMChat
from ..modeling.answering import Decoding
from ..modeling.chat_processing import AnswerText
from .constraints import Constraints
from .continuous_batch import ContinuousBatch, Row
from .image_cache import ImageCache
from .preparing import ImageEncoder, PromptPreparer
from .sampling import Sampler, SamplingSettings, TokenScore
from .tickets import (
    Answer,
    EngineBusyError,
    EngineClosedError,
    EngineLimits,
    EngineStatistics,
    Event,
    Failed,
    Finished,
    PreparedPrompt,
    TextPiece,
    TextScore,
    Ticket,
)


logger = logging.get_logger(__name__)


@dataclass
class _Untold:
    """The score of a token whose text isn't told yet."""

    score: TextScore
    num_left: int
    """Characters."""
    is_begun: bool = False
    """Whether those before them were told."""


@dataclass(eq=False)
class _Choice:
    """One of a request's answers."""

    ticket: Ticket
    index: int
    row: Row
    pending: str = ""
    """Text that may turn out to begin a stop string."""
    scores: deque[_Untold] = field(default_factory=deque)

    def told(self, num_characters: int, is_over: bool) -> tuple[TextScore, ...]:
        """The scores of the tokens whose text that was; in the end also of the one whose text was cut."""
        scores = []
        while self.scores and self.scores[0].num_left <= num_characters:
            entry = self.scores.popleft()
            num_characters -= entry.num_left
            scores.append(entry.score)
        if self.scores:
            entry = self.scores[0]
            entry.num_left -= num_characters
            entry.is_begun |= num_characters > 0
            if is_over and entry.is_begun:
                scores.append(entry.score)
        return tuple(scores)


@dataclass(eq=False)
class Search:
    """A request for the reference decoding."""

    ticket: Ticket
    decoding: Decoding

    @property
    def num_places(self) -> int:
        """Places of the cache that it may come to take."""
        return self.ticket.prompt.num_tokens + self.decoding.num_beams * (self.decoding.last_step + 1)


@dataclass(frozen=True)
class _Share:
    """What a group of answers takes of the engine's limits."""

    rows: int = 0
    places: int = 0

    @classmethod
    def of_rows(cls, rows: Sequence[Row]) -> _Share:
        return cls(len(rows), len(rows) * max((row.max_length for row in rows), default=0))

    @classmethod
    def of_searches(cls, group: Sequence[Search]) -> _Share:
        num_beams = sum(entry.decoding.num_beams for entry in group)
        return cls(num_beams, len(group) * max(entry.num_places for entry in group))

    def fits_beside(self, other: _Share, max_rows: int, max_places: int) -> bool:
        return self.rows + other.rows <= max_rows and self.places + other.places <= max_places


class SearchAbandonedError(Exception):
    """Nobody waits for the search any more."""


class _Pace:
    """How often an answer is finished while there is work, as a running mean."""

    def __init__(self):
        self.seconds_per_answer = 0.5
        self._last = time.monotonic()

    def begin(self) -> None:
        self._last = time.monotonic()

    def finished(self) -> None:
        now = time.monotonic()
        self.seconds_per_answer += 0.1 * (now - self._last - self.seconds_per_answer)
        self._last = now


@dataclass(eq=False)
class _Queue:
    """What waits, and the lock of everything that two threads touch."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    choices: deque[_Choice] = field(default_factory=deque)
    searches: deque[Search] = field(default_factory=deque)
    is_open: bool = True
    drain: bool = True

    def __len__(self) -> int:
        return len(self.choices) + len(self.searches)

    def forget_cancelled(self) -> None:
        """For when there is no room: what nobody waits for takes none."""
        self.choices = deque(choice for choice in self.choices if not choice.ticket.is_cancelled)
        self.searches = deque(search for search in self.searches if not search.ticket.is_cancelled)


class ChatEngine:
    """Answers questions to a [`VisCPMChat`] of many callers together.

    ```python
    >>> engine = ChatEngine(VisCPMChat("viscpm-tiny"))
    >>> prompt = engine.prepare.turn(picture, "What colour is the circle?")
    >>> engine.answer(prompt, SamplingSettings(max_new_tokens=32))[0].text
    >>> engine.close()
    ```
    """

    def __init__(self, chat: VisCPMChat, limits: EngineLimits | None = None):
        self.chat = chat
        self.limits = limits or EngineLimits()
        self.statistics = EngineStatistics()
        self.image_cache = ImageCache(self.limits.image_cache_bytes)
        self.prepare = PromptPreparer(chat)
        self._encode_images = ImageEncoder(chat, self.image_cache)
        self._batch = ContinuousBatch(chat.model, chat.processor)
        self._queue = _Queue()
        self._running: dict[Row, _Choice] = {}
        self._max_rows = self.limits.max_rows
        self._pace = _Pace()
        self._searching = _Share()
        self._num_searching = 0
        self._search_waits = False
        """There is a search for which the batch leaves no room."""
        self.constraints = Constraints(chat.processor.vocabulary_bytes, chat.processor.tokenizer.eos_token_id)
        self._thread = threading.Thread(target=self._run, name="viscpm-hf-engine", daemon=True)
        self._thread.start()

    # ----------------------------------------------------------------------------------------------------- for callers

    def reference(self, **options) -> Decoding:
        """The original's decoding, with other values where `options` has them."""
        return self.chat.model.chat_decoding("reference", options)

    def submit(
        self,
        prompt: PreparedPrompt,
        decoding: SamplingSettings | Decoding,
        listener: Callable[[Event], None],
        num_choices: int = 1,
    ) -> Ticket:
        """Queues a request; `num_choices` answers are sampled independently.

        Raises:
            EngineBusyError: if the queue is full.
            EngineClosedError: after [`close`].
            ValueError: if the request is larger than the engine's limits.
        """
        ticket = Ticket(prompt, num_choices, listener)
        if not isinstance(decoding, SamplingSettings):
            if num_choices != 1:
                raise ValueError("The reference decoding has one answer: ask for n=1, or for sampling.")
            choices = []
            self._check_size(Search(ticket, decoding).num_places, "prompt and beams")
        else:
            self._check_size(prompt.num_tokens + decoding.max_new_tokens, "prompt and answer")
            choices = [self._new_choice(ticket, index, decoding) for index in range(num_choices)]
        with self._queue.changed:
            if not self._queue.is_open:
                raise EngineClosedError("The server is shutting down.")
            if len(self._queue) + num_choices > self.limits.max_waiting:
                self._queue.forget_cancelled()
            if len(self._queue) + num_choices > self.limits.max_waiting:
                self.statistics.rejected += 1
                waiting = len(self._queue)
                raise EngineBusyError(
                    f"{waiting} answers are waiting already, the limit is {self.limits.max_waiting}: try again later.",
                    retry_after=max(1.0, waiting * self._pace.seconds_per_answer),
                )
            self.statistics.requests += 1
            self.statistics.prompt_tokens += prompt.num_tokens
            if choices:
                self._queue.choices.extend(choices)
            else:
                self._queue.searches.append(Search(ticket, decoding))
            self._queue.changed.notify_all()
        return ticket

    def answer(
        self,
        prompt: PreparedPrompt,
        decoding: SamplingSettings | Decoding,
        num_choices: int = 1,
        timeout: float | None = None,
    ) -> list[Answer]:
        """Waits for whole answers.

        Raises:
            TimeoutError: after `timeout` seconds; the request is cancelled.
            Exception: what went wrong with this request.
        """
        answers, over, errors = [Answer() for _ in range(num_choices)], threading.Event(), []
        unfinished = [num_choices]

        def listen(event: Event) -> None:
            if isinstance(event, Failed):
                errors.append(event.error)
            else:
                answers[event.choice].take(event)
                unfinished[0] -= isinstance(event, Finished)
            if errors or not unfinished[0]:
                over.set()

        ticket = self.submit(prompt, decoding, listen, num_choices)
        if not over.wait(timeout):
            ticket.cancel()
            raise TimeoutError(f"There was no answer within {timeout:g} seconds.")
        if errors:
            raise errors[0]
        return answers

    def close(self, drain: bool = True, timeout: float | None = None) -> bool:
        """Takes no more requests and ends: after the ones at hand are answered, or at once.

        Returns:
            Whether all of them were answered; those that weren't within `timeout` seconds fail.
        """
        with self._queue.changed:
            self._queue.is_open = False
            self._queue.drain = drain
            self._queue.changed.notify_all()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return drain
        with self._queue.changed:
            self._queue.drain = False
            self._queue.changed.notify_all()
        self._thread.join()
        return False

    @property
    def is_open(self) -> bool:
        return self._queue.is_open

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_running(self) -> int:
        return len(self._batch.rows) + self._num_searching

    def _check_size(self, places: int, what: str) -> None:
        if places > self.limits.max_places:
            raise ValueError(
                f"The {what} may take {places:,} tokens, but the server has room for {self.limits.max_places:,}: "
                "ask for a shorter answer, or shorten the conversation."
            )

    def _new_choice(self, ticket: Ticket, index: int, settings: SamplingSettings) -> _Choice:
        if settings.seed is not None and index:  # answers of one request shall differ, and yet be repeatable
            settings = dataclasses.replace(settings, seed=(settings.seed + index) % 2**63)
        prompt = ticket.prompt.prompt
        return _Choice(ticket, index, Row(prompt, Sampler(settings), AnswerText(self.chat.processor, prompt)))

    # --------------------------------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                search = self._next_search()
                if search:
                    self._search(search)
                else:
                    self._turn()
        finally:
            self._fail_everything(EngineClosedError("The server is shutting down."))

    def _wait_for_work(self) -> bool:
        """False when it is time to end."""
        queue = self._queue
        with queue.changed:
            while True:
                has_work = bool(queue) or bool(self._batch.rows)
                if not queue.is_open and (not queue.drain or not has_work):
                    return False
                if has_work:
                    return True
                queue.changed.wait()
                self._pace.begin()

    def _turn(self) -> None:
        """Those who are done leave, those who wait come in, and everyone gets a token."""
        if self._queue.is_open or self._queue.drain:
            self._leave()
            if self._batch.rows:
                self._guarded_step()
            self._admit()

    def _leave(self) -> None:
        """Rows whose caller is gone leave."""
        self._keep([row for row in self._batch.rows if not self._running[row].ticket.is_cancelled])

    def _keep(self, rows: list[Row]) -> None:
        """All others leave. That takes memory for a moment; where there is none, those who stay come in anew."""
        choices = [self._running[row] for row in rows]
        is_kept = True
        try:
            self._batch.keep(rows)
        except Exception as error:
            logger.warning("%d rows could not be kept (%s); each comes in alone", len(rows), error)
            is_kept = False
        self._running = dict(zip(rows, choices, strict=True))
        if not is_kept:
            self._batch.clear()
            self._running.clear()
            for choice in choices:
                self._join_alone(choice)

    def _admit(self) -> None:
        """Takes in what waits, as far as there is room."""
        coming: list[_Choice] = []
        if self._search_waits:
            return
        with self._queue.changed:
            waiting = self._queue.choices
            while waiting:
                choice = waiting[0]
                if choice.ticket.is_cancelled or choice.ticket.is_over:
                    waiting.popleft()
                    continue
                share = _Share.of_rows([*self._batch.rows, *(other.row for other in coming), choice.row])
                is_alone = share.rows == 1 and not self._searching.rows
                if not is_alone and not share.fits_beside(self._searching, self._max_rows, self.limits.max_places):
                    break
                coming.append(waiting.popleft())
        if not coming:
            return
        try:
            self._join(coming)
        except Exception as error:
            logger.debug("joining %d rows failed (%s); each tries alone", len(coming), error)
        else:
            return
        for choice in coming:  # not within `except`, where the error would keep alive what they had allocated
            if choice.row not in self._running:
                self._join_alone(choice)

    def _join(self, choices: list[_Choice]) -> None:
        images = self._encode_images([choice.ticket.prompt for choice in choices])
        for choice, image in zip(choices, images, strict=True):
            choice.row.image = image
        tokens = self._batch.join([choice.row for choice in choices])
        self._running |= {choice.row: choice for choice in choices}
        self._take_tokens(choices, tokens)

    def _join_alone(self, choice: _Choice) -> None:
        try:
            self._join([choice])
        except Exception as error:
            self._fail(choice.ticket, error)

    def _guarded_step(self) -> None:
        """A step of the batch; if it fails, every row tries it alone, so that only the guilty one is lost."""
        choices = [self._running[row] for row in self._batch.rows]
        tokens: list[int] = []
        is_out_of_memory = False
        try:
            tokens = self._batch.step()
        except Exception as error:
            logger.warning("a step of %d rows failed (%s); each goes on alone", len(choices), error)
            is_out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not tokens:  # and not within `except`, where the error would keep alive what the step had allocated
            self._batch.clear()
            self._running.clear()
            if is_out_of_memory and len(choices) > 1:
                # Fewer at a time from now on; the others wait with what they have.
                self._max_rows = max(1, len(choices) // 2)
                with self._queue.changed:
                    self._queue.choices.extendleft(reversed(choices[self._max_rows :]))
                choices = choices[: self._max_rows]
            for choice in choices:
                self._join_alone(choice)
            return
        self.statistics.steps += 1
        self.statistics.rows_in_steps += len(choices)
        self._take_tokens(choices, tokens)

    def _take_tokens(self, choices: list[_Choice], tokens: list[int]) -> None:
        """Hands on the new tokens' text; finished rows leave the batch."""
        self.statistics.answer_tokens += len(tokens)
        finished = {choice.row for choice, token in zip(choices, tokens, strict=True) if self._take(choice, token)}
        if finished:
            self._keep([row for row in self._batch.rows if row not in finished])

    def _take(self, choice: _Choice, token: int) -> bool:
        """One token of one answer; True if it was the last."""
        row = choice.row
        settings = row.sampler.settings
        is_end = token == self.chat.processor.tokenizer.eos_token_id
        is_full = len(row.answer) >= settings.max_new_tokens
        new_text = row.text.new_text(row.answer, is_last=is_end or is_full)
        choice.pending += new_text
        if row.sampler.score is not None and not is_end:
            choice.scores.append(_Untold(self._text_score(row, row.sampler.score), len(new_text)))
        place = min((at for at in map(choice.pending.find, settings.stop) if at >= 0), default=-1)
        reason = "stop" if is_end else "length" if is_full else None
        if place >= 0:
            choice.pending, reason = choice.pending[:place], "stop"
        held = 0 if reason else longest_begun(choice.pending, settings.stop)
        text, choice.pending = choice.pending[: len(choice.pending) - held], choice.pending[-held:] if held else ""
        scores = choice.told(len(text), is_over=reason is not None)
        if text or scores:
            choice.ticket.tell(TextPiece(choice.index, text, scores))
        if reason:
            choice.ticket.tell(Finished(choice.index, reason, len(row.answer) - is_end))
            self._pace.finished()
        return reason is not None

    def _text_score(self, row: Row, score: TokenScore) -> TextScore:
        def written(token: int) -> bytes:
            return self.chat.processor.token_bytes(token, row.prompt)

        best = tuple((written(token), logprob) for token, logprob in score.best)
        return TextScore(written(score.token), score.logprob, best)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        self.statistics.failed += 1
        ticket.tell(Failed(error))

    def _fail_everything(self, error: Exception) -> None:
        tickets = [choice.ticket for choice in self._running.values()]
        with self._queue.changed:
            self._queue.is_open = False
            tickets += [entry.ticket for entry in (*self._queue.choices, *self._queue.searches)]
            self._queue.choices.clear()
            self._queue.searches.clear()
        for ticket in dict.fromkeys(tickets):
            if not ticket.is_over:
                self._fail(ticket, error)

    # ------------------------------------------------------------------------------------------ the reference decoding

    def _next_search(self) -> list[Search]:
        """The searches at the head of the queue that go together, as far as there is room beside the batch.

        One that finds none waits until the batch has ended, which nobody joins until then.
        """
        group: list[Search] = []
        batch = _Share.of_rows(self._batch.rows)
        self._search_waits = False
        with self._queue.changed:
            searches = self._queue.searches
            while searches:
                entry = searches[0]
                if entry.ticket.is_cancelled:
                    searches.popleft()
                    continue
                if group and entry.decoding != group[0].decoding:
                    break
                share = _Share.of_searches([*group, entry])
                is_alone = not group and not batch.rows
                if not is_alone and not share.fits_beside(batch, self._max_rows, self.limits.max_places):
                    self._search_waits = not group
                    break
                group.append(searches.popleft())
        return group

    def _search(self, group: list[Search]) -> None:
        self._num_searching, self._searching = len(group), _Share.of_searches(group)
        is_to_be_split = False
        try:
            self._search_together(group)
        except SearchAbandonedError:
            for entry in group:
                if not self._queue.is_open:
                    self._fail(entry.ticket, EngineClosedError("The server is shutting down."))
        except Exception as error:
            is_to_be_split = len(group) > 1
            if is_to_be_split:
                logger.warning("a search of %d rows failed (%s); each goes on alone", len(group), error)
            else:
                self._fail(group[0].ticket, error)
        if is_to_be_split:  # not within `except`, where the error would keep alive what the search had allocated
            for entry in group:
                self._search([entry])
        self._num_searching, self._searching = 0, _Share()

    def _search_together(self, group: list[Search]) -> None:
        model, processor = self.chat.model, self.chat.processor
        prompts = [entry.ticket.prompt for entry in group]
        inputs = processor.pad_prompts([prompt.prompt for prompt in prompts], self._encode_images(prompts), model)

        def between_steps(step: int) -> None:
            self.statistics.steps += 1
            self.statistics.rows_in_steps += len(group)
            if self._queue.drain is False or all(entry.ticket.is_cancelled for entry in group):
                raise SearchAbandonedError
            self._turn()

        answers = model.answers(inputs, group[0].decoding, processor.tokenizer, progress=between_steps)
        for entry, answer in zip(group, answers, strict=True):
            self.statistics.answer_tokens += len(answer.ids)
            entry.ticket.tell(TextPiece(0, processor.answer_text(answer.ids, entry.ticket.prompt.prompt)))
            entry.ticket.tell(Finished(0, "length" if answer.is_cut else "stop", len(answer.ids)))
            self._pace.finished()


def longest_begun(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
