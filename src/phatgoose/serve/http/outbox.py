"""Answers on their way to clients that read slowly, or not at all."""

import asyncio
import json
import logging
from types import TracebackType
from typing import Any

from starlette.types import Message, Send

log = logging.getLogger(__name__)

STALL = 300.0  # seconds in which a client has to take something
MOST = 16 << 20  # bytes that wait for a client


class ClientTooSlow(OSError):
    """More waits for the client than is kept."""


class Outbox:
    """An ASGI `send` that never waits for the client; a task of its own passes the messages on.

    So an answer is done when the engine is done with it, whenever the client reads it. Leaving the
    block waits until the client has it all. A client that takes nothing for `STALL` seconds, or
    for which more than `MOST` bytes wait when the next message comes, is given up: `gave_up`.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        self._waiting = 0  # bytes
        self.gave_up = False

    async def __call__(self, message: Message) -> None:
        if self._waiting > MOST:
            self._give_up()
        if self.gave_up:
            raise ClientTooSlow("the client does not read its answer")
        if self._task.done():
            self._task.result()  # the client is gone, which the server tells by raising
        self._waiting += len(message.get("body", b""))
        self._messages.put_nowait(message)

    async def __aenter__(self) -> "Outbox":
        self._task = asyncio.create_task(self._pass_on())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> bool:
        self._messages.put_nowait(None)
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            self._task.cancel()
        try:
            await self._task
        except asyncio.CancelledError:
            if not self.gave_up:
                raise
        if self.gave_up:
            log.warning("%s", json.dumps({"event": "client_given_up", "bytes": self._waiting}))
        return self.gave_up and isinstance(error, Exception)

    async def _pass_on(self) -> None:
        loop = asyncio.get_running_loop()
        while (message := await self._messages.get()) is not None:
            alarm = loop.call_later(STALL, self._give_up)
            try:
                await self._send(message)
            finally:
                alarm.cancel()
            self._waiting -= len(message.get("body", b""))

    def _give_up(self) -> None:
        self.gave_up = True
        self._task.cancel()
