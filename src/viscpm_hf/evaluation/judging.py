"""Judging answers with a model behind an OpenAI-compatible endpoint.

`endpoint` does the talking. What is here is the budget, what counts as a verdict, and what is kept. A judgement is
appended to its file as soon as it arrives. Nothing in a reply is believed unseen: neither its form nor its numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from transformers.utils import logging

from ..batch.results import PartWriter, Place
from ..batch.rows import InputRow
from ..plain_text import plain
from .budget import Budget, BudgetSpentError, Usage
from .rules import Comparison, parse_scores


if TYPE_CHECKING:
    from .endpoint import Call


logger = logging.get_logger(__name__)

# What a line of judgements has.
JUDGEMENT_FIELDS = ("tuple",)

# No tokenizer makes more tokens than bytes, but templates add some of their own.
TEMPLATE_TOKENS = 64

# A reply that claims more tokens is as little believed as one of none.
MAX_CLAIMED_TOKENS = 10**9

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
    """Seconds for a request, its reply included however slowly it comes."""

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
                'Judging needs the openai client: pip install -c constraints.txt ".[eval]" (it works with any '
                "endpoint of that protocol)."
            ) from error
        from .endpoint import Endpoint

        self._openai = openai
        self._key = api_key or os.environ.get(KEY_VARIABLE)
        self.settings = settings
        self.budget = budget
        self._endpoint = Endpoint(settings.base_url, self._key, settings.timeout)

    def close(self) -> None:
        self._endpoint.close()

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
            verdict, call = None, self._endpoint.new_call()
            try:
                verdict = self._request(call, messages, granted, most)
            except JudgeError as error:
                self.budget.close()  # here, before another thread begins a request
                error.usage = used + Usage(call.requests)
                raise
            finally:
                # Of a request that failed only the number is known.
                spent = Usage(call.requests) if verdict is None else verdict.usage
                self.budget.settle(granted, spent)
            used += spent
            if verdict.scores is not None or verdict.review is None and verdict.error is not None:
                return Verdict(used, verdict.scores, verdict.review, verdict.error)
            problem = verdict.error or f"the judge's reply has no two scores from 0 to 10: {plain(verdict.review)!r}"
        return Verdict(used, error=problem)

    def _request(self, call: Call, messages: list[dict[str, str]], granted: Usage, most: Usage) -> Verdict:
        """One reply. A verdict with neither scores nor the review's absence is to be asked for again."""
        openai, settings = self._openai, self.settings
        options = {"temperature": settings.temperature, "seed": settings.seed}
        try:
            completion = self._endpoint.complete(
                call,
                granted.requests - 1,
                model=settings.model,
                messages=messages,
                max_tokens=settings.max_tokens,
                **{name: value for name, value in options.items() if value is not None},
            )
            review, usage, problem = review_of(completion), getattr(completion, "usage", None), None
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise JudgeError(self._say("refuses", error)) from None
        except (openai.APIConnectionError, openai.RateLimitError) as error:
            raise JudgeError(self._say("can't be had", error)) from None
        except openai.APIStatusError as error:
            if 300 <= error.status_code < 400:
                where = plain(without_password(error.response.headers.get("location") or "another address"))
                raise JudgeError(
                    self._say("redirects", f"to {where}, which is not followed: give it as --base-url if it is yours")
                ) from None
            return Verdict(Usage(call.requests), error=self._say("failed", error))
        except TimeoutError:
            review, usage = "", None
            problem = f"the judge's reply was not complete after {settings.timeout:g} s"
        except Exception as error:  # noqa: BLE001, what a reply holds may be anything
            # A reply of another form, or none at all in JSON: it may have been cut off, so it is asked for again.
            logger.info("a reply of %s can't be read: %s", settings.model, type(error).__name__)
            review, usage, problem = "", None, f"the judge's reply can't be read ({type(error).__name__})"
        # The most, where the endpoint doesn't say, or says what can't be.
        prompt = _believed(usage, "prompt_tokens", 1) or most.prompt_tokens
        completion_tokens = _believed(usage, "completion_tokens", 1 if review else 0)
        if completion_tokens is None:
            completion_tokens = most.completion_tokens
        used = Usage(call.requests, prompt, completion_tokens)
        return Verdict(used, parse_scores(review), review, problem)

    def _say(self, what: str, error: Exception | str) -> str:
        """An error without the key, which some endpoints repeat."""
        said = str(error).replace(self._key, "***") if self._key else str(error)
        return f"The judge at {without_password(self.settings.base_url)} ({self.settings.model}) {what}: {plain(said)}"


def review_of(completion: Any) -> str:
    """The text of a completion; one in parts is put together.

    Raises:
        Exception: of many kinds, for a completion of another form.
    """
    content = completion.choices[0].message.content
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type", "text") == "text")
    if content is not None and not isinstance(content, str):
        raise TypeError(f"the content is a {type(content).__name__}")
    return (content or "").encode("utf-8", "replace").decode("utf-8")  # lone surrogates fit into no file


def _believed(usage: Any, name: str, least: int) -> int | None:
    """A count of an endpoint's; None if it is none, or can't be."""
    count = usage.get(name) if isinstance(usage, dict) else getattr(usage, name, None)
    if isinstance(count, float) and count.is_integer():
        count = int(count)
    is_count = isinstance(count, int) and not isinstance(count, bool)
    return count if is_count and least <= count <= MAX_CLAIMED_TOKENS else None


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
    """What the lines of earlier runs have used, by the keys of their rows.

    Raises:
        ValueError: for a line whose usage can't be.
    """
    used = {}
    for key, line in read_places(finished).items():
        counts = line.get("usage", {})
        if not isinstance(counts, dict) or any(_believed(counts, name, 0) is None for name in counts):
            raise ValueError(f"{finished[key].file} has a judgement with the usage {plain(counts)}: judge it anew.")
        used[key] = Usage(**{name: counts[name] for name in asdict(Usage()) if name in counts})
    return used


def read_places(finished: Mapping[str, Place]) -> dict[str, dict[str, Any]]:
    """The lines of finished rows."""
    lines = {}
    for key, place in finished.items():
        with open(place.file, "rb") as file:
            file.seek(place.offset)
            lines[key] = json.loads(file.readline())
    return lines
