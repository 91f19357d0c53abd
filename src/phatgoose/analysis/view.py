"""Holds what all displays share: the experts shown, their colours, and each sequence's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from phatgoose.analysis.summary import layer_weights, shares, token_weights
from phatgoose.analysis.tokens import Token, label_sequences, token_table
from phatgoose.nn import Stream, Trace
from phatgoose.text import visible

SHOWN = 20  # experts with a column of their own; the rest are "others"

# Paul Tol's "light" scheme, made for black text and safe for the colour-blind, then darker ones
# for white text. Neighbours of one hue differ in lightness. https://sronpersonalpages.nl/~pault
LIGHT = "#77AADD #EE8866 #EEDD88 #44BB99 #FFAABB #99DDFF #BBCC33 #AAAA00".split()
DARK = "#332288 #882255 #117733 #AA4499 #1965B0 #8C510A #B2182B #35605A".split()
GREY = "#DDDDDD"
STREAMS = {"encoder": "encoder", "cross": "encoder, seen by the decoder", "decoder": "decoder"}


@dataclass(frozen=True)
class Passage:
    """One sequence: n tokens, and what they used."""

    label: str
    stream: Stream
    tokens: list[Token]
    rows: list[int]  # its tokens' rows in the trace
    shares: Float[Tensor, "n C"]  # of each token's weight, over all sites
    leaders: list[int]  # expert with most weight; the number of experts where that is none
    largest: list[float]  # share of that expert


@dataclass(frozen=True)
class View:
    """A trace laid out for display; C columns: experts by falling share, then the rest."""

    names: list[str]  # of every expert, and "no expert" after them
    columns: list[str]
    column: list[int]  # of every expert, and of "no expert"
    shown: int  # how many columns are single experts
    shares: Float[Tensor, " C"]
    layers: list[str]
    by_layer: Float[Tensor, "L C"]
    passages: list[Passage]

    def heading(self, passage: Passage) -> str:
        """Return a sequence's label, with its side if there are two."""
        sides = len({other.stream for other in self.passages}) > 1
        return f"{passage.label} ({STREAMS[passage.stream]})" if sides else passage.label

    def mark(self, column: int) -> str:
        """Return a column's short sign: the rank of its expert, + for the others, – for none."""
        if column < self.shown:
            return str(column + 1)
        return "–" if self.columns[column] == self.names[-1] else "+"

    def colours(self, column: int) -> tuple[str, str]:
        """Return the background and the text colour of a column."""
        if column >= min(self.shown, len(LIGHT) + len(DARK)):
            return GREY, "#111111"
        light = column < len(LIGHT)
        return (LIGHT + DARK)[column], "#111111" if light else "#FFFFFF"


def look(trace: Trace, tokenizer: Any, labels: Sequence[str] | None) -> View:
    """Lay out a trace. The encoder's states as cross-attention reads them are the encoder's text
    once more, so their tokens are left out where the encoder's own are there."""
    by_layer = layer_weights(trace)
    weights = torch.stack(list(by_layer.values()))
    total = shares(weights.sum(0))
    names = [*(visible(name) for name in trace.names), "no expert"]
    columns, column, shown = _columns(names, total)
    fold = torch.nn.functional.one_hot(torch.tensor(column), len(columns)).double()
    named = label_sequences(trace, tokenizer, labels)
    table = token_table(trace, tokenizer)
    passages: list[Passage] = []
    for stream in STREAMS:
        if stream not in trace.tokens or (stream == "cross" and "encoder" in trace.tokens):
            continue
        tokens = [token for token in table if token.stream == stream]
        part = shares(token_weights(trace, stream))
        largest = part.max(1)
        for number, label in enumerate(named[stream]):
            rows = [row for row, token in enumerate(tokens) if token.sequence == number]
            passages.append(
                Passage(
                    label=label,
                    stream=stream,
                    tokens=[tokens[row] for row in rows],
                    rows=rows,
                    shares=part[rows] @ fold,
                    leaders=largest.indices[rows].tolist(),
                    largest=largest.values[rows].tolist(),
                )
            )
    return View(
        names=names,
        columns=columns,
        column=column,
        shown=shown,
        shares=total @ fold,
        layers=list(by_layer),
        by_layer=shares(weights) @ fold,
        passages=passages,
    )


def _columns(names: list[str], total: Float[Tensor, " E+1"]) -> tuple[list[str], list[int], int]:
    """Return the columns, the column of each expert and of none, and how many are experts."""
    order = total[:-1].argsort(descending=True, stable=True).tolist()
    shown = len(order) if len(order) <= SHOWN + 1 else SHOWN
    columns = [names[i] for i in order[:shown]]
    if shown < len(order):
        columns.append(f"others ({len(order) - shown})")
    column = [0] * len(names)
    for rank, i in enumerate(order):
        column[i] = min(rank, shown)
    if total[-1] > 0:
        columns.append(names[-1])
    column[-1] = len(columns) - 1  # where there is no such column, its weight is 0
    return columns, column, shown
