"""Between coroutines and the engines' threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import anyio
from fastapi import Request

from .tickets import Answer, Event, Failed, Finished, TextPiece


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
            if isinstance(event, TextPiece):
                answers[event.choice].text += event.text
                answers[event.choice].scores += event.scores
            else:
                answers[event.choice].reason = event.reason
                answers[event.choice].num_tokens = event.num_tokens
        return answers
