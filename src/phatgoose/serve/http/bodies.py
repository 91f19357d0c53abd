"""Bodies of requests, read by us before vLLM reads them."""

import json
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive, Scope

from phatgoose.serve.http.refusal import Refusal

LONGEST = 64 << 20  # bytes


async def read_body(receive: Receive) -> bytes:
    """A request's whole body. Raises Refusal where it is too long or does not come."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "The client went away.", reason="disconnected")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > LONGEST:
            raise Refusal(413, f"The body is over {LONGEST} bytes.", reason="bad_request")
        if not message.get("more_body"):
            return b"".join(parts)


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is. Raises Refusal."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "The body is not JSON.", reason="bad_request") from None
    if not isinstance(found, dict):
        raise Refusal(400, "The body is not a JSON object.", reason="bad_request")
    return found


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body, and then what comes after the one that was read."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def resized(scope: Scope, length: int) -> Scope:
    """The request with a body of another length."""
    headers = MutableHeaders(raw=list(scope["headers"]))
    headers["content-length"] = str(length)
    del headers["transfer-encoding"]
    return {**scope, "headers": headers.raw}
