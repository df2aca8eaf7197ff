"""Samples of one or several data files, and the order in which training draws them."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.utils import logging

from .data_files import DataPart
from .encoding import encoding_of
from .records import BadRowError, ChatRecord, ChatSample, read_record


logger = logging.get_logger(__name__)

MAX_REPORTED_ROWS = 20


@dataclass
class SkippedRows:
    """What of the data is not trained, and why."""

    bad: int = 0
    too_long: int = 0
    too_small: int = 0
    reports: list[str] = field(default_factory=list)
    """Messages on the first of them."""

    @property
    def total(self) -> int:
        return self.bad + self.too_long + self.too_small

    def add(self, kind: str, message: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.reports) < MAX_REPORTED_ROWS:
            self.reports.append(message)
            logger.warning("skipped: %s", message)
        elif len(self.reports) == MAX_REPORTED_ROWS:
            self.reports.append("further ones are counted, not listed")
            logger.warning("skipped: more rows; further ones are counted, not listed")

    def __str__(self) -> str:
        return f"{self.bad} bad, {self.too_long} too long, {self.too_small} with too small pictures"


@dataclass(frozen=True)
class SampleLimits:
    """Which samples are trained."""

    max_length: int
    min_image_side: int
    bad_rows: str = "skip"


class RowDataset(Dataset):
    """What can be used of the rows of several files. All are read once in the beginning; after that, only those that
    are asked for.

    Args:
        parts: what to mix.
        images: folder of the pictures; None: beside each file.
        bad_rows: `"skip"` reports and counts them in `skipped`, `"fail"` raises the first.

    Raises:
        BadRowError: for the first bad row, if they are to fail.
        ValueError: if nothing of a part can be used.
    """

    def __init__(self, parts: Sequence[DataPart], images: Path | None, bad_rows: str):
        self.parts, self.images, self.bad_rows = list(parts), images, bad_rows
        self.skipped = SkippedRows()
        self.sizes: list[int] = []
        """Items of every part."""
        self._part, self._row = array("H"), array("q")
        for number, part in enumerate(self.parts):
            before, num_rows = len(self), 0
            for row, content in tqdm(part.source.scan(), desc=part.name, unit=" rows", disable=None):
                num_rows += 1
                try:
                    if isinstance(content, BadRowError):
                        raise content
                    self._take(number, row, content)
                except (ValueError, OSError) as error:
                    self.skip(part.source.where(row), error)
            self.sizes.append(len(self) - before)
            logger.info("%s: %d rows, %d samples", part.name, num_rows, self.sizes[-1])
            if len(self) == before:
                raise ValueError(self._nothing_left(part.name, num_rows))

    def _take(self, number: int, row: int, content: Any) -> None:
        """Keeps what can be used of a row of part `number`, or raises `ValueError` or `OSError`."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._row)

    def skip(self, where: str, error: Exception) -> None:
        """Notes a bad row; raises [`BadRowError`] if they are to fail."""
        message = str(error) if isinstance(error, BadRowError) else f"{where}: {error}"
        if self.bad_rows == "fail":
            raise BadRowError(message) from None
        self.skipped.add("bad", message)

    def _item(self, read: Callable[..., Any], index: int) -> Any:
        number, row = self._part[index], self._row[index]
        return self._read(read, number, row, self.parts[number].source.row(row))

    def _read(self, read: Callable[..., Any], number: int, row: int, content: Any) -> Any:
        """A row of part `number` as `read` makes it of its content."""
        rows = self.parts[number].source
        return read(
            content,
            source=rows.where(row),
            images_folder=self.images or rows.folder,
            is_confined=self.images is not None,
            seed=row,
        )

    def _nothing_left(self, name: str, num_rows: int) -> str:
        if not num_rows:
            return f"{name} has no rows."
        first = f" The first: {self.skipped.reports[0]}" if self.skipped.reports else ""
        return f"Nothing of {name} can be trained: of {num_rows} rows, {self.skipped}.{first}"


class ChatDataset(RowDataset):
    """One [`ChatSample`] for every answered turn of the files' rows.

    In the beginning rows are also measured, and their pictures decoded: one that fails in an evaluation would enter
    its mean with a loss of 0.
    """

    def __init__(
        self,
        parts: Sequence[DataPart],
        processor: Any,
        limits: SampleLimits,
        images: Path | None = None,
    ):
        self.processor, self.limits = processor, limits
        self.lengths, self._turn = array("l"), array("H")
        super().__init__(parts, images, limits.bad_rows)

    def __getitem__(self, index: int) -> ChatSample:
        return self._item(read_record, index).samples[self._turn[index]]

    def _take(self, number: int, row: int, content: Any) -> None:
        record = self._read(read_record, number, row, content)
        is_small = self._has_small_image(record)
        lengths = [sample_length(self.processor, sample) for sample in record.samples]
        if is_small:
            self.skipped.add("too_small", f"{record.source}: {is_small}")
            return
        for turn, length in enumerate(lengths):
            if length > self.limits.max_length:
                self.skipped.add(
                    "too_long",
                    f"{record.source}: turn {turn + 1} makes {length:,} tokens, more than max_length "
                    f"{self.limits.max_length:,}",
                )
                break  # those after it have more before them
            self._part.append(number)
            self._row.append(row)
            self._turn.append(turn)
            self.lengths.append(length)

    def _has_small_image(self, record: ChatRecord) -> str:
        """What is too small about a record's pictures, as far as files show it; "" if nothing is.

        Raises:
            ValueError: for a file that is no picture or a damaged one, or a decompression bomb.
        """
        for image in record.images:
            if isinstance(image, (Path, bytes)):
                with self.processor.image_processor.fetch_images(image) as picture:
                    problem = too_small(picture.size, self.limits.min_image_side)
                if problem:
                    return problem
        return ""


def too_small(size: tuple[int, int], min_side: int) -> str:
    if min(size) >= min_side:
        return ""
    return f"a picture of {size[0]}x{size[1]} pixels is smaller than min_image_side {min_side}"


def sample_length(processor: Any, sample: ChatSample) -> int:
    """Tokens of a sample."""
    encoding = encoding_of(processor)
    return len(encoding.encode(sample, encoding.picture_sizes(sample)))


@dataclass(frozen=True)
class Draw:
    """What one index of the sampler stands for."""

    samples: Sequence[ChatSample]
    seed: str
    """Of everything random about them: the same item drawn again later has another."""
    is_augmented: bool = False


class Draws(Dataset):
    """A dataset of samples or records behind draw numbers: item `i` on pass `p` over the data is `p * len + i`.

    So what is random about an item depends on nothing but the number: not on the process, nor on what came before.

    Args:
        dataset: items are [`ChatSample`]s, [`ChatRecord`]s, or rows as [`read_record`] takes them.
    """

    def __init__(self, dataset: Dataset, seed: int, *, bad_rows: str = "skip", do_augment: bool = False):
        self.dataset, self.seed = dataset, seed
        self.bad_rows, self.do_augment = bad_rows, do_augment

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Draw:
        _, index = divmod(number, len(self.dataset))
        seed = f"{self.seed}/{number}"
        try:
            item = self.dataset[index]
            if isinstance(item, ChatSample):
                return Draw((item,), seed, self.do_augment)
            record = read_record(item, source=f"item {index}", seed=seed)
            return Draw(record.samples, seed, self.do_augment)
        except BadRowError as error:
            if self.bad_rows == "fail":
                raise
            logger.warning("skipped: %s", error)
            return Draw((), seed)


class MixtureSampler(Sampler[int]):
    """Draw numbers of an epoch: `weight * size` items of every part, in an order that seed and epoch determine.

    A part's items come from an endless row of shuffled passes over it, so that none is drawn again before all others
    were; a part of weight 0.5 is through after two epochs.

    Args:
        sizes: items of the parts, which follow each other in the dataset.
        weights: how often each is seen in an epoch.
        lengths: of all items, to put ones of like length into the same `group_size`; None: no such grouping.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        *,
        lengths: Sequence[int] | None = None,
        group_size: int = 1,
    ):
        self.sizes, self.seed, self.lengths, self.group_size = list(sizes), seed, lengths, group_size
        self.counts = [max(1, round(size * weight)) for size, weight in zip(sizes, weights, strict=True)]
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[int]:
        total, begin, draws = sum(self.sizes), 0, []
        for part, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            first, last = self.epoch * count, (self.epoch + 1) * count
            for number in range(first // size, (last - 1) // size + 1):
                order = torch.randperm(size, generator=self._generator("pass", part, number)).tolist()
                chosen = order[max(0, first - number * size) : last - number * size]
                draws += [number * total + begin + index for index in chosen]
            begin += size
        generator = self._generator("epoch", self.epoch)
        if self.lengths is None or self.group_size == 1:
            return iter([draws[index] for index in torch.randperm(len(draws), generator=generator).tolist()])
        lengths = [self.lengths[number % total] for number in draws]
        grouped = get_length_grouped_indices(lengths, self.group_size, generator=generator)
        groups = [grouped[place : place + self.group_size] for place in range(0, len(grouped), self.group_size)]
        # Within its reach the grouping goes from long to short; training shouldn't. An incomplete group stays last.
        num_full = len(grouped) // self.group_size
        order = [*torch.randperm(num_full, generator=generator).tolist(), *range(num_full, len(groups))]
        return iter([draws[index] for group in order for index in groups[group]])

    def _generator(self, *parts: Any) -> torch.Generator:
        seed = random.Random("/".join(map(str, (self.seed, *parts)))).getrandbits(63)
        return torch.Generator().manual_seed(seed)
