"""What a visitor of the demo has running, and its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TypeVar


T = TypeVar("T")


class Visit:
    """What a visitor's events have in common while they run; all else they get as it was at the click.

    Work is ended here rather than by gradio's `cancels`, which doesn't reach what has only just been clicked, and lets
    an update that is on its way come after what the click on Stop says.
    """

    def __init__(self):
        self.conversation = 0
        """The number of the conversation that is on: it grows when another one begins."""
        self.is_stopped = False
        """Whether Stop ended the latest work."""
        self._ending: asyncio.Event | None = None
        self._over: asyncio.Event | None = None

    async def until_stopped(self, updates: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """The updates of a work; after [`stop`] or [`end`] it is closed and no other comes, so that whoever reads them
        has the last word. A visitor has one work at a time: one that is still on ends first."""
        self.is_stopped = False
        await self.end()
        if self.is_stopped:  # while the one before was ending: this one is what the visitor sees
            return
        self._ending, self._over = ending, over = asyncio.Event(), asyncio.Event()
        ended = asyncio.ensure_future(ending.wait())
        try:
            while not ending.is_set():
                coming = asyncio.ensure_future(anext(updates, None))
                try:
                    await asyncio.wait({coming, ended}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    coming.cancel()
                    (update,) = await asyncio.gather(coming, return_exceptions=True)
                if ending.is_set() or update is None:
                    return
                if isinstance(update, BaseException):
                    raise update
                yield update
        finally:
            ended.cancel()
            try:
                await updates.aclose()
            finally:
                over.set()

    def stop(self) -> None:
        """Ends the work at the visitor's wish, at the next moment; does nothing if there is none."""
        if self._over is not None and not self._over.is_set():
            self.is_stopped = True
            self._ending.set()

    async def end(self) -> None:
        """Ends the work, if there is any, and returns when it will say nothing more."""
        while self._over is not None and not self._over.is_set():
            self._ending.set()
            await self._over.wait()
