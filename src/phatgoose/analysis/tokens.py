"""Turns tokens into text that a reader can see."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from phatgoose.analysis.summary import sequence_numbers
from phatgoose.errors import ConfigError
from phatgoose.nn import Stream, Trace
from phatgoose.text import visible

_VISIBLE = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥"}
_LABEL = 36  # characters of a sequence's text in its label


@dataclass(frozen=True)
class Token:
    """One real token, for display."""

    text: str  # spaces, newlines and control characters made visible: ␣ ↵ \x1b
    sequence: int  # of its stream, from 0
    position: int  # in its sequence, from 0
    stream: Stream


def token_table(trace: Trace, tokenizer: Any) -> list[Token]:
    """List every real token, in the order seen, stream after stream. Nothing is merged.

    A token that is part of a character shows its bytes (\\xe2\\x82).
    """

    @cache
    def text(token: int) -> str:
        return visible(_piece(tokenizer, token), _VISIBLE)

    return [
        Token(text(token), sequence, position, stream)
        for stream, table in trace.tokens.items()
        for token, sequence, position in zip(
            table.ids.tolist(), sequence_numbers(table), table.position.tolist(), strict=True
        )
    ]


def label_sequences(
    trace: Trace, tokenizer: Any, labels: Sequence[str] | None = None
) -> dict[Stream, list[str]]:
    """Give each sequence a short name: the caller's, or how its text begins.

    If there are fewer labels than rows of the batch, they are shared out evenly, as `generate` does
    with prompts and their beams. Raises ConfigError if that does not come out even.
    """
    named: dict[Stream, list[str]] = {}
    for stream, table in trace.tokens.items():
        ids: dict[int, list[int]] = {}
        row: dict[int, int] = {}
        for number, token, where in zip(
            sequence_numbers(table), table.ids.tolist(), table.sequence.tolist(), strict=True
        ):
            ids.setdefault(number, []).append(token)
            row[number] = where
        rows = max(row.values(), default=-1) + 1
        if labels is None:
            named[stream] = [_begin(tokenizer, ids[n]) or f"sequence {n + 1}" for n in ids]
        elif len(labels) == len(ids):
            named[stream] = [visible(label) for label in labels]
        elif labels and rows % len(labels) == 0:
            named[stream] = [visible(labels[row[n] * len(labels) // rows]) for n in ids]
        else:
            raise ConfigError(
                f"labels: got {len(labels)}, the trace has {len(ids)} sequences ({stream}). "
                "Give one for each, or none at all."
            )
    return named


def _begin(tokenizer: Any, ids: list[int]) -> str:
    """Take the first words of a sequence, on one line."""
    real = [token for token in ids[: 2 * _LABEL] if token >= 0]
    text = " ".join(tokenizer.decode(real, skip_special_tokens=True).split())
    return visible(text if len(text) <= _LABEL else text[: _LABEL - 1] + "…")


def _piece(tokenizer: Any, token: int) -> str:
    """Return the text of one token, with the space that it starts with."""
    if token < 0:
        return "<embedding>"
    name = tokenizer.convert_ids_to_tokens(token)
    if name is None or token in tokenizer.all_special_ids:
        return name or f"<{token}>"
    # SentencePiece decoders drop the space before the first word, so look at the second.
    once, twice = (
        tokenizer.decode([token] * n, clean_up_tokenization_spaces=False) for n in (1, 2)
    )
    text = twice[len(once) :]
    return _bytes(name) if "\ufffd" in text else text or name


def _bytes(name: str) -> str:
    """Show part of a character: what decodes as text, the rest as \\xNN."""
    if name.startswith("<0x"):  # SentencePiece's byte fallback
        return "\\x" + name[3:5].lower()
    known = _byte_values()
    if any(c not in known for c in name):
        return name
    return bytes(known[c] for c in name).decode("utf-8", "backslashreplace")


@cache
def _byte_values() -> dict[str, int]:
    """Map each character of a byte-level vocabulary to the byte it stands for (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(moved)}
