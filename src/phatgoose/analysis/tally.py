"""The routing of many examples, added up trace by trace."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from phatgoose.analysis.summary import layer_of
from phatgoose.nn import Stream, Trace

Segment = Literal["prompt", "answer", "start"]
SEGMENTS: tuple[Segment, ...] = ("prompt", "answer", "start")  # start: a decoder's first, by itself


@dataclass(frozen=True)
class Place:
    """Where a routed module stands in the model."""

    module: str
    stream: Stream  # whose tokens it sees
    stack: int  # 0; 1 for a decoder beside an encoder; 2 for neither
    layer: str  # "3", "encoder 3"; a module in no layer is its own
    kind: str  # "q_proj"; longer where two of a stack would have one name


def places(streams: dict[str, Stream]) -> list[Place]:
    """The modules in the order of the model: encoder, decoder, the rest; by depth."""
    where = {module: layer_of(module) for module in streams}
    ordered = sorted(streams, key=where.__getitem__)  # keeps the order they ran in within a layer
    inside = {module: _inside(module) for module in ordered}
    shorts = {
        stack: _shorten({inside[m] for m in ordered if where[m][0] == stack})
        for stack, _, _ in where.values()
    }
    return [
        Place(m, streams[m], where[m][0], where[m][2], shorts[where[m][0]][inside[m]])
        for m in ordered
    ]


class Tally:
    """Sums over the tokens of traces; a trace may go as soon as it has been added.

    `prompts` has the number of prompt tokens of each row of the traced batch. Tokens at those
    positions of an encoder or of a decoder-only model, and the encoder's states as the decoder's
    cross-attention sees them, are the prompt's; all others are the answer's, but for the decoder's
    start token in an encoder-decoder, which is a segment of its own.
    """

    def __init__(self, experts: Sequence[str]) -> None:
        self.experts = list(experts)
        count = len(self.experts)
        # By module: parts of their token's weight, tokens, and of the sum and the maximum of each
        # token's weights: sums and sums of squares. By stream: tokens by number of experts used.
        self.weights: dict[str, Float[Tensor, "P E+1"]] = defaultdict(
            lambda: torch.zeros(len(SEGMENTS), count + 1, dtype=torch.float64)
        )
        self.tokens: dict[str, Int[Tensor, " P"]] = defaultdict(
            lambda: torch.zeros(len(SEGMENTS), dtype=torch.long)
        )
        self.scales: dict[str, Float[Tensor, "2 2"]] = defaultdict(
            lambda: torch.zeros(2, 2, dtype=torch.float64)
        )
        self.distinct: dict[Stream, Int[Tensor, " E+1"]] = defaultdict(
            lambda: torch.zeros(count + 1, dtype=torch.long)
        )
        self.streams: dict[str, Stream] = {}

    def add(self, trace: Trace, prompts: Int[Tensor, " B"], *, seq2seq: bool) -> None:
        """Take in one forward of prompts and reference answers."""
        self.streams.update(trace.streams)
        count = len(self.experts)
        for stream, table in trace.tokens.items():
            if seq2seq and stream == "decoder":
                segment = torch.where(table.position == 0, 2, 1)
            else:
                segment = (table.position >= prompts[table.sequence]).long()
            used = torch.zeros(len(segment), count + 1, dtype=torch.bool)
            for module in (m for m in trace.experts if trace.streams[m] == stream):
                experts, weights = trace.experts[module], trace.weights[module].double()
                slots = torch.where(experts < 0, count, experts)
                shares = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
                cells = segment.unsqueeze(1) * (count + 1) + slots
                self.weights[module] += torch.bincount(
                    cells.flatten(), shares.flatten(), minlength=len(SEGMENTS) * (count + 1)
                ).view(len(SEGMENTS), count + 1)
                self.tokens[module] += torch.bincount(segment, minlength=len(SEGMENTS))
                added = weights * (experts >= 0)  # what goes to no expert adds nothing
                scale = torch.stack([added.sum(-1), added.amax(-1)], dim=-1)
                self.scales[module] += torch.stack([scale.sum(0), scale.square().sum(0)], dim=-1)
                token, choice = (weights > 0).nonzero(as_tuple=True)
                used[token, slots[token, choice]] = True
            self.distinct[stream] += torch.bincount(used[:, :count].sum(-1), minlength=count + 1)


def _inside(module: str) -> str:
    """A module's name within its layer."""
    parts = module.split(".")
    depth = next((i for i, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join(parts[depth + 1 :])


def _shorten(names: set[str]) -> dict[str, str]:
    """Each name's last parts, as many as tell it from the others."""
    short: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        tails = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        short[name] = next(
            (t for t in tails if sum(f".{other}".endswith(f".{t}") for other in names) == 1), name
        )
    return short
