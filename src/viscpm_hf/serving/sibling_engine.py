"""The engine of the siblings: [`ChatEngine`] with their prompts, pictures and rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch

from ..chat.answering import ChatRequest
from ..chat.chat import VisCPMChat
from ..chat.sibling_chat import AnswerText, SiblingChat, encode_images, model_inputs
from ..modeling.decoding_presets import default_preset
from ..pipelines.safety import UnsafeImageError
from .engine import ChatEngine, Search, SearchAbandonedError
from .image_cache import ImageCache, image_key
from .preparing import Picture, opened
from .sampling import Sampler
from .sibling_batch import SiblingBatch, SiblingRow
from .tickets import EngineLimits, Finished, TextPiece


# Of SentencePiece: a single byte, and what stands for the blank before a word.
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
WORD_BEGIN = "\u2581"


@dataclass(frozen=True)
class SiblingImage:
    """A picture of a prompt."""

    picture: PIL.Image.Image
    key: str


@dataclass(frozen=True)
class SiblingPrompt:
    """A conversation and its pictures, ready for the engine."""

    ids: list[int]
    images: tuple[SiblingImage, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class SiblingDecoding:
    """How `generate` decodes."""

    options: Mapping[str, Any]

    @property
    def num_beams(self) -> int:
        return self.options.get("num_beams", 1)

    @property
    def last_step(self) -> int:
        return self.options["max_new_tokens"]


class SiblingPreparer:
    """As [`PromptPreparer`]; needs no model and may run in any thread."""

    def __init__(self, chat: SiblingChat):
        self.chat = chat

    def messages(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Picture] = ()) -> SiblingPrompt:
        """A conversation as the chat template takes it, its pictures in order.

        Raises:
            ValueError: for a conversation out of turn, an unusable picture, or a prompt that is too long.
            UnsafeImageError: if the safety checker flags a picture.
        """
        processor, checker = self.chat.processor, self.chat.image_safety_checker
        conversation = list(messages)
        text = processor.apply_chat_template(conversation, add_generation_prompt=True)
        count = text.count(processor.image_token)
        if count != len(images):
            raise ValueError(f"The messages have {count} pictures, but {len(images)} were given.")
        grids, prepared = [], []
        for image in images:
            image = processor.image_processor.fetch_images(opened(image))  # the checker sees what the model does
            if checker is not None and checker(image):
                raise UnsafeImageError("The safety checker flagged the image, so nothing is answered about it.")
            picture = processor.image_processor.process_image(image, do_convert_rgb=True)
            grids.append(processor.grid_of((picture.height, picture.width)))
            prepared.append(SiblingImage(picture, image_key(picture.size, picture.tobytes())))
        return SiblingPrompt(processor.encode_chat(conversation, grids), tuple(prepared))

    def turn(self, image: PIL.Image.Image | None, question: str, context: str = "") -> SiblingPrompt:
        """A question as [`SiblingChat.chat`] takes it; raises as [`messages`]."""
        conversation = self.chat.conversation(ChatRequest(image, question, context))
        return self.messages(conversation, [] if image is None else [image])


class SiblingImageEncoder:
    """The vision tower behind its cache, for the engine's thread."""

    def __init__(self, chat: SiblingChat, cache: ImageCache):
        self.chat = chat
        self.cache = cache

    @torch.no_grad()
    def __call__(self, prompts: Sequence[SiblingPrompt]) -> list[torch.Tensor | None]:
        """The encoded views of every prompt; pictures that aren't cached go through the tower together."""
        pictures = {image.key: image.picture for prompt in prompts for image in prompt.images}
        known = {key: self.cache.get(key) for key in pictures}
        missing = [key for key, encoded in known.items() if encoded is None]
        if missing:
            encoded = encode_images(self.chat.model, self.chat.processor, [pictures[key] for key in missing])
            for key, own in zip(missing, encoded, strict=True):
                known[key] = own.features.clone()
                self.cache.put(key, known[key])
        return [
            torch.cat([known[image.key] for image in prompt.images]) if prompt.images else None for prompt in prompts
        ]


class SiblingEngine(ChatEngine):
    """Answers questions to a [`SiblingChat`] of many callers together."""

    chat: SiblingChat

    def _make_parts(self) -> None:
        self.prepare = SiblingPreparer(self.chat)
        self._encode_images = SiblingImageEncoder(self.chat, self.image_cache)
        self._batch = SiblingBatch(self.chat.model, self.chat.processor)

    def reference(self, **options) -> SiblingDecoding:
        """The original's preset, with other values where `options` has them."""
        return SiblingDecoding({**default_preset(self.chat.model.config), **options})

    def _new_row(self, prompt: SiblingPrompt, sampler: Sampler) -> SiblingRow:
        return SiblingRow(prompt.ids, sampler, AnswerText(self.chat.processor))

    def _new_text(self, row: SiblingRow, token: int, is_last: bool) -> str:
        return row.text.new_text(row.answer, is_last)

    def _token_bytes(self, token: int, row: SiblingRow | None = None) -> bytes:
        name = self.chat.processor.tokenizer.convert_ids_to_tokens(token)
        byte = BYTE_PIECE.fullmatch(name)
        return bytes([int(byte[1], 16)]) if byte else name.replace(WORD_BEGIN, " ").encode()

    def _vocabulary(self) -> list[bytes]:
        tokenizer = self.chat.processor.tokenizer
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        return [b"" if token in special else self._token_bytes(token) for token in range(len(tokenizer))]

    def _search_together(self, group: list[Search]) -> None:
        prompts = [entry.ticket.prompt for entry in group]
        model, processor = self.chat.model, self.chat.processor
        inputs = model_inputs(model, processor, [prompt.ids for prompt in prompts], self._encode_images(prompts))

        def between_steps(ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
            self.statistics.steps += 1
            self.statistics.rows_in_steps += len(group)
            if self._queue.drain is False or all(entry.ticket.is_cancelled for entry in group):
                raise SearchAbandonedError
            self._turn()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        sequences = self.chat.generate(inputs, **group[0].decoding.options, stopping_criteria=[between_steps])
        end = processor.tokenizer.eos_token_id
        for entry, ids in zip(group, sequences, strict=True):
            is_whole = end in ids
            ids = ids[: ids.index(end)] if is_whole else ids
            self.statistics.answer_tokens += len(ids)
            entry.ticket.tell(TextPiece(0, processor.answer_text(ids)))
            entry.ticket.tell(Finished(0, "stop" if is_whole else "length", len(ids)))
            self._pace.finished()


def open_engine(chat: VisCPMChat | SiblingChat, limits: EngineLimits | None = None) -> ChatEngine:
    """The engine of a model."""
    return (SiblingEngine if isinstance(chat, SiblingChat) else ChatEngine)(chat, limits)
