"""Bodies of requests, read by us before vLLM reads them."""

import asyncio
import json
import re
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope

from phatgoose.serve.http.refusal import Refusal

P = ParamSpec("P")
R = TypeVar("R")

LONGEST = 64 << 20  # bytes
MOST = 2_000_000  # values, for they cost much more than their bytes
DEEPEST = 100  # objects and lists within each other
GRACE = 30.0  # seconds for a body, and on top one for so many bytes of it:
SLOWEST = 64 << 10
INLINE = 64 << 10  # bytes up to which a body is short: it is parsed and written at once
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a character in JSON, or a whole one's


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """A request's whole body. Raises Refusal where it is too long, too slow, or does not come."""
    declared = Headers(scope=scope).get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > LONGEST):
        raise _too_long()
    parts, size, start = [], 0, time.monotonic()
    while True:
        left = start + GRACE + size / SLOWEST - time.monotonic()
        try:
            message = await asyncio.wait_for(receive(), max(left, 0.0))
        except (TimeoutError, asyncio.TimeoutError):
            raise Refusal(
                408,
                f"The body comes too slowly: {size} bytes in {time.monotonic() - start:.0f} s.",
                reason="slow",
                headers={"Connection": "close"},
            ) from None
        if message["type"] == "http.disconnect":
            raise Refusal(400, "The client went away.", reason="disconnected")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > LONGEST:
            raise _too_long()
        if not message.get("more_body"):
            return b"".join(parts)


async def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is. Raises Refusal.

    What vLLM could not serve is refused too: halves of characters, numbers beyond 64 bits, and
    what nests deeper than `DEEPEST`.
    """
    return await by_size(len(body), parse, body)


async def by_size(size: int, act: Callable[P, R], *arguments: P.args, **more: P.kwargs) -> R:
    """Do work that grows with the body: in a thread, unless the body is short."""
    if size <= INLINE:
        return act(*arguments, **more)
    return await asyncio.to_thread(act, *arguments, **more)


def written(body: dict[str, Any]) -> bytes:
    """What `parse` reads."""
    return json.dumps(body).encode()


def parse(body: bytes) -> dict[str, Any]:
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MOST:
        raise Refusal(413, f"The body has more than {MOST} values.", reason="bad_request")
    try:
        text = body.decode("utf-8-sig")
        found = json.loads(
            text, parse_int=_integer, parse_float=_float, parse_constant=_not_a_number
        )
    except RecursionError:
        raise _too_deep() from None
    except ValueError:
        raise _no("The body is not JSON in UTF-8.") from None
    if not isinstance(found, dict):
        raise _no("The body is not a JSON object.")
    _check_depth(found)
    if SURROGATE.search(body):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _no("The body has half of a character (a lone surrogate).") from None
    return found


def _check_depth(found: Any) -> None:
    level = [found]
    for _ in range(DEEPEST):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (number := int(text)) < 2**64:
        raise _no(f"The body has a number beyond 64 bits: {text[:40]}.")
    return number


def _float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise _no(f"The body has a number beyond 64 bits: {text[:40]}.")
    return number


def _not_a_number(text: str) -> float:
    raise _no(f"The body has {text}, which is no number in JSON.")


def _no(message: str) -> Refusal:
    return Refusal(400, message, reason="bad_request")


def _too_deep() -> Refusal:
    return _no(f"The body nests deeper than {DEEPEST}.")


def _too_long() -> Refusal:
    return Refusal(413, f"The body is over {LONGEST} bytes.", reason="bad_request")


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
