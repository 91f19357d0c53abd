"""Tells whether the server was told to stop. vLLM's exit code is 0 even if its engine has died."""

import signal
from types import FrameType
from typing import Any

_received: list[int] = []


def listen() -> None:
    """Note SIGINT and SIGTERM, then do what was done before. Call this in the main thread once
    vLLM has set its handlers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        before: Any = signal.getsignal(number)

        def note(found: int, frame: FrameType | None, before: Any = before) -> None:
            _received.append(found)
            if callable(before):
                before(found, frame)

        signal.signal(number, note)


def to_stop() -> bool:
    return bool(_received)
