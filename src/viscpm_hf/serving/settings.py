"""What a server allows, and how much."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServerSettings:
    """Limits and permissions of the HTTP API.

    Raises:
        ValueError: for a limit below its least value, or an empty key.
    """

    api_key: str | None = None
    """Asked of every request but `/health`, as `Authorization: Bearer KEY`; None asks for none."""
    timeout: float = 300.0
    """Seconds until a request that has no whole answer is given up."""
    max_body_bytes: int = 32 * 2**20
    client_timeout: float = 30.0
    """Seconds in which a request's head has to arrive, and again its body."""
    max_open_requests: int = 512
    """Requests worked on or waiting; more are refused at once."""
    max_image_pixels: int = 50_000_000
    max_images: int = 8
    """Pictures in one conversation."""
    remote_image_hosts: tuple[str, ...] = ()
    """Hosts (`example.org`, `example.org:8080`) that pictures may be fetched from; empty: none."""
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


def read_api_key(file: str) -> str:
    """The key that stands in a file."""
    return Path(file).read_text("utf-8").strip()
