"""Samples to batches: pictures opened, made the tower's, documents encoded, answers labelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import PIL.Image
from transformers.utils import logging

from ..modeling.document_cpm_bee import IGNORE_INDEX
from .augmentation import augment
from .chat_dataset import Draw, SampleLimits, too_small
from .encoding import encoding_of
from .records import BadRowError, ChatSample, ImageSource


logger = logging.get_logger(__name__)

# A blank picture, for what `needs_image` explains.
FILLER_SIZE = (32, 32)


class ChatCollator:
    """Makes a batch of [`Draw`]s: one row for each of their samples.

    Rows are padded on the left, so that all answers end together and `logits_to_keep` spares the head the prompts:
    `labels` are those of the last tokens alone.

    Args:
        needs_image: a batch without any picture gets a row about a blank one, from which nothing is learned. Where
            several processes train together, each has to run the vision tower in every step, or the others wait.
    """

    def __init__(self, processor: Any, limits: SampleLimits, *, needs_image: bool = False):
        self.processor, self.limits, self.needs_image = processor, limits, needs_image
        self.encoding = encoding_of(processor)

    def __call__(self, draws: Sequence[Draw]) -> dict[str, Any]:
        rows: list[Any] = []
        pictures: list[PIL.Image.Image] = []
        for draw in draws:
            for sample in draw.samples:
                try:
                    opened = [
                        self._open(image, f"{draw.seed}/{number}" if draw.is_augmented else None)
                        for number, image in enumerate(sample.images)
                    ]
                    rows.append(self._encode(sample, opened))
                    pictures += opened
                except (ValueError, OSError) as error:
                    message = f"{sample.source}: {error}" if sample.source else str(error)
                    if self.limits.bad_rows == "fail":
                        raise BadRowError(message) from error
                    logger.warning("skipped: %s", message)
        if not rows or (self.needs_image and not pictures):
            rows.append(self.encoding.filler(FILLER_SIZE))
            pictures.append(PIL.Image.new("RGB", FILLER_SIZE))
        return self._batch(rows, pictures)

    def _open(self, image: ImageSource, augmentation_seed: str | None) -> PIL.Image.Image:
        processor = self.processor.image_processor
        picture = processor.fetch_images(image)
        problem = too_small(picture.size, self.limits.min_image_side)
        if problem:
            raise ValueError(problem)
        picture = processor.process_image(picture, do_convert_rgb=True)
        return picture if augmentation_seed is None else augment(picture, augmentation_seed)

    def _encode(self, sample: ChatSample, pictures: Sequence[PIL.Image.Image]) -> Any:
        encoded = self.encoding.encode(sample, [(picture.height, picture.width) for picture in pictures])
        if len(encoded) > self.limits.max_length:
            raise ValueError(f"{len(encoded):,} tokens, more than max_length {self.limits.max_length:,}")
        return encoded

    def _batch(self, rows: list[Any], pictures: list[PIL.Image.Image]) -> dict[str, Any]:
        batch = self.encoding.batch(rows, pictures)
        # Position p predicts p + 1: from the one before the first label on.
        columns = (batch["labels"] != IGNORE_INDEX).any(0).nonzero()
        first = int(columns[0]) if len(columns) else batch["labels"].shape[1] - 1
        batch["logits_to_keep"] = batch["labels"].shape[1] - first + 1
        batch["labels"] = batch["labels"][:, first - 1 :]
        return batch
