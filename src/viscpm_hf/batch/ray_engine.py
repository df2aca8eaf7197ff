"""Rows on the machines of a Ray cluster."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .rows import InputRow
from .runner import WINDOW_BATCHES, BatchRunner, RowProcessor


class _Worker:
    """One copy of the model; Ray starts as many as were asked for."""

    def __init__(self, load_processor: Callable[[], RowProcessor], batch_size: int):
        self.processor = load_processor()
        self.batch_size = batch_size

    def __call__(self, block: dict[str, Any]) -> dict[str, list[str]]:
        results: list[dict[str, Any]] = []
        rows = [InputRow(**json.loads(row)) for row in block["row"]]
        BatchRunner(self.processor, self.batch_size, results.extend).run(rows)
        return {"result": [json.dumps(result, ensure_ascii=False) for result in results]}


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
        num_workers: copies of the model, one a GPU where the cluster has any.
        write: takes results as they come, in any order; called in this process.
        on_rows: is told of every row that is finished.

    Raises:
        ImportError: without Ray.
        ValueError: for more workers than GPUs.
        RuntimeError: if a worker fails for good; what is written stays.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError('The Ray engine needs Ray, which is not installed: pip install "viscpm-hf[ray]".') from error

    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    if 0 < num_gpus < num_workers:
        raise ValueError(f"{num_workers} workers were asked for, one a GPU, but the cluster has {num_gpus} GPUs.")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A window is sorted by length, as without Ray; smaller ones for short files, so that every worker has some.
    items = [{"row": json.dumps(dataclasses.asdict(row), ensure_ascii=False)} for row in rows]
    window = max(batch_size, min(batch_size * WINDOW_BATCHES, -(-len(items) // num_workers)))
    results = ray.data.from_items(items, override_num_blocks=-(-len(items) // window)).map_batches(
        _Worker,
        fn_constructor_args=(load_processor, batch_size),
        batch_size=None,
        concurrency=num_workers,
        num_gpus=1 if num_gpus else 0,
    )
    try:
        for row in results.iter_rows():
            write([json.loads(row["result"])])
            on_rows(1)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise RuntimeError(
            f"A Ray worker failed: {type(cause).__name__}: {str(cause).strip().splitlines()[-1]}. Finished rows are "
            "kept: run it again to go on."
        ) from error
