"""Training records: conversations about images, and how rows of the known formats become them.

- Conversations, as LLaVA's: `{"id", "image", "conversations": [{"from": "human" | "gpt", "value": ...}, ...]}`, or
  `{"messages": [{"role": "user" | "assistant", "content": ...}, ...]}`, or TRL's `{"prompt", "completion"}`, whose
  messages stand one after the other. A content may be a list of parts (`{"type": "text" | "image", ...}`).
- Captions: `{"image", "caption"}`; the question is drawn from `CAPTION_INSTRUCTIONS`.

`image` or `images` (LLaMA-Factory, ms-swift, TRL) is a path, a PIL picture, the bytes of a file,
`{"bytes": ..., "path": ...}`, or a list of these; without it (or with an empty one) a row is text alone. `<image>` in
a question marks where a picture belongs. The model has another place for it, so marks are dropped; a row may do
without them, but if it has any, there are as many as pictures.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image

from ..chat.data_rows import ASSISTANT, HUMAN, check_marks, messages_of, named_images, read_message, without_marks
from ..modeling.processing_viscpm_chat import IMAGE_TOKEN


ImageSource = PIL.Image.Image | Path | bytes

CAPTION_INSTRUCTIONS = {
    "zh": (
        "描述一下这张图片。",
        "请简要描述这张图片。",
        "这张图片里有什么？",
        "用一句话概括这张图片。",
        "图中画的是什么？",
    ),
    "en": (
        "Describe this image.",
        "Describe the image briefly.",
        "What is in this picture?",
        "Summarise this picture in one sentence.",
        "What does the picture show?",
    ),
}


class BadRowError(ValueError):
    """A row of the data that can't be used; the message begins with its file and line."""

    def __init__(self, message: str):
        # A data loader's worker process hands on its whole traceback as the message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


@dataclass(frozen=True)
class ChatSample:
    """One answer to learn, with all that comes before it."""

    question: str
    answer: str
    images: tuple[ImageSource, ...] = ()
    source: str = ""
    """File and line, for messages."""
    turns_before: tuple[tuple[str, str], ...] = ()
    """Questions with their answers."""


@dataclass(frozen=True)
class ChatRecord:
    """A conversation: questions with their answers, a last question may have none."""

    turns: Sequence[tuple[str, str | None]]
    images: Sequence[ImageSource] = ()
    source: str = ""
    samples: list[ChatSample] = field(init=False, repr=False, compare=False)
    """One for every answered turn."""

    def __post_init__(self):
        samples: list[ChatSample] = []
        before: tuple[tuple[str, str], ...] = ()
        for number, (question, answer) in enumerate(self.turns):
            if answer is None or not answer.strip():
                if number + 1 < len(self.turns):
                    raise BadRowError(f"{self._where}turn {number + 1} has no answer, but others follow it.")
                break
            samples.append(ChatSample(question, answer, tuple(self.images), self.source, before))
            before += ((question, answer),)
        if not samples:
            raise BadRowError(f"{self._where}no turn has an answer, so there is nothing to learn.")
        object.__setattr__(self, "samples", samples)

    @property
    def _where(self) -> str:
        return f"{self.source}: " if self.source else ""


def read_record(
    row: Any, *, source: str = "", images_folder: Path | None = None, is_confined: bool = False, seed: Any = 0
) -> ChatRecord:
    """A row of any of the formats as a record; images stay unopened.

    Args:
        source: file and line, for messages.
        images_folder: what relative paths of images start from.
        is_confined: refuse paths that lead out of that folder.
        seed: draws a caption's question.

    Raises:
        BadRowError: saying what is wrong with the row.
    """
    if isinstance(row, ChatRecord):
        return row
    if not isinstance(row, Mapping):
        raise BadRowError(f"{source}: a row is an object with fields, not {type(row).__name__}.")
    try:
        images = _image_sources(named_images(row), images_folder, is_confined)
        messages = messages_of(row)
        if messages is not None:
            turns, num_marks, own = _turns(messages)
            images += [source for image in own for source in _image_sources(image, images_folder, is_confined)]
            check_marks(num_marks, len(images))
        elif row.get("caption") is not None:
            turns = [_caption_turn(row["caption"], bool(images), seed)]
        else:
            raise BadRowError(
                "neither 'conversations' nor 'caption' (nor 'messages', nor 'prompt' and 'completion') among its "
                f"fields: {', '.join(map(str, row))}."
            )
    except ValueError as error:
        raise BadRowError(f"{source}: {error}" if source else str(error)) from None
    return ChatRecord(turns, tuple(images), source)


def _turns(messages: Sequence[Any]) -> tuple[list[tuple[str, str | None]], int, list[Any]]:
    """Questions with their answers, the number of image marks in the questions, and images among their parts."""
    turns: list[tuple[str, str | None]] = []
    num_marks, images = 0, []
    for number, message in enumerate(messages, start=1):
        speaker, value, own = read_message(message, number)
        images += own
        if speaker in HUMAN:
            if not isinstance(value, str):
                raise BadRowError(f"message {number} is a question of type {type(value).__name__}, not text.")
            if turns and turns[-1][1] is None:
                raise BadRowError(f"message {number} is a question, but the one before it has no answer.")
            num_marks += value.count(IMAGE_TOKEN)
            turns.append((without_marks(value), None))
        elif speaker in ASSISTANT:
            if value is not None and not isinstance(value, str):
                raise BadRowError(f"message {number} is an answer of type {type(value).__name__}, not text.")
            if not turns or turns[-1][1] is not None:
                raise BadRowError(f"message {number} is an answer without a question before it.")
            turns[-1] = (turns[-1][0], value or "")
        else:
            raise BadRowError(f"message {number} is from {speaker!r}, which is neither human nor gpt.")
    return turns, num_marks, images


def _caption_turn(caption: Any, has_image: bool, seed: Any) -> tuple[str, str]:
    if isinstance(caption, list) and caption:
        caption = random.Random(f"{seed}/caption").choice(caption)
    if not isinstance(caption, str):
        raise BadRowError(f"'caption' is text or a list of texts, not {type(caption).__name__}.")
    if not has_image:
        raise BadRowError("a caption without an image.")
    language = "zh" if any("\u4e00" <= character <= "\u9fff" for character in caption) else "en"
    return random.Random(f"{seed}/instruction").choice(CAPTION_INSTRUCTIONS[language]), caption


def _image_sources(image: Any, folder: Path | None, is_confined: bool) -> list[ImageSource]:
    if image is None or image == "" or (isinstance(image, (list, tuple)) and not image):
        return []
    if isinstance(image, (list, tuple)):
        return [source for entry in image for source in _image_sources(entry, folder, is_confined)]
    if isinstance(image, Mapping):  # as `datasets` stores them
        if image.get("bytes") is not None:
            return [bytes(image["bytes"])]
        return _image_sources(image.get("path"), folder, is_confined)
    if isinstance(image, (PIL.Image.Image, bytes)):
        return [image]
    if not isinstance(image, (str, os.PathLike)):
        raise BadRowError(f"'image' is a path or a picture, not {type(image).__name__}.")
    # A path and nothing else: a URL or base64 in somebody's data is neither fetched nor decoded.
    path = Path(image)
    if "\0" in os.fspath(path):
        raise BadRowError("the image's path holds a NUL character.")
    if folder is not None:
        if is_confined and (path.is_absolute() or ".." in path.parts):
            raise BadRowError(f"the image {os.fspath(path)!r} lies outside the images folder {folder}.")
        path = folder / path
    return [path]
