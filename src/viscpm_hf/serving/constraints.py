"""Answers of a given form: which tokens can go on with it, by `llguidance` (the extra `serve` has it).

It takes any vocabulary as a list of bytes, so CPM-Bee's words do as well as SentencePiece's pieces. Strings without a
token of their own, which a prompt may bring, can't be part of such an answer.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch


MAX_SCHEMA = 32_768
# Not any number of blanks and lines: a model that likes them would write nothing else.
FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY_OBJECT = {"type": "object"}


class _Words:
    """A vocabulary as llguidance takes it.

    Args:
        tokens: bytes of every token; none for those that are no text.
        eos_token_id: what ends an answer.
    """

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], eos_token_id: int):
        self.tokens = [*tokens]
        self.tokens[eos_token_id] = b"</s>"
        self.eos_token_id = eos_token_id
        self.special_token_ids = [eos_token_id]
        self._ids = {token: index for index, token in enumerate(tokens) if token and index != eos_token_id}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens of what a form asks for word for word; the longest each time."""
        data, ids, place = text.encode() if isinstance(text, str) else text, [], 0
        while place < len(data):
            for end in range(min(len(data), place + self._longest), place, -1):
                if data[place:end] in self._ids:
                    ids.append(self._ids[data[place:end]])
                    break
            else:
                end = place + 1
            place = end
        return ids


class Matcher:
    """How far one answer has come."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def forbid(self, logits: torch.Tensor) -> None:
        """Sets what can't come next to minus infinity.

        Args:
            logits: `(vocabulary,)`, changed in place.

        Raises:
            ValueError: if nothing can.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool))
        if self._matcher.is_error() or not allowed.any():
            reason = self._matcher.get_error().splitlines()[:1] or ["no token of the vocabulary fits"]
            raise ValueError(f"The answer can't go on in the form that response_format asks for: {reason[0][:200]}.")
        logits[: len(allowed)].masked_fill_(~allowed.to(logits.device), -torch.inf)
        logits[len(allowed) :] = -torch.inf

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)


class Constraint:
    """The form of an answer."""

    def __init__(self, tokenizer: Any, grammar: str):
        self._tokenizer, self._grammar = tokenizer, grammar

    def begin(self) -> Matcher:
        from llguidance import LLMatcher

        return Matcher(LLMatcher(self._tokenizer, self._grammar, log_level=0))


class Constraints:
    """Makes the forms for one vocabulary; from any thread.

    Args:
        tokens: gives the bytes of all tokens, when they are first needed.
        eos_token_id: what ends an answer.
    """

    def __init__(self, tokens: Callable[[], Sequence[bytes]], eos_token_id: int):
        self._tokens, self._eos_token_id = tokens, eos_token_id
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    def of_schema(self, schema: Any) -> Constraint:
        """
        Args:
            schema: a JSON schema.

        Raises:
            ValueError: for one that is too large, wrong, or has what isn't supported, and without llguidance.
        """
        try:
            from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
        except ModuleNotFoundError as error:
            raise ValueError(
                "response_format other than text isn't supported by this server: it needs llguidance, which is not "
                'installed (pip install -c constraints.txt ".[serve]").'
            ) from error
        text = json.dumps(schema)
        if len(text) > MAX_SCHEMA:
            raise ValueError(f"The schema has {len(text):,} characters, more than the {MAX_SCHEMA:,} allowed.")
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=FORM)
        except ValueError as error:
            raise ValueError(f"The schema of response_format can't be used: {_first_line(error)}.") from error
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(TokenizerWrapper(_Words(self._tokens(), self._eos_token_id)))
        wrong = LLMatcher.validate_grammar(grammar, self._tokenizer)
        if wrong and not wrong.startswith("WARNING"):
            raise ValueError(f"The schema of response_format can't be used: {_first_line(wrong)}.")
        return Constraint(self._tokenizer, grammar)


def _first_line(error: Any) -> str:
    return (str(error).splitlines() or ["?"])[0][:200].rstrip(".")
