"""Foreign words in sentences of ours: visible, on one line, of bounded length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viscpm_hf.cli.errors import describe
from viscpm_hf.plain_text import MAX_MESSAGE_CHARACTERS, MAX_NAME_CHARACTERS, plain


@given(st.text() | st.lists(st.text()) | st.dictionaries(st.text(), st.text()))
def test_whatever_is_named(value):
    text = plain(value)
    assert text.isprintable() and len(text) <= MAX_NAME_CHARACTERS + 1
    assert plain(text) in (text, text[:MAX_NAME_CHARACTERS])
    text.encode("utf-8")


@given(st.text(max_size=3 * MAX_MESSAGE_CHARACTERS))
def test_whatever_an_error_says(text):
    said = describe(ValueError(text))
    assert said and said.isprintable() and len(said) <= MAX_MESSAGE_CHARACTERS + 1


def nested():
    value = []
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("llm.encoder.layers.0", "llm.encoder.layers.0"),
        ("图片 é ♥", "图片 é ♥"),
        ("a\x1b[2J\x07b\x9b31mc\x7f\x00", "a[2Jb31mc"),
        ("user\u202egnp.exe\u200b\u2066", "usergnp.exe"),
        ("two\r\nlines\u2028and\x85more", "two lines and more"),
        ("\udcff\ud800x", "x"),
        ("x" * 10**6, "x" * MAX_NAME_CHARACTERS + "…"),
        (b"\x1b", "b'\\x1b'"),
        (10**5000, "a int"),
        (nested(), "a list"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_examples(value, expected):
    assert plain(value) == expected
