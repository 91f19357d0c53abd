"""Answers of vLLM on their way out: the model's name as it was asked for, and the routing."""

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from phatgoose.errors import first_line
from phatgoose.serve.http.choice import FIELD

log = logging.getLogger(__name__)

Routing = Callable[[], Awaitable[dict[str, Any]]]
DONE = b"data: [DONE]"  # the last event of a stream


class Relay:
    """An ASGI `send` that passes one answer on.

    vLLM calls every answer's model by the pool's name; `asked` is put in its place. With `routing`,
    a JSON body gets the field `phatgoose`, and a stream an event with it before the last. Errors
    pass as they are.
    """

    def __init__(self, send: Send, *, served: str, asked: str, routing: Routing | None) -> None:
        self._send, self._routing = send, routing
        self._old, self._new = _model(served), _model(asked)
        self._start: Message | None = None  # held back until its body's length is known
        self._body = b""
        self._first: dict[str, Any] | None = None  # event of the stream
        self._streams = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._start is not None:
            await self._collect(message)
        elif self._streams:
            body = message.get("body", b"").replace(self._old, self._new)
            if self._routing is not None:
                body = await self._with_event(body)
            await self._send({**message, "body": body})
        else:
            await self._send(message)

    async def _begin(self, message: Message) -> None:
        kind = MutableHeaders(raw=message["headers"]).get("content-type", "")
        self._streams = kind.startswith("text/event-stream")
        if message["status"] == 200 and kind.startswith("application/json"):
            self._start = message
        else:
            await self._send(message)

    async def _collect(self, message: Message) -> None:
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        start, self._start = self._start, None
        assert start is not None
        body = json.loads(self._body.replace(self._old, self._new, 1))
        if self._routing is not None:
            body[FIELD] = await self._ask()
        await send_json(body, start, self._send)

    async def _with_event(self, body: bytes) -> bytes:
        if self._first is None and body.startswith(b"data: {"):
            self._first = json.loads(body.partition(b"\n")[0][len(b"data: ") :])
        before, done, after = body.rpartition(DONE)
        # In a JSON text no line begins like that, for its newlines are escaped.
        if not done or self._first is None or before[-1:] not in (b"", b"\n"):
            return body
        if "error" in self._first:
            return body
        event = {key: self._first[key] for key in ("id", "object", "created", "model")}
        event |= {"choices": [], FIELD: await self._ask()}
        return before + b"data: " + json.dumps(event).encode() + b"\n\n" + done + after

    async def _ask(self) -> dict[str, Any]:
        """The answer is there already, so it is not thrown away where its routing got lost."""
        assert self._routing is not None
        try:
            return await self._routing()
        except Exception as error:
            log.exception("phatgoose: the routing of a request is lost")
            return {"error": first_line(error)}


async def send_json(body: Any, start: Message, send: Send) -> None:
    """An answer that starts as `start` does, but for its length."""
    raw = json.dumps(body, separators=(",", ":")).encode()
    headers = MutableHeaders(raw=list(start["headers"]))
    headers["content-length"] = str(len(raw))
    await send({**start, "headers": headers.raw})
    await send({"type": "http.response.body", "body": raw, "more_body": False})


def _model(name: str) -> bytes:
    """As compact JSON has it; within a string the quotes would be escaped."""
    return b'"model":' + json.dumps(name, ensure_ascii=False).encode()
