"""Which experts served which tokens, counted on the device while the model runs."""

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

BASE = ""  # stands for the base alone among the names of experts
KEPT = 1024  # finished requests that nobody has asked about yet,
KEPT_TOKENS = 1 << 20  # and their tokens, where they are kept one by one
PIECES = 256  # of a request's tokens, before they are put together


@dataclass
class Record:
    """What served one request. Columns are the base alone, then the slots of the pool."""

    names: Sequence[str | None]  # by slot, when the request came
    sums: Float[Tensor, " 1+C"]
    with_tokens: bool
    best: list[tuple[int, Tensor]] = field(default_factory=list)  # first position, columns [T]
    tokens: int = 0  # in `best`
    _pieces: int = 0  # since they were put together

    def note(self, first: int, best: Int[Tensor, " T"]) -> None:
        """The columns of further tokens. They are copied: a view would keep the whole batch."""
        self.best.append((first, best.clone()))
        self.tokens += len(best)
        self._pieces += 1
        if self._pieces == PIECES:
            self.pack()

    def pack(self) -> None:
        """Join blocks that follow each other, because a step of decoding brings one token."""
        runs: list[tuple[int, list[Tensor]]] = []
        end = -1
        for first, columns in self.best:
            if first != end:
                runs.append((first, []))
            runs[-1][1].append(columns)
            end = first + len(columns)
        self.best = [(first, torch.cat(pieces)) for first, pieces in runs]
        self._pieces = 0


class Usage:
    """Counts the experts' shares: for requests that ask for theirs, and for all together.

    Every layer adds the weights of each token's experts to that token's row of `tally`; a token's
    shares are its row over the row's sum. Tokens whose row is empty were served by the base.
    """

    def __init__(self, tokens: int, capacity: int, device: torch.device) -> None:
        self.tally = torch.zeros(tokens, 1 + capacity, device=device)
        self._sums = torch.zeros(1 + capacity, device=device, dtype=torch.float64)
        self._entropy = torch.zeros((), device=device, dtype=torch.float64)
        self._count = 0
        self._totals: dict[str, float] = {}
        self._running: dict[str, Record] = {}
        self._finished: OrderedDict[str, Record] = OrderedDict()

    def start(self, request: str, names: Sequence[str | None], *, with_tokens: bool) -> None:
        if request not in self._running:
            sums = torch.zeros_like(self._sums)
            self._running[request] = Record(names, sums, with_tokens)

    def finish(self, request: str) -> None:
        record = self._running.pop(request, None)
        if record is None:
            return
        record.pack()
        self._finished[request] = record
        kept = sum(other.tokens for other in self._finished.values())
        while len(self._finished) > KEPT or (kept > KEPT_TOKENS and len(self._finished) > 1):
            kept -= self._finished.popitem(last=False)[1].tokens

    def clear(self, tokens: int) -> None:
        """Call this before a forward of so many tokens."""
        self.tally[:tokens].zero_()

    def add(self, requests: Sequence[str], counts: Sequence[int], first: dict[str, int]) -> None:
        """Call this after a forward, with how many tokens each request had, and where it began."""
        tokens = sum(counts)
        shares = _shares(self.tally[:tokens])
        self._sums += shares.sum(0)
        self._entropy += torch.special.entr(shares).sum()
        self._count += tokens
        if not self._running:
            return
        best, start = shares.argmax(1).to(torch.int32), 0
        for request, count in zip(requests, counts, strict=True):
            record, here = self._running.get(request), slice(start, start + count)
            start += count
            if record is not None:
                record.sums += shares[here].sum(0)
                if record.with_tokens:
                    record.note(first[request], best[here])

    def take(self, request: str) -> list[tuple[str, Record]]:
        """Forget and return the records of a request, by vLLM's own id or the one it was given.

        vLLM appends "-" and 8 letters to an id, puts "0_", "1_", ... before those of several
        answers, and its server "-0", "-1", ... after those of several prompts.
        """
        pattern = rf"(?:(\d+)_)?{re.escape(request)}(?:-(\d+))?(?:-[0-9a-f]{{8}})?"
        found = []
        for records in (self._finished, self._running):
            for name in list(records):
                if match := re.fullmatch(pattern, name):
                    answer, prompt = (int(number or 0) for number in match.groups())
                    found.append((prompt, answer, name, records.pop(name)))
        return [(name, record) for _, _, name, record in sorted(found, key=lambda one: one[:3])]

    def settle(self, names: Sequence[str | None]) -> None:
        """Put what was counted so far under the experts' names, before slots change hands."""
        for name, amount in zip((BASE, *names), self._sums.tolist(), strict=True):
            if name is not None and (amount or name):
                self._totals[name] = self._totals.get(name, 0.0) + amount
        self._sums.zero_()

    def keep(self, names: Sequence[str | None]) -> None:
        """End the counts of all other experts. One that comes again starts from zero."""
        self._totals = {n: t for n, t in self._totals.items() if n == BASE or n in names}

    def totals(self, names: Sequence[str | None]) -> dict[str, Any]:
        self.settle(names)
        entropy = float(self._entropy) / self._count if self._count else 0.0
        tokens = {name: amount for name, amount in self._totals.items() if name != BASE}
        return {
            "tokens": tokens,
            "base": self._totals.get(BASE, 0.0),
            "entropy": entropy,
            "count": self._count,
        }


def report(found: list[tuple[str, Record]]) -> dict[str, Any]:
    """Shares over all the answers of a request, and, if asked for, each answer's tokens."""
    sums: dict[str, float] = {}
    answers = []
    for _, record in found:
        names = (BASE, *record.names)
        for name, amount in zip(names, record.sums.tolist(), strict=True):
            if name is not None and amount > 0.0:
                sums[name] = sums.get(name, 0.0) + amount
        if record.with_tokens:
            answers.append(_by_position(record, names))
    whole = sum(sums.values())
    shares = {name: amount / whole for name, amount in sums.items()}
    return {"shares": shares, **({"tokens": answers} if answers else {})}


def _shares(tally: Float[Tensor, "T 1+C"]) -> Float[Tensor, "T 1+C"]:
    whole = tally.sum(1, keepdim=True)
    shares = tally / whole.clamp_min(1e-30)
    shares[:, :1] += whole == 0.0
    return shares


def _by_position(record: Record, names: Sequence[str | None]) -> list[str | None]:
    """The best expert of each token; None for a token that the prefix cache spared the model."""
    columns: dict[int, int] = {}
    for first, best in record.best:
        columns |= dict(enumerate(best.tolist(), first))
    length = max(columns, default=-1) + 1
    return [names[columns[at]] if at in columns else None for at in range(length)]
