"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily


if TYPE_CHECKING:
    from .engine import ChatEngine
    from .paint_engine import PaintEngine


PATHS = (
    "/v1/chat/completions",
    "/v1/images/generations",
    "/v1/models",
    "/viscpm",
    "/health",
    "/metrics",
)
METHODS = ("GET", "HEAD", "POST")


class Metrics:
    """Requests as they come, and the engines' own counters when somebody looks."""

    def __init__(self, chat: ChatEngine | None, paint: PaintEngine | None):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(chat, paint))
        labels = ("method", "path", "status")
        self._requests = Counter("viscpm_requests", "Requests answered.", labels, registry=self._registry)
        self._seconds = Histogram(
            "viscpm_request_seconds",
            "Time until a request's answer was sent.",
            ("path",),
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=self._registry,
        )

    def note_request(self, method: str, path: str, status: int, seconds: float) -> None:
        path = path if path in PATHS else "other"  # whoever asks for a thousand paths makes no thousand series
        method = method if method in METHODS else "other"
        self._requests.labels(method, path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector:
    def __init__(self, chat: ChatEngine | None, paint: PaintEngine | None):
        self.chat = chat
        self.paint = paint

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        if self.chat is not None:
            statistics, cache = self.chat.statistics, self.chat.image_cache
            for name, what, value in (
                ("chat_requests", "Requests taken into the queue.", statistics.requests),
                ("chat_rejected", "Requests refused because the queue was full.", statistics.rejected),
                ("chat_failed", "Requests that ended in an error.", statistics.failed),
                ("prompt_tokens", "Tokens of prompts, pictures included.", statistics.prompt_tokens),
                ("answer_tokens", "Tokens decoded.", statistics.answer_tokens),
                ("decode_steps", "Steps of decoding.", statistics.steps),
                ("decoded_rows", "Answers in those steps, summed up.", statistics.rows_in_steps),
                ("image_cache_hits", "Pictures that were encoded already.", cache.hits),
                ("image_cache_misses", "Pictures that were not.", cache.misses),
            ):
                yield CounterMetricFamily(f"viscpm_{name}", what, value)
            yield GaugeMetricFamily("viscpm_chat_waiting", "Answers in the queue.", self.chat.num_waiting)
            yield GaugeMetricFamily("viscpm_chat_running", "Answers being decoded.", self.chat.num_running)
            yield GaugeMetricFamily("viscpm_image_cache_bytes", "Bytes of encoded pictures.", cache.num_bytes)
        if self.paint is not None:
            yield CounterMetricFamily("viscpm_images_drawn", "Pictures drawn.", self.paint.num_images)
            yield GaugeMetricFamily("viscpm_paint_waiting", "Prompts in the queue.", self.paint.num_waiting)
            yield GaugeMetricFamily("viscpm_paint_running", "Prompts being drawn.", self.paint.num_running)
