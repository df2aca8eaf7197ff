"""The Hub, when it can't be reached: one look, no waiting, and one sentence of what was looked for."""

from __future__ import annotations

import logging
import re
import socket
import threading
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, set_client_factory
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import _http


# The Hub's client tries five times, with pauses of 23 seconds in all, for each file that it wants to know of.
SECONDS = 3.0

REPOSITORY = re.compile(r"/(?:api/(?:models|datasets)/|(?!api/))(?P<id>[^/]+/[^/]+)")


class _Look:
    """Whether the Hub's host can be reached; looked for at the first request."""

    def __init__(self) -> None:
        self.is_reachable: bool | None = None
        self.wanted: str | None = None
        """The repository that was asked for when it turned out that it can't."""

    def __call__(self, request: Any) -> None:
        host, port = request.url.host, request.url.port or {"http": 80}.get(request.url.scheme, 443)
        if self.is_reachable is None and not constants.HF_HUB_OFFLINE:
            self.is_reachable = bool(urllib.request.getproxies()) or _answers(host, port)
        if self.is_reachable is False:
            if self.wanted is None and (match := REPOSITORY.match(request.url.path)):
                self.wanted = match["id"]
            # Not an error of the network, which would be tried again, but what the libraries take for "look here".
            raise OfflineModeIsEnabled(f"{host} can't be reached")


look = _Look()


def do_not_wait_for_the_hub() -> None:
    """From now on a Hub that can't be reached is asked once, and files come from the cache."""

    def client() -> Any:
        made = _http.default_client_factory()
        made.event_hooks = {**made.event_hooks, "request": [look, *made.event_hooks.get("request", [])]}
        return made

    set_client_factory(client)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every try


def not_reached() -> str | None:
    """What was looked for in vain; None if nothing was."""
    if look.wanted is None:
        return None
    host = urlsplit(constants.ENDPOINT).hostname
    return f"{look.wanted} is no file or folder here, not in the Hub's cache either, and {host} can't be reached."


def _answers(host: str, port: int) -> bool:
    found = []

    def try_to_connect() -> None:
        try:
            socket.create_connection((host, port), SECONDS).close()
            found.append(True)
        except OSError:
            pass

    # In a thread, since a name may be looked up for much longer where no server answers.
    thread = threading.Thread(target=try_to_connect, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return bool(found)
