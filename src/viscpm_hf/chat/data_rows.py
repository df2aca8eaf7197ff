"""Rows of data sets about pictures: where LLaVA, LLaMA-Factory, ms-swift and TRL keep pictures and turns.

Everything here raises `ValueError` with what is wrong with a row; whoever reads it adds file and line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..modeling.processing_viscpm_chat import IMAGE_TOKEN


HUMAN, ASSISTANT = ("human", "user"), ("gpt", "assistant")
IMAGE_FIELDS, OTHER_MEDIA_FIELDS = ("image", "images"), ("video", "videos", "audio", "audios")
MESSAGE_FIELDS = ("conversations", "messages")


def named_images(row: Mapping[str, Any]) -> Any:
    """What a row has as `image` or `images`, None if nothing.

    Raises:
        ValueError: if it has both, or what no model of this package looks at.
    """
    given = [name for name in IMAGE_FIELDS if _is_given(row.get(name))]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(map(repr, given))} both name pictures: keep one of them.")
    others = [name for name in OTHER_MEDIA_FIELDS if _is_given(row.get(name))]
    if others:
        raise ValueError(f"{', '.join(map(repr, others))}: the model takes pictures and text.")
    return row[given[0]] if given else None


def _is_given(value: Any) -> bool:
    """Whether a field is more than null, "" or an empty list."""
    return value is not None and not (isinstance(value, (str, list, tuple)) and not value)


def check_marks(num_marks: int, num_images: int) -> None:
    """Raises `ValueError` if a row's questions have image marks, but not as many as there are pictures."""
    if num_marks and num_marks != num_images:
        raise ValueError(
            f"{num_marks} {IMAGE_TOKEN} marks in its questions, but {num_images} pictures: there is one for each mark."
        )


def without_marks(text: str) -> str:
    return text.replace(IMAGE_TOKEN, "").strip() if IMAGE_TOKEN in text else text


def messages_of(row: Mapping[str, Any]) -> Sequence[Any] | None:
    """The messages of a row's conversation; None if it has none.

    Raises:
        ValueError: if it has two, or what should be a list of messages is something else.
    """
    given = [name for name in MESSAGE_FIELDS if row.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(map(repr, given))} are both conversations: keep one of them.")
    if given:
        messages = row[given[0]]
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise ValueError(f'"{given[0]}" is a list of turns, not {type(messages).__name__}.')
        return messages
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None or completion is None:
        return None
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise ValueError("'prompt' and 'completion' are two texts, or two lists of messages.")
    return [*prompt, *completion]


def read_message(message: Any, number: int) -> tuple[str, Any, list[Any]]:
    """Who speaks, what is said, and the pictures that stand in it; a picture among parts becomes a mark.

    Raises:
        ValueError: for what is no message; `number` of it is named.
    """
    for speaker, value in (("from", "value"), ("role", "content")):
        if isinstance(message, Mapping) and speaker in message and value in message:
            break
    else:
        raise ValueError(f"message {number} is no object with 'from' and 'value', or 'role' and 'content'.")
    speaker, value = message[speaker], message[value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        return speaker, value, []
    text, images = "", []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind == "image" and speaker in HUMAN:
            text += IMAGE_TOKEN
            images += [part[key] for key in ("image", "path") if part.get(key) is not None]
            if part.get("url") is not None:
                raise ValueError(f"message {number} has a picture by its URL, which is not fetched.")
        else:
            raise ValueError(f"message {number} has a part that is neither text nor a picture of the user.")
    return speaker, text, images
