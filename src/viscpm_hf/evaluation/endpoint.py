"""Requests to an OpenAI-compatible endpoint with an end in sight, whatever it sends.

The `openai` client does the talking: connections, retries with exponential back-off, `Retry-After`. Here it goes to
the one address that was given, with a limit of time for a request as a whole and of bytes for its reply.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import openai


# A review has a few thousand bytes.
MAX_REPLY_BYTES = 4 * 2**20

# Headers of a reply that are about its bytes on the way, not about what they say.
TRANSFER_HEADERS = ("content-encoding", "content-length", "transfer-encoding")


@dataclass
class Call:
    """How a call goes, retries included."""

    requests: int = 0
    timeout: asyncio.Timeout | None = None
    """What ends a request."""


_call: ContextVar[Call] = ContextVar("call")


class _BoundedClient(openai.DefaultAsyncHttpxClient):
    """Ends a request, its reply included, after `seconds`, and a reply after `MAX_REPLY_BYTES`."""

    def __init__(self, seconds: float):
        super().__init__(timeout=seconds, follow_redirects=False)
        self.seconds = seconds

    async def send(self, request: Any, **options: Any) -> Any:
        call = _call.get()
        call.requests += 1
        # The library's own timeout begins anew with every byte.
        call.timeout.reschedule(asyncio.get_running_loop().time() + self.seconds)
        try:
            response = await super().send(request, **{**options, "stream": True})
            with _reset_if_given_up(response):
                try:
                    content = await self._read(response)
                finally:
                    await response.aclose()
        finally:
            if not call.timeout.expired():
                call.timeout.reschedule(None)  # pauses between requests are the client's
        headers = [(name, value) for name, value in response.headers.items() if name not in TRANSFER_HEADERS]
        return type(response)(response.status_code, headers=headers, content=content, request=request)

    @staticmethod
    async def _read(response: Any) -> bytes:
        """The reply, or what there is of one that breaks off or is too long: it may have been paid for, so it isn't
        retried as if nothing had come."""
        content = bytearray()
        try:
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_REPLY_BYTES:
                    break
        except Exception:  # noqa: BLE001, of either HTTP library that the client may use, and of decompression
            return bytes(content)
        return bytes(content)


@contextmanager
def _reset_if_given_up(response: Any) -> Iterator[None]:
    """Closing the connection inside resets it: a server notices an ordinary closing only at its second write."""
    connection = response.extensions["network_stream"].get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    yield
    with suppress(OSError):  # closed: the reply was the last of its connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))


class Endpoint:
    """An endpoint, asked from as many threads as like.

    Args:
        base_url: `https://HOST/v1`; a redirect to another address is not followed.
        api_key: None sends a placeholder, which local servers take.
        timeout: seconds for a request and its reply together.
    """

    def __init__(self, base_url: str, api_key: str | None, timeout: float):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()
        self._client = openai.AsyncOpenAI(
            api_key=api_key or "none",  # the client insists on one
            base_url=base_url,
            timeout=timeout,
            http_client=_BoundedClient(timeout),
        )

    def new_call(self) -> Call:
        return Call()

    def complete(self, call: Call, max_retries: int, **arguments: Any) -> Any:
        """A chat completion as the client reads it, which checks nothing.

        Raises:
            TimeoutError: if a reply wasn't there in time.
            openai.OpenAIError: as the client has it.
        """
        return self._run(self._complete(call, max_retries, arguments))

    async def _complete(self, call: Call, max_retries: int, arguments: dict[str, Any]) -> Any:
        _call.set(call)
        async with asyncio.timeout(None) as call.timeout:
            return await self._client.with_options(max_retries=max_retries).chat.completions.create(**arguments)

    def _run(self, what: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result()

    def close(self) -> None:
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
