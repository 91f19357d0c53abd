"""Requests go through together; a change goes through alone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turnstile:
    """A change waits for the requests before it; the requests after it wait for the change."""

    def __init__(self) -> None:
        self._inside = 0
        self._open, self._empty = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._empty.set()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        while not self._open.is_set():  # it may have closed again before we were woken
            await self._open.wait()
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @asynccontextmanager
    async def change(self, seconds: float) -> AsyncIterator[None]:
        """The caller sees to it that there is one at a time.

        Raises TimeoutError where the requests inside take longer than this to end.
        """
        self._open.clear()
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
            yield
        finally:
            self._open.set()
