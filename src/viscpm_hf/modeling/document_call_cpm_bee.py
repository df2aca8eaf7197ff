"""The call of the Hub's own classes: `model.generate(documents, tokenizer)` takes documents and gives them filled.

It always is the original's beam search, with the beams and the length of the `generation_config.json`, and without
the temperature, the penalties and the length of answers that VisCPM's own chat has. All lengths are those of the
answer, never of the prompt.

Source: the model cards of openbmb/cpm-bee-10b and openbmb/VisCPM-Chat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from .beam_search_cpm_bee import ReferenceDecodingConfig


@dataclass(frozen=True)
class DocumentDecodingConfig(ReferenceDecodingConfig):
    """Parameters of the document call; the defaults are those of the Hub's classes and files."""

    max_new_tokens: int = 101
    """The most tokens of an answer, the end token included. The Hub's `max_length` of 100 counts from 0."""
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0

    @property
    def last_step(self) -> int:
        return self.max_new_tokens - 1


SEARCH_ARGUMENTS = ("num_beams", "repetition_penalty", "length_penalty", "temperature")
LENGTH_ARGUMENTS = ("max_new_tokens", "max_length", "min_new_tokens", "min_length")
# What says no more than that it is this search.
NEUTRAL_ARGUMENTS = {"do_sample": False, "num_return_sequences": 1, "use_cache": True, "early_stopping": False}


def is_document_call(inputs: Any) -> bool:
    """Whether `generate` was given documents, not tensors."""
    return isinstance(inputs, (Mapping, list, tuple, str))


def check_document_call(documents: Any, tokenizer: Any) -> list[Mapping[str, Any]]:
    """The documents as a list.

    Raises:
        ValueError: for what is no document, or without the tokenizer.
    """
    if isinstance(documents, str):
        raise ValueError(
            "generate takes tensors, or documents with their tokenizer, not text: "
            f'model.generate({{"input": {documents[:40]!r}, "<ans>": ""}}, tokenizer).'
        )
    if isinstance(documents, Mapping) and "input_ids" in documents:
        raise ValueError("generate takes a tokenizer's tensors by their names: model.generate(**inputs).")
    if not hasattr(tokenizer, "encode_document"):
        given = "none" if tokenizer is None else f"a {type(tokenizer).__name__}"
        raise ValueError(
            f"To fill documents, generate needs the CpmBeeTokenizer of the model, got {given}: "
            "model.generate(documents, tokenizer)."
        )
    documents = [documents] if isinstance(documents, Mapping) else list(documents)
    for index, document in enumerate(documents):
        if not isinstance(document, Mapping):
            raise ValueError(f"Document {index} is a dict of strings or dicts, got a {type(document).__name__}.")
    return documents


def document_decoding(
    defaults: GenerationConfig,
    given: Mapping[str, Any],
    generation_config: GenerationConfig | Mapping[str, Any] | None = None,
) -> DocumentDecodingConfig:
    """The search that a document call asks for.

    Args:
        defaults: the model's generation configuration.
        given: the call's own arguments.
        generation_config: in place of the model's.

    Raises:
        ValueError: for an argument that the search has no use for, two that say the same, or a bad value.
    """
    if generation_config is not None:
        is_mapping = isinstance(generation_config, Mapping)
        defaults = GenerationConfig(**generation_config) if is_mapping else generation_config
        given = {**{name: getattr(defaults, name) for name in NEUTRAL_ARGUMENTS}, **given}
    given = {
        name: value
        for name, value in given.items()
        if value is not None and not (name in NEUTRAL_ARGUMENTS and value == NEUTRAL_ARGUMENTS[name])
    }
    unknown = sorted(set(given) - {*SEARCH_ARGUMENTS, *LENGTH_ARGUMENTS})
    if unknown:
        raise ValueError(
            f"generate fills documents with the original's beam search, which has no {', '.join(unknown)}; it has "
            f"{', '.join((*SEARCH_ARGUMENTS, *LENGTH_ARGUMENTS))}. Everything that generate offers for tensors works "
            'with model.fill(documents, tokenizer, mode="generate", ...).'
        )
    options = {name: given[name] for name in SEARCH_ARGUMENTS if name in given}
    for name in ("num_beams", "repetition_penalty", "length_penalty"):
        value = getattr(defaults, name)
        if name not in options and value is not None:
            options[name] = value
    for bound in ("max", "min"):
        names = [f"{bound}_new_tokens", f"{bound}_length"]
        if all(name in given for name in names):
            raise ValueError(f"{names[0]} and {names[1]} say the same of a document's answer: give one of them.")
        value = _length(given, bound)
        value = _length(vars(defaults), bound) if value is None else value
        if value is not None:
            options[names[0]] = value
    return DocumentDecodingConfig(**options)


def _length(source: Mapping[str, Any], bound: str) -> int | None:
    """`max_new_tokens` or `min_new_tokens`, from the name of the whole length if need be; None if neither is there."""
    new, whole = source.get(f"{bound}_new_tokens"), source.get(f"{bound}_length")
    if new is None and bound == "max" and type(whole) is int:
        return whole + 1
    return whole if new is None else new


__all__ = ["DocumentDecodingConfig", "document_decoding"]
