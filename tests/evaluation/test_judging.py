"""One question to a judge that answers as it likes: a verdict comes of it, and nothing is taken for free."""

import gzip
import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from judge_server import JudgeServer, Reply, failure

from viscpm_hf.evaluation import endpoint
from viscpm_hf.evaluation.budget import Budget, BudgetSpentError, Limits
from viscpm_hf.evaluation.judging import MAX_CLAIMED_TOKENS, Judge, JudgeError, JudgeSettings
from viscpm_hf.evaluation.rules import Comparison, Rule


QUESTION = Comparison({"text": "What?"}, "A cat.", "A cat.", "A dog.", Rule("Rate them.", "Assistant"))
MOST_PROMPT = sum(len(message["content"].encode()) + 64 for message in QUESTION.messages())
MOST_REVIEW = 50


@pytest.fixture(scope="module")
def judged():
    """A function that gets the judge's verdict on a reply; the server and the judge serve for all."""
    with JudgeServer() as server:
        judges = {}

        def ask(reply, *, limits=Limits(), **options):  # noqa: B008, it is immutable
            server.reply = reply if callable(reply) else lambda request, number: reply
            options = {"max_tokens": MOST_REVIEW, "attempts": 1, "max_retries": 0, **options}
            name = str(options)
            if name not in judges:
                judges[name] = Judge(JudgeSettings(server.base_url, "stub", **options), Budget(limits))
            judges[name].budget = Budget(limits)
            return judges[name].ask(QUESTION)

        ask.server = server
        yield ask
        for judge in judges.values():
            judge.close()


def test_believed_usage(judged):
    verdict = judged(Reply(usage={"prompt_tokens": 90, "completion_tokens": 7.0, "total_tokens": 5}))
    assert verdict.scores == (8, 9)
    assert (verdict.usage.prompt_tokens, verdict.usage.completion_tokens) == (90, 7)


ODD_USAGES = {
    "none": None,
    "empty": {},
    "a text": "100",
    "a list": [100, 10],
    "nulls": {"prompt_tokens": None, "completion_tokens": None},
    "nothing": {"prompt_tokens": 0, "completion_tokens": 0},
    "below nothing": {"prompt_tokens": -1_000_000, "completion_tokens": -1},
    "texts": {"prompt_tokens": "100", "completion_tokens": "10"},
    "truth": {"prompt_tokens": True, "completion_tokens": True},
    "a half": {"prompt_tokens": 0.5, "completion_tokens": 1e300},
    "not finite": {"prompt_tokens": float("nan"), "completion_tokens": float("inf")},
    "absurd": {"prompt_tokens": MAX_CLAIMED_TOKENS + 1, "completion_tokens": 10**400},
}


@pytest.mark.parametrize("usage", ODD_USAGES.values(), ids=ODD_USAGES)
def test_a_usage_that_can_not_be_counts_as_the_most(judged, usage):
    verdict = judged(Reply(usage=usage), limits=Limits(max_cost=1.0, prompt_price=1.0, completion_price=1.0))
    assert verdict.scores == (8, 9)
    assert (verdict.usage.prompt_tokens, verdict.usage.completion_tokens) == (MOST_PROMPT, MOST_REVIEW)


def test_content_in_parts(judged):
    parts = [{"type": "text", "text": "8 "}, {"type": "reasoning", "text": "1"}, {"type": "text", "text": "9\nWhy."}]
    verdict = judged(Reply(parts))
    assert verdict.scores == (8, 9) and verdict.review == "8 9\nWhy."


deep = b"[" * 100_000 + b"]" * 100_000
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
COMPLETION = st.fixed_dictionaries(
    {},
    optional={
        "id": JSON,
        "choices": JSON | st.lists(st.fixed_dictionaries({}, optional={"message": JSON, "index": JSON}), max_size=2),
        "usage": JSON | st.dictionaries(st.sampled_from(["prompt_tokens", "completion_tokens"]), JSON),
    },
)


def encoded(value) -> bytes:
    return json.dumps(value).encode()  # NaN and lone surrogates included, as Python's parser takes them


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.one_of(
        JSON.map(encoded),
        COMPLETION.map(encoded),
        st.builds(
            lambda content, usage: encoded({"choices": [{"message": {"content": content}}], "usage": usage}),
            JSON | st.lists(st.fixed_dictionaries({"type": JSON, "text": JSON}), max_size=3),
            JSON,
        ),
        st.binary(max_size=60),
        st.just(deep),
    )
)
def test_any_reply_gives_a_verdict_that_can_be_kept(judged, body):
    verdict = judged(Reply(body=body))
    assert (verdict.scores is None) == (verdict.error is not None)
    assert verdict.usage.requests == 1
    assert verdict.usage.prompt_tokens >= 1 and verdict.usage.completion_tokens >= 0
    line = json.dumps({"content": verdict.review, "error": verdict.error}, ensure_ascii=False)
    assert len(line.encode("utf-8")) < 10_000
    assert verdict.error is None or verdict.error.isprintable()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(judged, status):
    with JudgeServer() as elsewhere:
        away = Reply(status=status, headers={"Location": f"{elsewhere.base_url}/chat/completions"}, body=b"")
        with pytest.raises(JudgeError, match=r"redirects: to http://127.0.0.1:\d+/v1/chat/completions, which is not"):
            judged(away, max_retries=2)
    assert not elsewhere.requests


def test_a_dripping_reply_ends_in_time_and_counts_as_the_most(judged):
    begin = time.monotonic()
    verdict = judged(Reply(drip=0.02), timeout=0.3, attempts=2, max_retries=3)
    assert 0.5 < time.monotonic() - begin < 5
    assert verdict.error == "the judge's reply was not complete after 0.3 s"
    assert verdict.usage.requests == 2
    assert verdict.usage.tokens == 2 * (MOST_PROMPT + MOST_REVIEW)
    for _ in range(2):  # the server's next byte fails; after an ordinary closing the one behind it does, otherwise
        assert isinstance(judged.server.ends.get(timeout=5), ConnectionResetError)


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_reply_without_end_is_given_up(judged, monkeypatch, is_packed):
    monkeypatch.setattr(endpoint, "MAX_REPLY_BYTES", 100_000)
    body = json.dumps({"choices": [], "x": "x" * 2_000_000}).encode()
    headers = {"Content-Encoding": "gzip"} if is_packed else {}
    verdict = judged(Reply(body=gzip.compress(body) if is_packed else body, headers=headers))
    assert "can't be read" in verdict.error and verdict.usage.tokens == MOST_PROMPT + MOST_REVIEW


def test_a_limit_holds_against_replies_that_say_nothing(judged):
    """The budget lets a request begin only if the most of it fits, and what isn't known is that."""
    limits = Limits(max_tokens=2 * (MOST_PROMPT + MOST_REVIEW) + 1)
    asked = len(judged.server.requests)
    verdict = judged(Reply("no scores", usage={"prompt_tokens": -9}), limits=limits, attempts=5)
    assert verdict.usage.tokens <= limits.max_tokens and len(judged.server.requests) == asked + 2
    with pytest.raises(BudgetSpentError):
        judged(Reply(), limits=Limits(max_tokens=MOST_PROMPT + MOST_REVIEW - 1))


def test_what_a_judge_says_is_shown_plainly(judged):
    verdict = judged(failure(400, "\x1b[2J" + "no " * 1000))
    assert verdict.error.isprintable() and len(verdict.error) < 400
