"""The server process: uvicorn with a limit on how long a request's head may take, and a clean end."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol


GRACEFUL_SECONDS = 30
MAX_HEAD_BYTES = 64 * 1024
MAX_CONNECTIONS = 2048
ACCESS_LOG = "viscpm_hf.serving.access"


class PatientProtocol(H11Protocol):
    """HTTP/1.1, but not patient without end: a connection whose request's head isn't complete in time is closed.

    A client that closes its side can still read. As clients that leave look just like it, nothing more is computed for
    it: it is told so, or what is being sent is sent to its end.
    """

    head_seconds: float
    _expiry: asyncio.TimerHandle | None = None
    _is_half_closed = False

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._disarm()
        elif self._expiry is None:
            self._arm()

    def eof_received(self) -> bool:
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return False
        if self.conn.their_state is h11.SEND_BODY:
            if not cycle.response_started:
                self.send_400_response("The connection was closed before the request was complete.")
            return False
        self._is_half_closed = True
        if not cycle.response_started:
            cycle.message_event.set()  # `Guard` knows what it means
        return True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_half_closed:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def _arm(self) -> None:
        self._expiry = self.loop.call_later(self.head_seconds, self._expire)

    def _disarm(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def _expire(self) -> None:
        self._expiry = None
        if not self.transport.is_closing():
            self.transport.close()


def bind(host: str, port: int) -> socket.socket:
    """Takes the address, so that nobody else does; clients are refused until [`serve`] listens.

    Args:
        port: 0 takes any that is free.

    Raises:
        OSError: if it can't be used; in one sentence.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(
            f"The server can't listen on port {port} of {host} ({error.strerror or error}): choose others with --host "
            "and --port."
        ) from error
    return listener


def serve(app: FastAPI, listener: socket.socket, client_timeout: float = 30.0) -> None:
    """Serves until SIGINT or SIGTERM; requests at hand are then answered, for half a minute at most.

    Args:
        app: of [`create_app`].
        listener: of [`bind`]; it is closed in the end.
        client_timeout: seconds in which a request's head has to arrive.

    Raises:
        OSError: if the address can't be used.
    """
    configure_logging()
    # uvicorn raises the signal that ended it once more when everything is done; then there is nothing left to end.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    with listener:
        listener.listen(MAX_CONNECTIONS)
        address, port = listener.getsockname()[:2]
        url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
        logging.getLogger(ACCESS_LOG).info(json.dumps({"event": "listening", "url": url}))
        config = uvicorn.Config(
            app,
            http=type("Protocol", (PatientProtocol,), {"head_seconds": client_timeout}),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=GRACEFUL_SECONDS,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
        uvicorn.Server(config).run(sockets=[listener])


def configure_logging() -> None:
    """One line an event on stderr; those of requests are JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in (ACCESS_LOG, "viscpm_hf.serving.content", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = [handler]
        logger.propagate = False
