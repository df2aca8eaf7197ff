"""What Chat and Paint make of the rows of a file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..chat.answering import ChatRequest
from ..chat.data_rows import ASSISTANT, HUMAN, check_marks, messages_of, named_images, read_message, without_marks
from ..modeling.processing_viscpm_chat import IMAGE_TOKEN
from ..paint.painting import PaintRequest, check_paint_request, paint_batch
from ..paint.record import png_info, save_whole
from .rows import InputRow, resolve_image, seed_of, text_of
from .runner import PreparedRow


if TYPE_CHECKING:
    from ..chat.chat import VisCPMChat
    from ..paint.paint import VisCPMPaint

# Ids that are file names as they are, also where upper and lower case are the same.
PLAIN_NAME = re.compile(r"[a-z0-9_][a-z0-9_-]{0,99}")


@dataclass
class ChatRows:
    """Answers rows `{"id", "image", "question"}`, optionally with `"context"` (what an earlier turn's result has by
    that name) and `"seed"`; or with LLaVA's `"conversations"` (or `"messages"`, or `"prompt"` and `"completion"`) in
    place of the question: the last human turn is asked, with the turns before it as context. `"images"` is read as
    `"image"`; `<image>` marks are dropped, but there has to be a picture for each.
    """

    chat: VisCPMChat
    images: Path
    """Where relative paths of pictures begin."""
    mode: str = "reference"
    seed: int | None = None
    """Of the first row; the others' follow, unless a row has one of its own."""
    generation: Mapping[str, Any] = field(default_factory=dict)

    def prepare(self, row: InputRow) -> PreparedRow:
        values = row.values
        named = named_images(values)
        has_messages = "conversations" in values or "question" not in values
        messages = messages_of(values) if has_messages else None
        if messages is not None:
            question, turns, num_marks, own = conversation_of(messages)
            context = self.chat.context_of(turns)
            if own and named is not None:
                raise ValueError("Pictures stand both in the messages and beside them: keep one of them.")
            named = own or named
        else:
            text, context = text_of(values, "question"), text_of(values, "context", "")
            question, num_marks = without_marks(text), text.count(IMAGE_TOKEN)
        if values.get("image") == "":
            named = ""  # a row that names no picture has none, or null
        elif isinstance(named, list) and named is not values.get("image") and len(named) == 1:
            (named,) = named
        image = resolve_image(named, self.images)
        check_marks(num_marks, int(image is not None))
        request = ChatRequest(image, question, context)
        seed = seed_of(values, None if self.seed is None else self.seed + row.index)
        return PreparedRow(row, (request, seed), self.chat.prompt_length(request))

    def process(self, batch: Sequence[PreparedRow]) -> list[dict[str, Any] | Exception]:
        requests, seeds = zip(*(item.request for item in batch), strict=True)
        turns = self.chat.ask_batch(requests, mode=self.mode, seed=seeds, return_exceptions=True, **self.generation)
        return [
            turn
            if isinstance(turn, Exception)
            else {
                "question": turn.question,
                "answer": turn.answer,
                "context": turn.context,
                "tokens": turn.num_tokens,
                **({} if seed is None else {"seed": seed}),
            }
            for turn, seed in zip(turns, seeds, strict=True)
        ]


def conversation_of(messages: Sequence[Any]) -> tuple[str, list[tuple[str, str]], int, list[Any]]:
    """LLaVA's `[{"from": "human", "value": ...}, {"from": "gpt", ...}, ...]`, or messages of `role` and `content` ->
    the last question, the turns before it, the number of image marks in the questions, and pictures among their parts;
    an answer after the question is what a data set expects, and is not shown to the model.

    Raises:
        ValueError: for anything else.
    """
    if not messages:
        raise ValueError('"conversations" is a list of turns {"from": "human" or "gpt", "value": text}.')
    texts, num_marks, images = [], 0, []
    for index, message in enumerate(messages):
        speaker, text, own = read_message(message, index)
        expected = (HUMAN, ASSISTANT)[index % 2]
        if speaker not in expected or not isinstance(text, str):
            raise ValueError(f'Turn {index} of "conversations" is not {{"from": "{expected[0]}", "value": text}}.')
        if index % 2 == 0:
            num_marks += text.count(IMAGE_TOKEN)
            text = without_marks(text)
        texts.append(text)
        images += own
    last = (len(texts) - 1) // 2 * 2
    return texts[last], list(zip(texts[:last:2], texts[1:last:2], strict=True)), num_marks, images


@dataclass
class PaintRows:
    """Draws rows `{"id", "prompt"}`, optionally with `"negative_prompt"` and `"seed"`, the best candidate of each."""

    painter: VisCPMPaint
    output: Path
    """Folder of the images, which are named by their rows' ids."""
    seed: int | None = None
    """Of the first row; the others' follow, unless a row has one of its own."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of [`paint_batch`]."""

    def prepare(self, row: InputRow) -> PreparedRow:
        values = row.values
        negative = None if values.get("negative_prompt") is None else text_of(values, "negative_prompt")
        seed = seed_of(values, None if self.seed is None else self.seed + row.index)
        request = PaintRequest(text_of(values, "prompt"), negative, seed)
        return PreparedRow(row, request, check_paint_request(self.painter, request))

    def process(self, batch: Sequence[PreparedRow]) -> list[dict[str, Any] | Exception]:
        painted = paint_batch(self.painter, [item.request for item in batch], **self.options)
        results: list[dict[str, Any] | Exception] = []
        for item, result in zip(batch, painted, strict=True):
            if isinstance(result, Exception):
                results.append(result)
                continue
            path = self.output / image_name(item.row.id)
            found = {
                "prompt": result.prompt,
                "file": path.name,
                "seed": result.seeds[0],
                "score": result.scores[0],
                "flagged": result.flags[0],
                "reason": result.reasons[0],
            }
            info = png_info(result, 0, self.painter.model_path)
            for name in ("file", "flagged", "reason"):
                if found[name] is not None:
                    info.add_itxt(name, str(found[name]))
            save_whole(result.images[0], path, pnginfo=info)
            results.append(found)
        return results


def image_name(identifier: str | int) -> str:
    """A file name of an id: another one for every id, and safe wherever files are kept."""
    text = str(identifier)
    if PLAIN_NAME.fullmatch(text):
        return f"{text}.png"
    digest = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', text)[:64]}-{digest}.png"
