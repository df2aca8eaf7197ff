"""Runs rows through a model in batches of similar length, whatever the model is and whoever calls.

What becomes of a batch is a [`RowProcessor`]'s work; it knows nothing of files, processes or devices, so that it also
serves where something else hands out the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from accelerate.utils import release_memory
from accelerate.utils.memory import should_reduce_batch_size
from transformers.utils import logging

from .rows import InputRow


logger = logging.get_logger(__name__)

# Rows are sorted by length within so many batches: more would sort better, and keep more rows waiting.
WINDOW_BATCHES = 16


@dataclass(frozen=True)
class PreparedRow:
    """A row that the model can take."""

    row: InputRow
    request: Any
    length: int
    """Of its prompt, in tokens."""


class RowProcessor(Protocol):
    """What a model makes of rows."""

    def prepare(self, row: InputRow) -> PreparedRow:
        """Raises `ValueError` for a row that the model can't take; reads nothing but the row."""

    def process(self, batch: Sequence[PreparedRow]) -> list[dict[str, Any] | Exception]:
        """The result of every row of a batch, or why there is none."""


def error_result(row: InputRow, error: Exception) -> dict[str, Any]:
    """The line of a row that failed."""
    text = " ".join(str(error).split())
    if not text or not isinstance(error, (ValueError, OSError, RuntimeError)):
        text = f"{type(error).__name__}: {text}"  # not made for users
    return {"id": row.id, **({"line": row.line} if row.id is None else {}), "error": text}


def in_batches(
    rows: Iterable[InputRow],
    processor: RowProcessor,
    batch_size: int,
    on_failure: Callable[[InputRow, Exception], None],
) -> Iterator[list[PreparedRow]]:
    """Yields batches of similar length, the longest of a window first: what doesn't fit is known early."""
    rows = iter(rows)
    while window := list(islice(rows, batch_size * WINDOW_BATCHES)):
        prepared = []
        for row in window:
            try:
                if row.error is not None:
                    raise ValueError(row.error)
                prepared.append(processor.prepare(row))
            except ValueError as error:
                on_failure(row, error)
        prepared.sort(key=lambda item: (-item.length, item.row.index))
        for begin in range(0, len(prepared), batch_size):
            yield prepared[begin : begin + batch_size]


class BatchRunner:
    """Feeds rows to a processor, and results to a function.

    Args:
        processor: makes results of rows.
        batch_size: rows at once; halved for good when memory runs out.
        write: takes results as they come, in any order.
    """

    def __init__(self, processor: RowProcessor, batch_size: int, write: Callable[[Sequence[dict[str, Any]]], None]):
        self.processor = processor
        self.batch_size = batch_size
        self.write = write

    def run(self, rows: Iterable[InputRow], on_rows: Callable[[int], None] = lambda count: None) -> None:
        """Runs all rows; `on_rows` is told of every few that are finished."""

        def fail(row: InputRow, error: Exception) -> None:
            self.write([error_result(row, error)])
            on_rows(1)

        for batch in in_batches(rows, self.processor, self.batch_size, fail):
            for count in self._run_batch(batch, self.batch_size):
                on_rows(count)

    def _run_batch(self, batch: list[PreparedRow], size: int) -> Iterator[int]:
        """Runs a batch in parts of that size, smaller ones where a part fails; yields how many rows are finished."""
        for begin in range(0, len(batch), size):
            part = batch[begin : begin + size]
            failure = None
            try:
                results = self.processor.process(part)
            except Exception as error:
                if is_fatal(error):
                    raise
                failure = error.with_traceback(None)  # which holds on to the batch's tensors
            if failure is not None:
                release_memory()
                if len(part) > 1:  # one of the rows may be to blame
                    yield from self._run_batch(part, self._smaller(len(part), failure))
                    continue
                results = [failure]
            self.write(
                [
                    error_result(item.row, result) if isinstance(result, Exception) else {"id": item.row.id, **result}
                    for item, result in zip(part, results, strict=True)
                ]
            )
            yield len(part)

    def _smaller(self, size: int, failure: Exception) -> int:
        if not is_out_of_memory(failure):
            return 1
        self.batch_size = min(self.batch_size, size // 2)
        logger.warning(f"Out of memory with {size} rows at once; going on with {self.batch_size}.")
        return size // 2


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


def is_fatal(error: BaseException) -> bool:
    """Whether the device is lost to this process, so that all further rows would fail as well."""
    return "CUDA error" in str(error) and not is_out_of_memory(error)
