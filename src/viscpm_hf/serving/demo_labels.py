"""Components whose words follow the page's language, and the line that says how things stand."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr
import torch

from ..images import BadImageError
from ..pipelines.prompt_safety import UnsafePromptError
from ..pipelines.safety import UnsafeImageError
from .demo_texts import LANGUAGES, say
from .tickets import EngineBusyError, EngineClosedError


# What a user can meet; all else is a defect and comes to the log with its traceback.
EXPECTED_ERRORS = (ValueError, OSError, RuntimeError, MemoryError)
# What the page says of them, the first that fits; their own words, which are English, are the detail.
ERROR_TEXTS: tuple[tuple[type[Exception], str], ...] = (
    (EngineBusyError, "busy"),
    (EngineClosedError, "closed"),
    (UnsafePromptError, "unsafe_prompt"),
    (UnsafeImageError, "unsafe_picture"),
    (BadImageError, "bad_picture"),
    (torch.OutOfMemoryError, "no_memory"),
    (MemoryError, "no_memory"),
    (ValueError, "bad_value"),
    (Exception, "failed"),
)


# What is said of a component: one key of `TEXTS`, the keys of choices, or a function of the language.
Words = str | tuple[str, ...] | Callable[[str], Any]


class Labels:
    """Makes components, and knows how to say the same in another language."""

    def __init__(self, language: str):
        self.language = language
        self._entries: list[tuple[gr.blocks.Block, Mapping[str, Words]]] = []

    def make(self, kind: type, texts: Mapping[str, Words], **options: Any):
        """A component; `texts` are those of its properties that are words."""
        component = kind(**self._say(self.language, texts), **options)
        self._entries.append((component, texts))
        return component

    @property
    def components(self) -> list:
        return [component for component, _ in self._entries]

    def updates(self, language: str) -> list[dict[str, Any]]:
        """For every one of `components` what changes with the language."""
        return [gr.update(**self._say(language, texts)) for _, texts in self._entries]

    @staticmethod
    def _say(language: str, texts: Mapping[str, Words]) -> dict[str, Any]:
        return {name: _words(language, keys) for name, keys in texts.items()}


def _words(language: str, keys: Words) -> Any:
    if isinstance(keys, str):
        return say(language, keys)
    return keys(language) if callable(keys) else [(say(language, key), key) for key in keys]


def error_key(error: Exception) -> str:
    """What is said of an error."""
    return next(key for kind, key in ERROR_TEXTS if isinstance(error, kind))


def said(key: str, **values: Any) -> str:
    """HTML of a text in every language, of which the page shows the one that it speaks (`STYLE`)."""
    return "".join(
        f'<span class="said" lang="{language}">{html.escape(say(language, key, **values), quote=False)}</span>'
        for language in LANGUAGES
    )


def status(*lines: str, is_error: bool = False) -> str:
    """Lines of [`said`] as the page's status, which screen readers read out."""
    kind = "status status-error" if is_error else "status"
    return f'<div role="status" class="{kind}">{"<br>".join(filter(None, lines))}</div>'


def report(error: Exception) -> str:
    """Tells of an error in one sentence, in a message that goes by itself and (returned) as the status that stays."""
    text = said(error_key(error), detail=" ".join(str(error).split()) or type(error).__name__)
    gr.Warning(text)
    return status(text, is_error=True)


def stop_button(is_busy: bool) -> dict[str, Any]:
    """Stop says that it can be pressed only while there is something to stop."""
    return gr.update(interactive=is_busy, variant="stop" if is_busy else "secondary")
