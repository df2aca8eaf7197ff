"""What requests may say: bounded, null and neutral fields taken, everything else refused by its name."""

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from viscpm_hf.serving.bodies import BodyError, check_headers, check_structure, parse
from viscpm_hf.serving.schemas import ChatCompletionRequest, ImagesRequest, ViscpmRequest
from viscpm_hf.serving.settings import ServerSettings


SETTINGS = ServerSettings()
USER = {"role": "user", "content": "What?"}
CHAT = {"model": "m", "messages": [USER]}
IMAGES = {"prompt": "a cat"}
ANSWER = {
    "role": "assistant", "content": "That.", "refusal": None, "annotations": [], "audio": None, "function_call": None,
    "tool_calls": None,
}  # fmt: skip


def read(model, body) -> object:
    return parse(model, body if isinstance(body, bytes) else json.dumps(body).encode(), SETTINGS)


def wrong(model, body) -> BodyError:
    with pytest.raises(BodyError) as caught:
        read(model, body)
    return caught.value


# ------------------------------------------------------------------------------------------------------------- bounds


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


def measure(value) -> tuple[int, int]:
    """Items and depth, counted on what was parsed."""
    if isinstance(value, str):
        return 1, 0
    if isinstance(value, (list, dict)):
        inner = [measure(entry) for entry in (value.values() if isinstance(value, dict) else value)]
        keys = 2 * len(value) if isinstance(value, dict) else 0  # a string and a colon each
        commas = max(0, len(value) - 1)
        return 2 + commas + keys + sum(count for count, _ in inner), 1 + max((deep for _, deep in inner), default=0)
    return 0, 0


@settings(deadline=None, derandomize=True)
@given(JSON, st.sampled_from([None, 2]), st.booleans())
def test_the_size_of_a_body_is_counted_as_it_is(value, indent, ascii_only):
    data = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode()
    items, depth = measure(value)
    check_structure(data, items, max(depth, 1))
    if items:
        with pytest.raises(BodyError, match="fields, values and brackets"):
            check_structure(data, items - 1, 1000)
    if depth:
        with pytest.raises(BodyError, match="brackets within brackets"):
            check_structure(data, 10**9, depth - 1)


@settings(deadline=None, derandomize=True)
@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:\\a1', max_size=60).map(str.encode))
def test_whatever_comes_is_read_or_refused(data):
    try:
        read(ViscpmRequest, data)
    except BodyError as error:
        assert 5 < len(str(error)) <= 500


@pytest.mark.parametrize(
    "body",
    [
        b'{"question": "hi", ' + b",".join(b'"%x":0' % number for number in range(600_000)) + b"}",
        b"[" * 5_000_000,
        b"{" * 5_000_000,
        b'{"a":' * 1_000_000,
        b"[" + b"0," * 5_000_000 + b"0]",
        b"[" + b'"",' * 2_000_000 + b'""]',
        b'{"question": "' + b'\\"' * 5_000_000 + b'"}',
        b'{"question": "' + b"\\" * 9_000_000,
        b'"' * 9_000_000,
    ],
    ids=lambda body: body[:24].decode(),
)
def test_a_body_of_many_things_is_refused_before_it_is_read(body):
    begin = time.monotonic()
    assert "allowed" in str(wrong(ViscpmRequest, body))
    assert time.monotonic() - begin < 1


def test_a_large_image_is_no_large_structure():
    body = {"question": "?" * 60_000 + ',:[]{}"\\\n' * 500, "image": "A" * 20_000_000}
    assert len(read(ViscpmRequest, body).image) == 20_000_000


# ------------------------------------------------------------------------------------------ the official API's fields


def with_message(message: dict) -> dict:
    return {"model": "m", "messages": [USER, message, USER]}


def with_part(part: dict) -> dict:
    return {"model": "m", "messages": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize(
    ("model", "body"),
    [
        *(
            (ChatCompletionRequest, CHAT | {name: value})
            for name, value in [
                *dict.fromkeys(set(ChatCompletionRequest.model_fields) - {"model", "messages"}).items(),
                ("some_field_to_come", None), ("tools", []), ("tools", None), ("tool_choice", "none"),
                ("tool_choice", "auto"), ("functions", []), ("function_call", "none"), ("logit_bias", {}),
                ("frequency_penalty", 0), ("presence_penalty", 0.0), ("modalities", ["text"]),
                ("parallel_tool_calls", True), ("parallel_tool_calls", False), ("service_tier", "auto"),
                ("safety_identifier", "x"), ("prompt_cache_key", "x"), ("prompt_cache_retention", "24h"),
                ("prediction", {"type": "content", "content": "x"}), ("reasoning_effort", "none"),
                ("verbosity", "medium"), ("store", True), ("metadata", {"a": "b"}), ("user", "me"), ("stop", []),
                ("stop", ["a", "b", "c", "d"]), ("n", 1), ("seed", -3), ("top_p", 0), ("logprobs", False),
                ("top_logprobs", 0), ("stream", False), ("stream_options", {"include_usage": True}),
                ("response_format", {"type": "text"}), ("max_completion_tokens", 5),
            ]
        ),
        (ChatCompletionRequest, CHAT | {"tool_choice": "none", "tools": [{"type": "function"}]}),
        (ChatCompletionRequest, CHAT | {"max_tokens": 5, "max_completion_tokens": 5}),
        (ChatCompletionRequest, with_message(ANSWER)),
        (ChatCompletionRequest, with_message(ANSWER | {"tool_calls": [], "reasoning_content": None})),
        (ChatCompletionRequest, with_message(ANSWER | {"content": None, "provider_specific_fields": None})),
        (ChatCompletionRequest, with_message({"role": "assistant"})),
        (ChatCompletionRequest, with_part({"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}})),
        (ChatCompletionRequest, with_part({"type": "image_url", "image_url": "data:,"})),
        (ChatCompletionRequest, with_part({"type": "image_url", "image_url": {"url": "data:,", "detail": None}})),
        *(
            (ImagesRequest, IMAGES | {name: value})
            for name, value in [
                *dict.fromkeys(set(ImagesRequest.model_fields) - {"prompt"}).items(),
                ("background", "auto"), ("background", "opaque"), ("moderation", "auto"), ("stream", False),
                ("partial_images", 0), ("output_compression", 100), ("user", "me"), ("quality", "auto"),
                ("size", "auto"), ("output_format", "png"),
            ]
        ),
    ],
)  # fmt: skip
def test_null_and_neutral_fields_pass(model, body):
    read(model, body)


@pytest.mark.parametrize(
    ("model", "body", "param", "message"),
    [
        *(
            (ChatCompletionRequest, CHAT | {name: value}, name, message)
            for name, value, message in [
                ("tools", [{"type": "function"}], "can't call tools"), ("tool_choice", "required", "isn't supported"),
                ("functions", [{}], "isn't supported"), ("function_call", {"name": "f"}, "isn't supported"),
                ("logit_bias", {"5": 1}, "isn't supported"), ("frequency_penalty", 0.5, "send 0"),
                ("presence_penalty", True, "send 0"), ("modalities", ["text", "audio"], "isn't supported"),
                ("audio", {}, "isn't supported"), ("web_search_options", {}, "isn't supported"),
                ("reasoning_effort", "high", "doesn't think"), ("verbosity", "low", "isn't supported"),
                ("top_k", 5, "no such field"), ("stop", list("abcde"), "up to 4 stop strings, got 5"),
                ("stop", 5, "A string, or a list"), ("top_logprobs", 3, "needs logprobs"),
                ("response_format", {"type": "json_schema"}, "needs the field json_schema"),
            ]
        ),
        (ChatCompletionRequest, CHAT | {"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "is 5"),
        (ChatCompletionRequest, {"model": "m"}, "messages", "missing"),
        (ChatCompletionRequest, CHAT | {"model": None}, "model", "valid string"),
        (ChatCompletionRequest, with_message({"role": "user", "content": None}), "messages.1.content", "is text, or"),
        (ChatCompletionRequest, with_message({"role": "user"}), "messages.1.content", "missing"),
        (ChatCompletionRequest, with_message(ANSWER | {"tool_calls": [{}]}), "messages.1.tool_calls", "supported"),
        (ChatCompletionRequest, with_message({"role": "tool", "content": "x"}), "messages.1.role", "'assistant'"),
        (ChatCompletionRequest, with_part({"type": "input_audio"}), "messages.0.content.0", "'image_url'"),
        (ChatCompletionRequest, with_part({"type": "text", "text": 3}), "messages.0.content.0.text", "valid string"),
        (ChatCompletionRequest, with_part({"type": "image_url"}), "messages.0.content.0.image_url", "missing"),
        *(
            (ImagesRequest, IMAGES | {name: value}, name, "isn't supported")
            for name, value in [
                ("background", "transparent"), ("moderation", "low"), ("style", "vivid"), ("stream", True),
                ("partial_images", 2), ("output_compression", 50),
            ]
        ),
        (ViscpmRequest, {"question": "x", "foo": 1, "bar": 2}, "foo", r"no such field.*\(1 more error\)"),
        (ViscpmRequest, [1], None, "no JSON object"),
        (ViscpmRequest, b"", None, "is empty"),
        (ViscpmRequest, b'{"question": "a', None, "no valid JSON"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_by_name(model, body, param, message):
    error = wrong(model, body)
    assert error.param == param
    assert str(error).startswith(f"{param}: ") or param is None
    assert re.search(message, str(error))


def test_only_plain_json_is_read():
    for content_type in (
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON",
        "application/a+json",
    ):
        check_headers(content_type, None)
        check_headers(content_type, "identity")
    for content_type, encoding, message in (
        (None, None, "Content-Type is missing: send application/json"),
        ("text/plain", None, "Content-Type is 'text/plain'"),
        ("application/jsonp", None, "Content-Type"),
        ("application/json", "gzip", r"Content-Encoding: 'gzip'\)"),
    ):
        with pytest.raises(BodyError, match=message) as caught:
            check_headers(content_type, encoding)
        assert caught.value.status == 415
