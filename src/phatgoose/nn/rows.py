"""What the rows of a batch ask, in the slots of one bank."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.nn.choice import Choice
from phatgoose.ops import Choosing, Rows


class Row(NamedTuple):
    """A row's choice by the pool's indices. A compiler compares rows, so they are plain values."""

    mixture: tuple[tuple[int, float], ...] | None  # fixed; None: the router chooses
    allowed: tuple[int, ...] | None  # what the router chooses among; None: all
    top_k: int | Literal["all"] | None
    temperature: float | None
    scale: float

    @classmethod
    def of(cls, choice: Choice, names: Sequence[str]) -> "Row":
        """Raises RoutingError where the choice names an expert that is not among `names`."""
        index = {name: place for place, name in enumerate(names)}
        named = (*(choice.allow or ()), *choice.deny, *(choice.weights or ()))
        for name in named:
            if name not in index:
                raise RoutingError(f"assign: {name} is no longer in the pool.")
        scale = 1.0 if choice.scale is None else choice.scale
        mixture = allowed = None
        if choice.base or choice.weights is not None:
            mixture = tuple(sorted((index[n], w) for n, w in (choice.weights or {}).items()))
        elif choice.allow is not None or choice.deny:
            allowed = tuple(index[name] for name in choice.routed(names))
        return cls(mixture, allowed, choice.top_k, choice.temperature, scale)


def rows_of(
    asked: Sequence[Row],
    owners: Int[Tensor, " T"],
    *,
    members: Sequence[int],
    slots: int,
    choosing: Choosing,
) -> Rows:
    """What each token's row asks of a bank's first `slots`, which hold the pool's `members`.

    An expert of a mixture that is not in the bank adapts nothing there, so it adds nothing.
    """
    places = {member: slot for slot, member in enumerate(members)}
    mixtures, kept = [], []
    for row in asked:
        mixtures.append([(places[m], w) for m, w in row.mixture or () if m in places])
        top_k = slots if row.top_k == "all" else row.top_k or choosing.top_k
        kept.append(0 if row.mixture is not None else choosing._replace(top_k=top_k).count(slots))
    width = max(1, *kept, *map(len, mixtures))
    padded = [mixture + [(-1, 0.0)] * (width - len(mixture)) for mixture in mixtures]
    temperatures = [row.temperature or choosing.temperature for row in asked]
    tables = (
        torch.tensor([[slot for slot, _ in mixture] for mixture in padded]),
        torch.tensor([[weight for _, weight in mixture] for mixture in padded]),
        torch.tensor(kept),
        torch.tensor(temperatures),
        torch.tensor([row.scale for row in asked]),
    )
    every = [
        table.to(owners.device, torch.float32 if table.is_floating_point() else torch.int64)
        for table in tables
    ]
    return Rows(*(table[owners] for table in every))


def closed_to(
    asked: Sequence[Row], owners: Int[Tensor, " T"], *, members: Sequence[int], slots: int
) -> Float[Tensor, "T C"] | None:
    """-inf at the slots that a token's row does not allow, as a prior; None where all allow all."""
    if all(row.allowed is None for row in asked):
        return None
    closed = torch.zeros(len(asked), slots)
    for number, row in enumerate(asked):
        for slot, member in enumerate(members):
            if row.allowed is not None and member not in row.allowed:
                closed[number, slot] = -torch.inf
    return closed.to(owners.device)[owners]


def owners_of(given: int, rows: int, tokens: int) -> Int[Tensor, " T"]:
    """Which of the `given` choices each of so many tokens, in equal rows, follows.

    Beams of a sequence follow one another.
    """
    owners = torch.arange(given).repeat_interleave(rows // given)
    return owners.repeat_interleave(tokens // rows)
