"""Conversations that end in the beginning of an answer, to go on with (`continue_final_message`).

transformers looks for that beginning in what the template rendered, where every `<` of a message is written otherwise.
So a character of no text stands for it meanwhile.
"""

from __future__ import annotations

from typing import Any


CONTINUED_BRACKET = "\ufdd1"


def with_continued_brackets(conversation: Any) -> Any:
    """A conversation, or several, with [`CONTINUED_BRACKET`] for every `<` of the last message."""
    if not conversation:
        return conversation
    if isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages"):
        return [with_continued_brackets(getattr(entry, "messages", entry)) for entry in conversation]
    *earlier, last = conversation
    content = last["content"]
    if isinstance(content, str):
        content = content.replace("<", CONTINUED_BRACKET)
    else:
        content = [
            {**part, "text": part["text"].replace("<", CONTINUED_BRACKET)} if part.get("type") == "text" else part
            for part in content
        ]
    return [*earlier, {**last, "content": content}]


def with_brackets(rendered: Any, bracket: str) -> Any:
    """Rendered prompts, one or several, with the template's `bracket` again; anything else as it is."""
    if isinstance(rendered, str):
        return rendered.replace(CONTINUED_BRACKET, bracket)
    if isinstance(rendered, list) and all(isinstance(text, str) for text in rendered):
        return [with_brackets(text, bracket) for text in rendered]
    return rendered
