"""Judging answers with a model behind an OpenAI-compatible endpoint.

The `openai` client does the talking: connections, retries with exponential back-off, `Retry-After`. What is here is
the budget, what counts as a verdict, and what is kept. A judgement is appended to its file as soon as it arrives.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from transformers.utils import logging

from ..batch.results import PartWriter, Place
from ..batch.rows import InputRow
from .budget import Budget, BudgetSpentError, Usage
from .rules import Comparison, parse_scores


logger = logging.get_logger(__name__)

# What a line of judgements has.
JUDGEMENT_FIELDS = ("tuple",)

# No tokenizer makes more tokens than bytes, but templates add some of their own.
TEMPLATE_TOKENS = 64

KEY_VARIABLE = "OPENAI_API_KEY"


class JudgeError(RuntimeError):
    """The endpoint can't be used at all, so that going on makes no sense."""

    usage = Usage()
    """What was used until that was known."""


@dataclass(frozen=True)
class JudgeSettings:
    """How to ask the judge."""

    base_url: str
    model: str
    temperature: float | None = 0.2
    """None sends none, for models that take none."""
    max_tokens: int = 1024
    """Of a review."""
    seed: int | None = None
    """For endpoints that have one; None sends none."""
    attempts: int = 3
    """How often a review without scores, or a broken reply, is asked for again."""
    max_retries: int = 6
    """Of a request that fails on the way, with growing pauses."""
    timeout: float = 120.0
    """Of a request, in seconds."""

    def __post_init__(self):
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--base-url is as https://HOST/v1, got {without_password(self.base_url)!r}.")

    def as_dict(self) -> dict[str, Any]:
        """Without a password in the address."""
        return {**asdict(self), "base_url": without_password(self.base_url)}


def without_password(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


@dataclass(frozen=True)
class Verdict:
    """What became of a question to the judge."""

    usage: Usage
    scores: tuple[float, float] | None = None
    """Of the reference and of the model's answer."""
    review: str | None = None
    error: str | None = None


class Judge:
    """Asks an endpoint, from as many threads as like.

    Args:
        settings: see there.
        budget: what it may cost.
        api_key: None for that of the environment's `OPENAI_API_KEY`; local servers mostly need none. It goes to the
            endpoint and nowhere else.

    Raises:
        ImportError: if the `openai` client isn't installed.
    """

    def __init__(self, settings: JudgeSettings, budget: Budget, api_key: str | None = None):
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                'Judging needs the openai client: pip install "viscpm-hf[eval]" (it works with any endpoint of that '
                "protocol)."
            ) from error
        self._openai = openai
        self._key = api_key or os.environ.get(KEY_VARIABLE)
        self.settings = settings
        self.budget = budget
        self._thread = threading.local()
        self._client = openai.OpenAI(
            api_key=self._key or "none",  # the client insists on one
            base_url=settings.base_url,
            timeout=settings.timeout,
            http_client=openai.DefaultHttpxClient(event_hooks={"request": [self._count_request]}),
        )

    def _count_request(self, request: Any) -> None:
        self._thread.requests += 1

    def close(self) -> None:
        self._client.close()

    def ask(self, comparison: Comparison) -> Verdict:
        """The judge's verdict; one without scores if it can't be had for this question.

        Raises:
            BudgetSpentError: if nothing was asked, for want of budget.
            JudgeError: if the endpoint can't be used; no further request begins then.
        """
        messages = comparison.messages()
        length = sum(len(message["content"].encode()) + TEMPLATE_TOKENS for message in messages)
        most = Usage(1 + self.settings.max_retries, length, self.settings.max_tokens)
        used, problem = Usage(), ""
        for attempt in range(self.settings.attempts):
            try:
                granted = self.budget.reserve(most)
            except BudgetSpentError:
                if attempt == 0:
                    raise
                break  # what was paid for is noted
            verdict = None
            self._thread.requests = 0
            try:
                verdict = self._request(messages, granted, most)
            except JudgeError as error:
                self.budget.close()  # here, before another thread begins a request
                error.usage = used + Usage(self._thread.requests)
                raise
            finally:
                # Of a request that failed only the number is known.
                spent = Usage(self._thread.requests) if verdict is None else verdict.usage
                self.budget.settle(granted, spent)
            used += spent
            if verdict.scores is not None or verdict.review is None and verdict.error is not None:
                return Verdict(used, verdict.scores, verdict.review, verdict.error)
            problem = f"the judge's reply has no two scores from 0 to 10: {verdict.review!r:.80}"
        return Verdict(used, error=problem)

    def _request(self, messages: list[dict[str, str]], granted: Usage, most: Usage) -> Verdict:
        openai, settings = self._openai, self.settings
        options = {"temperature": settings.temperature, "seed": settings.seed}
        try:
            completion = self._client.with_options(max_retries=granted.requests - 1).chat.completions.create(
                model=settings.model,
                messages=messages,
                max_tokens=settings.max_tokens,
                **{name: value for name, value in options.items() if value is not None},
            )
            review = completion.choices[0].message.content or ""
            usage = completion.usage
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise JudgeError(self._say("refuses", error)) from None
        except (openai.APIConnectionError, openai.RateLimitError) as error:
            raise JudgeError(self._say("can't be had", error)) from None
        except openai.APIStatusError as error:
            return Verdict(Usage(self._thread.requests), error=self._say("failed", error))
        except (openai.OpenAIError, ValueError, AttributeError, TypeError, IndexError) as error:
            # A reply of another form, or none at all in JSON: it may have been cut off, so it is asked for again.
            logger.info("a reply of %s can't be read: %s", settings.model, type(error).__name__)
            review, usage = "", None
        tokens = (most.prompt_tokens, most.completion_tokens)  # the most, where the endpoint doesn't say
        if usage is not None:
            tokens = (usage.prompt_tokens, usage.completion_tokens)
        return Verdict(Usage(self._thread.requests, *tokens), parse_scores(review), review)

    def _say(self, what: str, error: Exception) -> str:
        """An error without the key, which some endpoints repeat."""
        said = " ".join(str(error).split())[:300]
        text = f"The judge at {without_password(self.settings.base_url)} ({self.settings.model}) {what}: {said}"
        return text.replace(self._key, "***") if self._key else text


@dataclass(frozen=True)
class Outcome:
    """How far judging came."""

    judged: int
    failed: int
    left: int
    stopped_by: str | None


def judge_all(
    judge: Judge,
    rows: Sequence[InputRow],
    comparisons: Sequence[Comparison],
    writer: PartWriter,
    parallel: int,
    describe: Callable[[InputRow], Mapping[str, Any]],
    used_before: Mapping[str, Usage],
    on_row: Callable[[int], None] = lambda count: None,
) -> Outcome:
    """Judges rows with several requests at a time, and writes each verdict as it comes.

    At an interrupt no request begins any more, and what the running ones bring is still written.

    Args:
        describe: what a row's line says beside the verdict.
        used_before: usage of earlier, failed attempts by the rows' keys; it adds up in the lines.

    Raises:
        JudgeError: if the endpoint can't be used; what came before is written.
    """
    judged = failed = 0
    stopped_by: str | None = None
    fatal: JudgeError | None = None

    def collect(futures: set[Future]) -> None:
        nonlocal judged, failed, stopped_by, fatal
        for future in futures:
            row = running.pop(future)
            if future.cancelled():
                continue
            try:
                verdict = future.result()
            except BudgetSpentError as error:
                stopped_by = stopped_by or str(error)
                continue
            except JudgeError as error:
                fatal = fatal or error
                verdict = Verdict(error.usage, error=str(error))  # noted, so that the next run knows what it has cost
            usage = verdict.usage + used_before.get(row.key, Usage())
            line = {"id": row.id, "question_id": row.id, **describe(row), "usage": asdict(usage)}
            if verdict.scores is None:
                failed += 1
                writer.write([{**line, "error": verdict.error}])
            else:
                judged += 1
                writer.write([{**line, "tuple": list(verdict.scores), "content": verdict.review}])
            on_row(1)

    with ThreadPoolExecutor(parallel, thread_name_prefix="judge") as pool:
        running = {pool.submit(judge.ask, comparison): row for row, comparison in zip(rows, comparisons, strict=True)}
        try:
            while running:
                collect(wait(running, return_when=FIRST_COMPLETED).done)
        except BaseException:
            judge.budget.close()
            for future in running:
                future.cancel()
            collect(wait(running).done)
            raise
    if fatal is not None:
        raise fatal
    return Outcome(judged, failed, len(rows) - judged - failed, stopped_by)


def earlier_usage(finished: Mapping[str, Place]) -> dict[str, Usage]:
    """What the lines of earlier runs have used, by the keys of their rows."""
    return {key: Usage(**line.get("usage", {})) for key, line in read_places(finished).items()}


def read_places(finished: Mapping[str, Place]) -> dict[str, dict[str, Any]]:
    """The lines of finished rows."""
    lines = {}
    for key, place in finished.items():
        with open(place.file, "rb") as file:
            file.seek(place.offset)
            lines[key] = json.loads(file.readline())
    return lines


__all__ = [
    "JUDGEMENT_FIELDS",
    "Judge",
    "JudgeError",
    "JudgeSettings",
    "Outcome",
    "Verdict",
    "earlier_usage",
    "judge_all",
    "read_places",
]
