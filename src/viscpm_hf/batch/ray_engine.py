"""Rows on the machines of a Ray cluster."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from transformers.utils import logging as transformers_logging

from .rows import InputRow
from .runner import WINDOW_BATCHES, BatchRunner, RowProcessor


logger = transformers_logging.get_logger(__name__)


class _Worker:
    """One copy of the model; Ray starts as many as were asked for.

    What goes wrong is handed on as a sentence in the column `failure`: Ray would print pages, and try again.
    """

    def __init__(self, load_processor: Callable[[], RowProcessor], batch_size: int):
        self.batch_size = batch_size
        self.failure = ""
        try:
            self.processor = load_processor()
        except Exception as error:
            self.failure = describe(error)

    def __call__(self, block: dict[str, Any]) -> dict[str, list[str]]:
        results: list[dict[str, Any]] = []
        if not self.failure:
            rows = [InputRow(**json.loads(row)) for row in block["row"]]
            try:
                BatchRunner(self.processor, self.batch_size, results.extend).run(rows)
            except Exception as error:
                self.failure = describe(error)
        lines = [json.dumps(result, ensure_ascii=False) for result in results]
        failures = [""] * len(lines)
        if self.failure:
            lines, failures = [*lines, ""], [*failures, self.failure]
        return {"result": lines, "failure": failures}


def describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1]


def run_with_ray(
    rows: Iterable[InputRow],
    load_processor: Callable[[], RowProcessor],
    batch_size: int,
    num_workers: int,
    write: Callable[[Sequence[dict[str, Any]]], None],
    on_rows: Callable[[int], None] = lambda count: None,
) -> None:
    """Runs rows on Ray Data.

    Args:
        rows: what to do.
        load_processor: loads the model, in each worker.
        batch_size: rows at once in a worker.
        num_workers: copies of the model, one a GPU where the cluster has any, else one a CPU.
        write: takes results as they come, in any order; called in this process.
        on_rows: is told of every row that is finished.

    Raises:
        ImportError: without Ray.
        ValueError: for more workers than there are GPUs, or CPUs.
        RuntimeError: if a worker fails for good; what is written stays.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(
            'The Ray engine needs Ray, which is not installed: pip install -c constraints.txt ".[ray]".'
        ) from error

    if not ray.is_initialized():
        # Or Ray tells its makers of every cluster that is started.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    resources = ray.cluster_resources()
    num_gpus = int(resources.get("GPU", 0))
    kind, count = ("GPU", num_gpus) if num_gpus else ("CPU", int(resources.get("CPU", 0)))
    if count < num_workers:
        raise ValueError(f"{num_workers} workers were asked for, one a {kind}, but the cluster has {count} {kind}s.")
    free = ray.available_resources().get(kind, 0)
    if free < num_workers:
        logger.warning(
            f"{free:g} of the cluster's {count} {kind}s are free; {num_workers} workers wait until they all are."
        )
    ray.data.DataContext.get_current().enable_progress_bars = False
    # A window is sorted by length, as without Ray; smaller ones for short files, so that every worker has some.
    items = [{"row": json.dumps(dataclasses.asdict(row), ensure_ascii=False)} for row in rows]
    window = max(batch_size, min(batch_size * WINDOW_BATCHES, -(-len(items) // num_workers)))
    results = ray.data.from_items(items, override_num_blocks=-(-len(items) // window)).map_batches(
        _Worker,
        fn_constructor_args=(load_processor, batch_size),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_gpus=1 if num_gpus else 0,
    )
    try:
        for row in results.iter_rows():
            if row["failure"]:
                raise RuntimeError(f"A Ray worker failed: {row['failure']}")
            write([json.loads(row["result"])])
            on_rows(1)
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"Ray failed: {describe(getattr(error, 'cause', None) or error)}") from error
