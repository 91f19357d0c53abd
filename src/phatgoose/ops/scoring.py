"""Scores by gate, in plain torch: the definition that faster backends agree with."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from phatgoose.ops.choose import Choosing
from phatgoose.ops.rows import Rows
from phatgoose.types import Routing

EPS = 1e-5  # of standardising, as in the authors' layer norms


class Gates(NamedTuple):
    """What scores the tokens of S layers, as a bank keeps it."""

    signatures: Tensor  # fp32 [S * C, I]; or its pieces [>= 2 * S * C, I], see `pieces_of`
    sums: Tensor  # fp32 [S, C]: of each signature, over its features
    open: Tensor  # bool [S, C]: which slots may be chosen


class Extras(NamedTuple):
    """What only some forwards have."""

    prior: Tensor | None = None  # fp32 [T, C], added to the scores of every part
    tally: Tensor | None = None  # fp32 [>= T, >= 1 + C]; see `add_to_tally`


def choose_open(
    scores: Float[Tensor, "T *S C"],
    opened: Bool[Tensor, "*S C"],
    choosing: Choosing,
    extras: Extras,
    rows: Rows | None = None,
) -> Routing:
    """Add the prior to scores, leave out slots that are not open, and choose.

    Where rows ask for themselves, top_k and temperature are theirs.
    """
    if extras.prior is not None:
        between = [1] * (scores.dim() - 2)
        scores = scores + extras.prior.view(scores.shape[0], *between, scores.shape[-1])
    scores = scores.masked_fill(~opened, -torch.inf)
    if rows is not None:
        return rows.choose(scores, opened, choosing)
    return choosing.choose(scores)


def gate_scores(x: Tensor, signatures: Tensor) -> Tensor:
    """Compute s · standardised x / sqrt(I) of tokens [T, I] and signatures [E, I]: fp32 [T, E].

    Standardising takes the population variance and eps 1e-5. arXiv:2402.05859, section 3.2.
    """
    return _standardised(x) @ signatures.T


def _standardised(x: Tensor) -> Tensor:
    """Give x zero mean and unit variance, over sqrt(I). Scaling here spares a [T, E] tensor."""
    width = x.shape[-1]
    return F.layer_norm(x.float(), (width,), eps=EPS) / math.sqrt(width)


def choose_by_gate(x: Tensor, gates: Gates, choosing: Choosing, extras: Extras) -> Routing:
    """Choose experts and weights [T, S, K] for x [T, I], given whole signatures [S * C, I]."""
    parts, slots = gates.open.shape
    u = _standardised(x)
    signatures = gates.signatures.view(parts, slots, x.shape[1])

    # Part by part, so that memory holds one part's scores at a time. Each product then has a width
    # of its own part, too, which decides the scores' last bits.
    routings = [
        choose_open(u @ signatures[part].T, gates.open[part], choosing, extras)
        for part in range(parts)
    ]
    experts = torch.stack([routing.experts for routing in routings], dim=1)
    weights = torch.stack([routing.weights for routing in routings], dim=1)
    if extras.tally is not None:
        add_to_tally(extras.tally, experts, weights)
    return Routing(experts, weights)


def add_to_tally(tally: Tensor, experts: Tensor, weights: Tensor) -> None:
    """Add weights [T, S, K] to the columns 1 + experts of tally: the first is for "no expert"."""
    tally.scatter_add_(1, (experts + 1).flatten(1), weights.flatten(1))


def pieces_of(signatures: Float[Tensor, "*N I"], dtype: torch.dtype) -> Float[Tensor, "2 *N I"]:
    """Split fp32 signatures into two of half precision that add up to them, for tensor cores.

    A pair keeps 16 (bf16) or 22 (fp16) bits, so that scores differ from those in fp32 by about
    1e-5 of their size.
    """
    high = signatures.to(dtype)
    return torch.stack([high, (signatures - high.float()).to(dtype)])
