"""What Chat and Paint make of the rows of a file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..chat.answering import ChatRequest
from ..paint.painting import PaintRequest, check_paint_request, paint_batch
from ..paint.record import png_info
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
    that name) and `"seed"`; or with LLaVA's `"conversations"` in place of the question: the last human turn is asked,
    with the turns before it as context.
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
        image = resolve_image(values.get("image"), self.images)
        if "conversations" in values:
            question, turns = conversation_of(values["conversations"])
            context = self.chat.context_of(turns)
        else:
            question, context = text_of(values, "question"), text_of(values, "context", "")
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


def conversation_of(turns: Any) -> tuple[str, list[tuple[str, str]]]:
    """LLaVA's `[{"from": "human", "value": ...}, {"from": "gpt", ...}, ...]` -> the last question and the turns before
    it; an answer after it is what a data set expects, and is not shown to the model.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(turns, list) or not turns:
        raise ValueError('"conversations" is a list of turns {"from": "human" or "gpt", "value": text}.')
    texts = []
    for index, turn in enumerate(turns):
        expected = ("human", "gpt")[index % 2]
        if not isinstance(turn, dict) or turn.get("from") != expected or not isinstance(turn.get("value"), str):
            raise ValueError(f'Turn {index} of "conversations" is not {{"from": "{expected}", "value": text}}.')
        texts.append(turn["value"].replace("<image>", "").strip())
    last = (len(texts) - 1) // 2 * 2
    return texts[last], list(zip(texts[:last:2], texts[1:last:2], strict=True))


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
            temporary = path.with_name(path.name + ".tmp")
            result.images[0].save(temporary, "PNG", pnginfo=info)
            os.replace(temporary, path)
            results.append(found)
        return results


def image_name(identifier: str | int) -> str:
    """A file name of an id: another one for every id, and safe wherever files are kept."""
    text = str(identifier)
    if PLAIN_NAME.fullmatch(text):
        return f"{text}.png"
    digest = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', text)[:64]}-{digest}.png"


__all__ = ["ChatRows", "PaintRows"]
