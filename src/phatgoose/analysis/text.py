"""Shows a trace in a terminal."""

import os
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

from phatgoose.analysis.view import Passage, View, look
from phatgoose.nn import Trace

_BAR = 24
_NAME = 32


def render_text(
    trace: Trace,
    tokenizer: Any,
    *,
    width: int | None = None,
    color: bool | None = None,
    labels: Sequence[str] | None = None,
    tokens: bool = True,
) -> str:
    """Write the experts with their shares, then each sequence.

    In colour (ANSI, 256 colours) the text has each token on its leading expert's colour; without,
    a table has a line for each token. Control characters in the text are made harmless.

    Args:
        width: columns of the terminal (None: as it says).
        color: None: where stdout is a terminal and NO_COLOR is not set.
        labels: names for the sequences (None: how they begin).
        tokens: False leaves the sequences out.
    """
    if width is None:
        width = shutil.get_terminal_size().columns
    if color is None:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    view = look(trace, tokenizer, labels)
    lines = ["Experts, by share of the routing weight", *_bars(view, width, color)]
    if not tokens:
        return "\n".join(lines) + "\n"
    if color:
        lines += ["", "Each token has the colour of the expert it gave most weight to."]
    for number, passage in enumerate(view.passages, 1):
        lines += ["", _clip(f"{number}. {view.heading(passage)}", width)]
        lines += _coloured(view, passage, width) if color else _table(view, passage, width)
    return "\n".join(lines) + "\n"


def _bars(view: View, width: int, color: bool) -> list[str]:
    names = max(map(_width, view.columns))
    names = max(8, min(names, _NAME, width - _BAR - 14))
    largest = float(view.shares[: view.shown].max()) or 1.0
    lines = []
    for column, (name, share) in enumerate(zip(view.columns, view.shares.tolist(), strict=True)):
        bar = "█" * min(_BAR, round(_BAR * share / largest)) or ("▏" if share else "")
        if column >= view.shown:
            bar = ""  # the sum of the others would outshine every single expert
        mark = f"{view.mark(column):>3} "
        if color:
            mark = _paint(view, column, mark)
            bar = f"\x1b[38;5;{_ansi(view.colours(column)[0])}m{bar}\x1b[0m"
        lines.append(f"{mark} {_fit(name, names)}  {100 * share:5.1f}%  {bar}")
    return lines


def _coloured(view: View, passage: Passage, width: int) -> list[str]:
    """Write the text, with a line break after each newline and where the terminal ends."""
    lines, used = [""], 0
    for token, leader in zip(passage.tokens, passage.leaders, strict=True):
        text = token.text.replace("␣", " ")  # its background shows the space
        if used and used + _width(text) > width:
            lines, used = [*lines, ""], 0
        lines[-1] += _paint(view, view.column[leader], text)
        used += _width(text)
        if text.endswith("↵"):
            lines, used = [*lines, ""], 0
    return lines if lines[-1] else lines[:-1]


def _table(view: View, passage: Passage, width: int) -> list[str]:
    texts = [token.text for token in passage.tokens]
    names = min(max(map(_width, ["top expert", *view.names])), _NAME)
    first = min(max(map(_width, ["token", *texts])), max(8, width - names - 12))
    lines = [f"{_fit('token', first)} | {_fit('top expert', names)} | weight"]
    for text, leader, share in zip(texts, passage.leaders, passage.largest, strict=True):
        padded = text + " " * (first - _width(text))  # a long token is never cut
        lines.append(f"{padded} | {_fit(view.names[leader], names)} | {100 * share:5.1f}%")
    return lines


def _paint(view: View, column: int, text: str) -> str:
    back, front = (_ansi(colour) for colour in view.colours(column))
    return f"\x1b[48;5;{back};38;5;{front}m{text}\x1b[0m"


def _ansi(colour: str) -> int:
    """Find the nearest of the terminal's 6 x 6 x 6 colours."""
    levels = (0, 95, 135, 175, 215, 255)
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    red, green, blue = (min(range(6), key=lambda n: abs(levels[n] - part)) for part in parts)
    return 16 + 36 * red + 6 * green + blue


def _width(text: str) -> int:
    """Count the columns that a terminal needs: two for wide characters, none for combining ones."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def _clip(text: str, width: int) -> str:
    if _width(text) <= width:
        return text
    while _width(text) >= width and text:
        text = text[:-1]
    return text + "…"


def _fit(text: str, width: int) -> str:
    text = _clip(text, width)
    return text + " " * (width - _width(text))
