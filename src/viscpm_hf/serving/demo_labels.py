"""Components whose words follow the page's language, and the line that says how things stand."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import gradio as gr
import torch

from ..images import BadImageError
from ..pipelines.prompt_safety import UnsafePromptError
from ..pipelines.safety import UnsafeImageError
from .demo_texts import say
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


class Labels:
    """Makes components, and knows how to say the same in another language."""

    def __init__(self, language: str):
        self.language = language
        self._entries: list[tuple[gr.blocks.Block, Mapping[str, str | tuple[str, ...]]]] = []

    def make(self, kind: type, texts: Mapping[str, str | tuple[str, ...]], **options: Any):
        """A component; `texts` are its properties that are words (a key of `TEXTS`), or choices (several keys)."""
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
    def _say(language: str, texts: Mapping[str, str | tuple[str, ...]]) -> dict[str, Any]:
        return {
            name: say(language, keys) if isinstance(keys, str) else [(say(language, key), key) for key in keys]
            for name, keys in texts.items()
        }


def status(*lines: str, is_error: bool = False) -> str:
    """Lines of text as the page's status, which screen readers read out."""
    kind = "status status-error" if is_error else "status"
    text = "<br>".join(html.escape(line, quote=False) for line in lines if line)
    return f'<div role="status" class="{kind}">{text}</div>'


def report(error: Exception, language: str) -> str:
    """Tells of an error in one sentence, in a message that goes by itself and (returned) as the status that stays."""
    key = next(key for kind, key in ERROR_TEXTS if isinstance(error, kind))
    text = say(language, key, detail=" ".join(str(error).split()) or type(error).__name__)
    gr.Warning(html.escape(text, quote=False))
    return status(text, is_error=True)
