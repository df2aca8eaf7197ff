"""Between coroutines and the engines' threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import anyio
from fastapi import Request

from .tickets import Answer, Event, Failed, Finished, TextPiece


T = TypeVar("T")

# Pictures are decoded here; more at once would need the memory of as many large ones.
PREPARING = anyio.CapacityLimiter(4)
# Slow hosts hold up only those who want something of hosts.
FETCHING = anyio.CapacityLimiter(8)


class ClientGoneError(Exception):
    """Nobody reads the answer any more."""


async def in_thread(function: Callable[..., T], *arguments: Any, limiter: anyio.CapacityLimiter = PREPARING) -> T:
    """Runs work that takes its time where it doesn't hold up other requests."""
    return await anyio.to_thread.run_sync(function, *arguments, limiter=limiter)


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
            else:
                answers[event.choice].reason = event.reason
                answers[event.choice].num_tokens = event.num_tokens
        return answers
