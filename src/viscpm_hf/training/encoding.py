"""Samples as the models take them: CPM-Bee's documents, or the siblings' conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from ..modeling.chat_processing import ChatProcessing
from ..modeling.document_cpm_bee import ANSWER_KEY, IGNORE_INDEX, EncodedDocument
from ..modeling.processing_viscpm_chat import ChatPrompt, VisCPMChatProcessor
from ..modeling.processing_vision_resampler import VisionResamplerProcessor
from .records import ChatSample


Size = tuple[int, int]
"""Height and width of a picture."""


class Encoding:
    """Samples as a processor's model takes them. An encoded one is of the length of its tokens."""

    def __init__(self, processor: Any):
        self.processor = processor

    def encode(self, sample: ChatSample, sizes: Sequence[Size] = ()) -> Any:
        """A sample with pictures of these sizes, its question as a chat asks it."""
        context = ""
        for question, answer in sample.turns_before:
            context = self.processor.next_context(context, question, answer)
        return self._encoded(sample, context, sizes)


class DocumentEncoding(Encoding):
    """Samples as CPM-Bee's documents, in which a picture has the same length whatever its size."""

    def _encoded(self, sample: ChatSample, context: str, sizes: Sequence[Size]) -> EncodedDocument:
        escape = self.processor.tokenizer.escape
        document = {"context": context, "question": escape(sample.question), ANSWER_KEY: escape(sample.answer)}
        return self.processor.encode_prompt(ChatPrompt(document, len(sample.images)), close_answers=True)

    def picture_sizes(self, sample: ChatSample) -> list[Size]:
        """What [`encode`] needs to know of a sample's pictures."""
        return []

    def filler(self, size: Size) -> EncodedDocument:
        """A question about a picture, from which nothing is learned."""
        return self.processor.encode_prompt(ChatPrompt({"context": "", "question": "", ANSWER_KEY: ""}, 1))

    def batch(self, rows: list[EncodedDocument], pictures: list[PIL.Image.Image]) -> dict[str, Any]:
        """Rows padded on the left, `labels` of all their tokens."""
        options = {"padding_side": "left", "return_tensors": "pt"}
        batch = dict(self.processor.tokenizer.collate(rows, with_labels=True, **options))
        if pictures:
            batch["pixel_values"] = self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return batch


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation's tokens; those from `prompt_length` on are the answer to learn."""

    ids: list[int]
    prompt_length: int
    num_images: int

    def __len__(self) -> int:
        return len(self.ids)


class ConversationEncoding(Encoding):
    """Samples as conversations of the siblings' chat templates; the pictures belong to the first question."""

    def _encoded(self, sample: ChatSample, context: str, sizes: Sequence[Size]) -> EncodedConversation:
        messages = self.processor.messages_of_turn(sample.question, context, len(sample.images))
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        images = [self.processor.image_text(self.processor.grid_of(size)) for size in sizes]
        prompt = self.processor.expand(prompt, images)
        before = self.processor.encode(prompt)
        # Together with what is before it, an answer may be cut into other tokens than alone.
        ids = self.processor.encode(prompt + self.processor.escape_answer(sample.answer))
        same = (place for place, (one, other) in enumerate(zip(before, ids, strict=False)) if one != other)
        prompt_length = next(same, min(len(before), len(ids)))
        return EncodedConversation([*ids, self.processor.tokenizer.eos_token_id], prompt_length, len(sizes))

    def picture_sizes(self, sample: ChatSample) -> list[Size]:
        sizes = []
        for image in sample.images:
            picture = self.processor.image_processor.fetch_images(image)
            sizes.append((picture.height, picture.width))
            if isinstance(image, Path):
                picture.close()
        return sizes

    def filler(self, size: Size) -> EncodedConversation:
        encoded = self.encode(ChatSample("", "", images=(PIL.Image.new("RGB", (1, 1)),)), [size])
        return EncodedConversation(encoded.ids, len(encoded), encoded.num_images)

    def batch(self, rows: list[EncodedConversation], pictures: list[PIL.Image.Image]) -> dict[str, Any]:
        batch: dict[str, Any] = dict(
            self.processor.tokenizer.pad(
                {"input_ids": [row.ids for row in rows], "attention_mask": [[1] * len(row) for row in rows]},
                padding_side="left",
                return_tensors="pt",
            )
        )
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        for row, target in zip(rows, labels, strict=True):
            answer = row.ids[row.prompt_length :]
            if answer:
                target[-len(answer) :] = torch.tensor(answer)
        batch["labels"] = labels
        if pictures:
            features = self.processor.image_processor(pictures, return_tensors="pt")
            features.pop("grids", None)
            views = features.pop("num_views", torch.ones(len(pictures), dtype=torch.long))
            parts = views.split([row.num_images for row in rows])
            batch |= {**features, "num_views": torch.stack([part.sum() for part in parts])}
        return batch


_ENCODINGS = {VisCPMChatProcessor: DocumentEncoding, VisionResamplerProcessor: ConversationEncoding}


def encoding_of(processor: ChatProcessing) -> Encoding:
    """How samples become what this processor's model takes."""
    return next(encoding(processor) for kind, encoding in _ENCODINGS.items() if isinstance(processor, kind))
