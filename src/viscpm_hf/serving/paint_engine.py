"""Draws the pictures of many requests; those that agree in size and steps together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from transformers.utils import logging

from ..paint.paint import PaintResult, VisCPMPaint
from ..paint.painting import PaintRequest, paint_batch
from .tickets import EngineBusyError, EngineClosedError


logger = logging.get_logger(__name__)


class DrawingCancelledError(RuntimeError):
    """Nobody waits for the pictures any more."""


@dataclass(frozen=True)
class DrawingSettings:
    """What has to be the same for prompts that are drawn together."""

    num_images: int = 1
    height: int | None = None
    width: int | None = None
    """Pixels, multiples of 8; None: what the checkpoint was made for."""
    steps: int = 50
    guidance_scale: float = 7.5
    scheduler: str | None = None
    """A name of `SCHEDULERS`; None: the painter's."""


@dataclass(eq=False)
class Drawing:
    """A request for pictures."""

    request: PaintRequest
    settings: DrawingSettings = DrawingSettings()
    is_repeatable: bool = False
    """Drawn beside no other request: the UNet's last bits depend on how many images it draws at once."""
    on_step: Callable[[int, int], None] | None = None
    """Called with the steps done and the steps in all, from the engine's thread."""
    result: Future = field(default_factory=Future)
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True


class PaintEngine:
    """One thread that draws for many callers.

    Args:
        painter: draws.
        max_together: pictures (candidates included) of one run of the UNet, if several requests can share it.
        max_waiting: requests that wait.
    """

    def __init__(self, painter: VisCPMPaint, max_together: int = 8, max_waiting: int = 64):
        self.painter = painter
        self.max_together = max_together
        self.max_waiting = max_waiting
        self.num_images = 0
        """Drawn since the start."""
        self.num_running = 0
        self._waiting: deque[Drawing] = deque()
        self._changed = threading.Condition()
        self._is_open, self._drain = True, True
        self._thread = threading.Thread(target=self._run, name="viscpm-hf-paint", daemon=True)
        self._thread.start()

    def submit(self, drawing: Drawing) -> Drawing:
        """Queues a request; its `result` becomes a [`PaintResult`].

        Raises:
            EngineBusyError: if the queue is full.
            EngineClosedError: after [`close`].
        """
        with self._changed:
            if not self._is_open:
                raise EngineClosedError("The server is shutting down.")
            if len(self._waiting) >= self.max_waiting:
                self._forget_cancelled()
            if len(self._waiting) >= self.max_waiting:
                raise EngineBusyError(
                    f"{len(self._waiting)} prompts are waiting already, the limit is {self.max_waiting}: try again "
                    "later.",
                    retry_after=10.0,
                )
            self._waiting.append(drawing)
            self._changed.notify_all()
        return drawing

    def _forget_cancelled(self) -> None:
        """What nobody waits for takes no room."""
        for drawing in self._waiting:
            if drawing.is_cancelled:
                drawing.result.cancel()
        self._waiting = deque(drawing for drawing in self._waiting if not drawing.is_cancelled)

    def close(self, drain: bool = True, timeout: float | None = None) -> bool:
        """Ends, after the requests at hand or at once; returns whether all were drawn."""
        with self._changed:
            self._is_open, self._drain = False, drain
            self._changed.notify_all()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return drain
        self._drain = False
        self._thread.join()
        return False

    @property
    def is_open(self) -> bool:
        return self._is_open

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while self._is_open and not self._waiting:
                        self._changed.wait()
                    if not self._is_open and (not self._drain or not self._waiting):
                        return
                    group = self._next_group()
                if group:
                    self.num_running = len(group)
                    self._draw(group)
                    self.num_running = 0
        finally:
            with self._changed:
                self._is_open = False
                left = list(self._waiting)
                self._waiting.clear()
            for drawing in left:
                if drawing.result.set_running_or_notify_cancel():
                    drawing.result.set_exception(EngineClosedError("The server is shutting down."))

    def _next_group(self) -> list[Drawing]:
        """The request that waits longest, and others that can be drawn with it."""
        group: list[Drawing] = []
        others: deque[Drawing] = deque()
        per_image = self.painter.candidates if self.painter.pipeline.ranker is not None else 1
        self._forget_cancelled()
        for drawing in self._waiting:
            count = drawing.settings.num_images * per_image
            is_alone = drawing.is_repeatable or (group and group[0].is_repeatable)
            is_like = not is_alone and group and drawing.settings == group[0].settings
            if not group or (is_like and (len(group) + 1) * count <= self.max_together):
                # From here on nobody but this thread ends it.
                if drawing.result.set_running_or_notify_cancel():
                    group.append(drawing)
            else:
                others.append(drawing)
        self._waiting = others
        return group

    def _draw(self, group: list[Drawing]) -> None:
        results: list[PaintResult | Exception] = []
        try:
            results = self._draw_together(group)
        except Exception as error:
            if len(group) == 1:
                group[0].result.set_exception(error)
                return
            logger.info("%d prompts could not be drawn together (%s); each goes on alone", len(group), error)
        if not results:  # not within `except`, where the error would keep alive what the attempt had allocated
            for drawing in group:
                self._draw([drawing])
            return
        for drawing, result in zip(group, results, strict=True):
            if isinstance(result, Exception):
                drawing.result.set_exception(result)
            else:
                self.num_images += len(result.images)
                drawing.result.set_result(result)

    def _draw_together(self, group: list[Drawing]) -> list[PaintResult | Exception]:
        settings = group[0].settings

        def after_step(pipeline, step: int, timestep, tensors: dict) -> dict:
            if all(drawing.is_cancelled for drawing in group) or not (self._is_open or self._drain):
                raise DrawingCancelledError("The request was cancelled.")
            for drawing in group:
                if drawing.on_step is not None:
                    drawing.on_step(step + 1, settings.steps)
            return tensors

        return paint_batch(
            self.painter,
            [drawing.request for drawing in group],
            guidance_scale=settings.guidance_scale,
            num_inference_steps=settings.steps,
            num_images_per_prompt=settings.num_images,
            height=settings.height,
            width=settings.width,
            scheduler=settings.scheduler,
            callback_on_step_end=after_step,
        )
