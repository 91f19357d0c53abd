"""What goes to the terminal: names, prompts and answers of strangers, and colours of our own."""

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

from phatgoose.text import LINES, is_hidden

# As `analysis.text` writes them; a stranger could at most change a colour, until the next is set.
_COLOURS = re.compile(r"\x1b\[(?:(?:48;5;\d{1,3};)?38;5;\d{1,3}|0)m")


class Screen:
    """A text stream in front of another: what could command a terminal comes out as an escape.

    The escapes are those of JSON, so that what is printed as JSON stays it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        plain, begin = [], 0
        for colour in _COLOURS.finditer(text):
            plain += [_plain(text[begin : colour.start()]), colour[0]]
            begin = colour.end()
        self._stream.write("".join([*plain, _plain(text[begin:])]))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def screened() -> Iterator[None]:
    """Have what is printed inside the block go through a `Screen`."""
    with contextlib.redirect_stdout(Screen(sys.stdout)):
        yield


def _plain(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c in LINES or not is_hidden(c) else _escape(c) for c in text)


def _escape(c: str) -> str:
    units = c.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
