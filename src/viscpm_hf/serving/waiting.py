"""Between coroutines and the engines' threads."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import anyio
from fastapi import Request

from ..images import DecodingCancelledError
from .tickets import Answer, Event, Failed, Finished


T = TypeVar("T")


class Places:
    """Threads for work that takes its time, so that it doesn't hold up other requests: `count` at once, others wait.

    A place is taken until the work has really ended, also when nobody waits for it any more; what waits for a place
    takes none, and is gone when its caller is.
    """

    def __init__(self, count: int, name: str):
        self._limiter = anyio.CapacityLimiter(count)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix=f"viscpm-hf-{name}")

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        work = object()
        await self._limiter.acquire_on_behalf_of(work)
        try:
            future = asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *arguments))
        except BaseException:
            self._limiter.release_on_behalf_of(work)
            raise

        def ended(future: asyncio.Future) -> None:
            self._limiter.release_on_behalf_of(work)
            if not future.cancelled():
                future.exception()  # seen, also if nobody waits for it

        future.add_done_callback(ended)
        return await asyncio.shield(future)


class ClientGoneError(Exception):
    """Nobody reads the answer any more."""


class LargeImages:
    """Places for images of many pixels, which take memory from when they are handed over until they are prepared.

    Args:
        count: of them at once; others wait where they were decoded.
        num_bytes: from which on an image is large.
    """

    def __init__(self, count: int = 2, num_bytes: int = 32 * 2**20):
        self.num_bytes = num_bytes
        self.places = threading.BoundedSemaphore(count)


class ImageInMemory:
    """The one image of a request that is being prepared; for `with`.

    Args:
        gone: set when nobody waits any more.
    """

    def __init__(self, large: LargeImages, gone: threading.Event):
        self._large, self._gone = large, gone
        self._is_held = False

    def __enter__(self) -> ImageInMemory:
        return self

    def __exit__(self, *_) -> None:
        if self._is_held:
            self._is_held = False
            _give_back_memory()
            self._large.places.release()

    def comes(self, num_bytes: int) -> None:
        """Another image is about to take the place of the one before; waits if it is large."""
        self.__exit__()
        if num_bytes < self._large.num_bytes:
            return
        while not self._large.places.acquire(timeout=0.1):
            if self._gone.is_set():
                raise DecodingCancelledError
        self._is_held = True


def _give_back_memory() -> None:
    """Of freed images: the C library would keep it for the thread that had it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


async def unless_gone(request: Request, result: asyncio.Future | Any, timeout: float) -> Any:
    """The result, unless the client leaves or the time is up before.

    Raises:
        ClientGoneError, TimeoutError: whichever it is; the awaited task is cancelled.
    """
    task = asyncio.ensure_future(result)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientGoneError
        raise TimeoutError(f"There was no answer within {timeout:g} seconds.")
    finally:
        task.cancel()
        gone.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """The events of a request for `num_choices` answers, for one coroutine; fed from the engine's thread."""

    def __init__(self, num_choices: int):
        self.num_choices = num_choices
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def __call__(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def __aiter__(self):
        """Events until the last; raises what the request failed of."""
        unfinished = self.num_choices
        while unfinished:
            event = await self._events.get()
            if isinstance(event, Failed):
                raise event.error
            unfinished -= isinstance(event, Finished)
            yield event

    async def collect(self) -> list[Answer]:
        """All choices whole."""
        answers = [Answer() for _ in range(self.num_choices)]
        async for event in self:
            answers[event.choice].take(event)
        return answers
