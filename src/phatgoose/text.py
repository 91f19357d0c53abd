"""Text of strangers, made fit for a terminal, a log and a page."""

import unicodedata
from collections.abc import Mapping

# What an answer or a page of text needs: its lines, and what joins letters and emoji.
LINES = {c: c for c in "\n\t\u200c\u200d"}


def visible(text: str, also: Mapping[str, str] | None = None) -> str:
    r"""`text` with every character that cannot be seen written as an escape (\x1b, \u202e).

    Control characters could command a terminal or start a line of a log, formatting characters
    (bidi overrides among them) could make a name look like another, and half a surrogate pair
    cannot be encoded. `also` has characters that are written otherwise, or as they are.
    """
    if text.isprintable() and not also:
        return text
    seen = also or {}
    return "".join(seen.get(c) or (_escape(c) if is_hidden(c) else c) for c in text)


def is_hidden(c: str) -> bool:
    """Whether a character cannot be seen: control, format, surrogate, line or paragraph."""
    return unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escape(c: str) -> str:
    return c.encode("unicode_escape").decode()
