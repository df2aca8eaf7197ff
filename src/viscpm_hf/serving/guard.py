"""What stands before every request: its key, its size, how long it takes to arrive, and how many there are."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

from .metrics import Metrics
from .settings import ServerSettings


access_log = logging.getLogger("viscpm_hf.serving.access")

OPEN_PATHS = ("/health", "/openapi.json", "/docs")
OPEN_PATH = "/"
MAX_OPEN_PATHS = 64


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _TooLargeError(Exception):
    pass


class _TooMuchError(Exception):
    pass


@dataclass
class _Body:
    """A request's body as it comes."""

    parts: list[bytes] = field(default_factory=list)
    size: int = 0
    """Of all of it, also when it was handed on."""

    def take(self) -> bytes:
        """Hands it on; nothing of it is kept."""
        data = b"".join(self.parts)
        self.parts.clear()
        return data


class Guard:
    """ASGI middleware. A request is handed on with its whole body in memory; what comes after may listen for the
    client's leaving."""

    def __init__(self, app, settings: ServerSettings, metrics: Metrics):
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self.num_open = 0
        self.num_open_bytes = 0
        self.num_open_paths = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 499
        headers = {name.lower(): value for name, value in scope["headers"]}
        request_id = uuid.uuid4().hex[:16]

        async def send_and_note(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            await self._check(scope, headers, receive, send_and_note)
        finally:
            seconds = time.perf_counter() - begin
            self.metrics.note_request(scope["method"], scope["path"], status, seconds)
            access_log.info(
                json.dumps(
                    {
                        "event": "request",
                        "id": request_id,
                        "method": scope["method"],
                        "path": scope["path"][:200],
                        "status": status,
                        "seconds": round(seconds, 4),
                    }
                )
            )

    async def _check(self, scope, headers, receive, send):
        settings = self.settings
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path == OPEN_PATH or path.startswith(OPEN_PATHS):
            await self._answer_openly(scope, headers, receive, send)
            return
        if settings.api_key is not None and not self._has_key(headers):
            body = error_body("The API key is missing or wrong.", "authentication_error", "invalid_api_key")
            await self._refuse(401, body, [(b"www-authenticate", b"Bearer")], headers, receive, send)
            return
        if self.num_open >= settings.max_open_requests:
            body = error_body(
                f"{self.num_open} requests are open already, the limit is {settings.max_open_requests}: try again "
                "later.",
                "rate_limit_error",
                "rate_limit_exceeded",
            )
            await self._refuse(429, body, [(b"retry-after", b"1")], headers, receive, send)
            return
        self.num_open += 1
        body = _Body()
        try:
            await self._hand_on(body, scope, headers, receive, send)
        finally:
            self.num_open -= 1
            self.num_open_bytes -= body.size

    async def _answer_openly(self, scope, headers, receive, send):
        """What anybody may ask: it has no body, takes no one else's place, and doesn't wait for slow readers."""
        if headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers:
            error = error_body("Nothing is sent with this request.", "invalid_request_error")
            await _respond(send, 413, error, [(b"connection", b"close")])
            return
        if self.num_open_paths >= MAX_OPEN_PATHS:
            error = error_body("Too many ask for this at once: try again later.", "rate_limit_error")
            await _respond(send, 429, error, [(b"retry-after", b"1")])
            return
        self.num_open_paths += 1
        try:
            # What isn't answered whole by then is cut off by the server.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.app(scope, receive, send), self.settings.client_timeout)
        finally:
            self.num_open_paths -= 1

    async def _refuse(self, status, body, more_headers, headers, receive, send):
        """The connection goes on only if what the client still sends has come to its end."""
        try:
            await asyncio.wait_for(self._skip_body(headers, receive), self.settings.client_timeout)
        except (_TooLargeError, TimeoutError):
            more_headers = [*more_headers, (b"connection", b"close")]
        await _respond(send, status, body, more_headers)

    async def _hand_on(self, body: _Body, scope, headers, receive, send):
        settings = self.settings
        try:
            is_whole = await asyncio.wait_for(self._read_body(body, headers, receive), settings.client_timeout)
        except _TooLargeError:
            error = error_body(
                f"The request is larger than the {settings.max_body_bytes:,} bytes that are allowed.",
                "invalid_request_error",
                "request_too_large",
            )
            await _respond(send, 413, error, [(b"connection", b"close")])
            return
        except _TooMuchError:
            error = error_body(
                f"The open requests have {settings.max_open_bytes:,} bytes already, which is the limit: try again "
                "later.",
                "rate_limit_error",
                "rate_limit_exceeded",
            )
            await _respond(send, 429, error, [(b"retry-after", b"5"), (b"connection", b"close")])
            return
        except TimeoutError:
            error = error_body(
                f"The request did not arrive within {settings.client_timeout:g} seconds.", "invalid_request_error"
            )
            await _respond(send, 408, error, [(b"connection", b"close")])
            return
        if not is_whole:  # the client is gone
            return
        is_read = False

        async def receive_again():
            nonlocal is_read
            if is_read:
                message = await receive()
                # After a whole body nothing comes: the client has closed its side.
                return {"type": "http.disconnect"} if message["type"] == "http.request" else message
            is_read = True
            return {"type": "http.request", "body": body.take(), "more_body": False}

        await self.app(scope, receive_again, send)

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.settings.api_key.encode())

    async def _read_body(self, body: _Body, headers: dict[bytes, bytes], receive) -> bool:
        """Adds what comes to `body`; False if the client is gone."""
        async for part in self._parts_of_body(headers, receive):
            if part is None:
                return False
            if self.num_open_bytes + len(part) > self.settings.max_open_bytes:
                raise _TooMuchError
            body.parts.append(part)
            body.size += len(part)
            self.num_open_bytes += len(part)
        return True

    async def _skip_body(self, headers: dict[bytes, bytes], receive) -> None:
        async for _ in self._parts_of_body(headers, receive):
            pass

    async def _parts_of_body(self, headers: dict[bytes, bytes], receive) -> AsyncIterator[bytes | None]:
        """Parts as they come; None if the client is gone."""
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:18]) > self.settings.max_body_bytes:
            raise _TooLargeError
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                yield None
                return
            part, more = message.get("body", b""), message.get("more_body")
            size += len(part)
            if size > self.settings.max_body_bytes:
                raise _TooLargeError
            yield part


async def _respond(send, status: int, body: dict, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    data = json.dumps(body).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": data})
