"""Conversations that end in the beginning of an answer, to go on with (`continue_final_message`).

transformers looks for that beginning in what the template rendered, where every `<` of a message is written otherwise.
So a character of no text stands for it meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


CONTINUED_BRACKET = "\ufdd1"


def with_continued_brackets(conversation: Any) -> Any:
    """A conversation, or several, with [`CONTINUED_BRACKET`] for every `<` of the last message; what was given is left
    as it is."""
    conversation = getattr(conversation, "messages", conversation)
    if not conversation:
        return conversation
    *earlier, last = conversation
    if not isinstance(last, Mapping):
        return [with_continued_brackets(own) for own in conversation]
    content = last.get("content")
    if isinstance(content, str):
        content = content.replace("<", CONTINUED_BRACKET)
    elif content:
        content = [
            {**part, "text": part["text"].replace("<", CONTINUED_BRACKET)} if "text" in part else part
            for part in content
        ]
    return [*earlier, {**last, "content": content}]


def written(rendered: Any, write: Callable[[str], str]) -> Any:
    """Rendered prompts, one or several, as `write` writes them; anything else as it is."""
    if isinstance(rendered, str):
        return write(rendered)
    return [written(text, write) for text in rendered] if isinstance(rendered, list) else rendered
