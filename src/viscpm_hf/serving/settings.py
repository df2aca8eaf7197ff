"""What a server allows, and how much."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ..images import ImageLimits


@dataclass(frozen=True)
class ServerSettings:
    """Limits and permissions of the HTTP API.

    Raises:
        ValueError: for a limit below its least value, or an empty key.
    """

    api_key: str | None = None
    """Asked of every request but `/health`, as `Authorization: Bearer KEY`; None asks for none."""
    cors_origins: tuple[str, ...] = ()
    """Origins (`https://example.org`, or `*` for all) whose pages may use the API in a browser."""
    timeout: float = 300.0
    """Seconds until a request that has no whole answer is given up."""
    client_timeout: float = 30.0
    """Seconds in which a request's head has to arrive, and again its body."""
    max_open_requests: int = 512
    """Requests worked on or waiting; more are refused at once."""
    max_body_bytes: int = 32 * 2**20
    """Of one request."""
    max_open_bytes: int = 2**30
    """Bodies of all open requests together; more are refused at once."""
    max_json_items: int = 50_000
    """Strings, commas, colons and brackets of a body, outside of strings: what it costs to look at."""
    max_json_depth: int = 64
    """Brackets within brackets of a body."""
    max_images: int = 8
    """Images in one conversation."""
    max_image_pixels: int = ImageLimits.max_pixels
    max_image_scans: int = ImageLimits.max_scans
    """Of a JPEG: how often its decoder walks over all pixels."""
    max_image_chunks: int = ImageLimits.max_chunks
    """Of a PNG or WebP; segments of a JPEG."""
    max_image_seconds: float = ImageLimits.max_seconds
    """Time of a processor to decode one image."""
    max_image_memory: int = ImageLimits.max_memory_bytes
    """Bytes that decoding one image may take."""
    image_workers: int = 4
    """Processes that decode images; as many more for those that take longer than a second."""
    remote_image_hosts: tuple[str, ...] = ()
    """Hosts (`example.org`, `example.org:8080`) that images may be fetched from; empty: none."""
    max_paint_pixels: int = 1024 * 1024
    max_paint_steps: int = 200
    log_content: bool = False
    """Whether prompts and answers are logged."""

    def __post_init__(self):
        if self.api_key == "":
            raise ValueError("The API key is empty: give one, or none at all to let everybody in.")
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not value > 0:
                raise ValueError(f"{entry.name} must be greater than 0, got {value!r}.")

    @property
    def image_limits(self) -> ImageLimits:
        return ImageLimits(
            max_pixels=self.max_image_pixels,
            max_scans=self.max_image_scans,
            max_chunks=self.max_image_chunks,
            max_seconds=self.max_image_seconds,
            max_memory_bytes=self.max_image_memory,
        )


def read_api_key(file: str) -> str:
    """The key that stands in a file."""
    return Path(file).read_text("utf-8").strip()
