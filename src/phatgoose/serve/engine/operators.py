"""What a routed layer does inside vLLM: two operators, before the layer's product and after it.

vLLM compiles a model once, for any number of tokens, and drops all guards. Letters as in
`phatgoose.ops.operators`.
"""

import functools
import math
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from phatgoose.ops import (
    BACKENDS,
    EPS,
    Choosing,
    Extras,
    Gates,
    Rows,
    choose_open,
    gate_scores,
)
from phatgoose.ops.backends import Backend, Down
from phatgoose.ops.choose import CHOOSING
from phatgoose.ops.scoring import add_to_tally
from phatgoose.ops.side_stream import beside, fork, may_run_beside
from phatgoose.routers import make_router

_library = torch.library.Library("phatgoose", "FRAGMENT")


def gate_statistics(x: Float[Tensor, "T I"], signatures: Float[Tensor, "M I"]) -> Tensor:
    """What scoring needs of a slice of the features: [T, N], N >= 3 + M, which ranks add up.

    In fp32: the sum of x, the sum of squares about the slice's own mean, I times the square of
    that mean, the products with the signatures, and zeros. Scores made of them lose accuracy by the
    square of mean over deviation. That matters far above 1, which hardly occurs in a model.

    It is no operator of its own, so that a compiler may fuse it. The zeros make rows of 16 bytes or
    a multiple: vLLM's all-reduce for GPUs that are linked takes no other sizes.
    """
    x = x.float()
    mean = x.mean(dim=-1, keepdim=True)
    squares = (x - mean).square().sum(dim=-1, keepdim=True)
    width = x.shape[-1]
    every = [mean * width, squares, mean.square() * width, x @ signatures.T]
    return F.pad(torch.cat(every, dim=-1), (0, -(3 + signatures.shape[0]) % 4))


def scores_of(
    statistics: Float[Tensor, "T N"], sums: Float[Tensor, "S C"], features: int
) -> Float[Tensor, "T S C"]:
    """s · standardised x / sqrt(I) from the sum of all slices' statistics; `sums` are of s."""
    mean = statistics[:, :1] / features
    squares = statistics[:, 1:2] + statistics[:, 2:3] - features * mean.square()
    scale = torch.rsqrt(squares.clamp_min(0.0) / features + EPS) / math.sqrt(features)
    products: Tensor = statistics[:, 3 : 3 + sums.numel()].unflatten(1, sums.shape)
    return (products - mean.unsqueeze(-1) * sums) * scale.unsqueeze(-1)


def scores_by(
    router: str, x: Float[Tensor, "T I"], signatures: Float[Tensor, "S C W"]
) -> Float[Tensor, "T S C"]:
    """Score the tokens against each part's signatures with the router of this name."""
    return torch.stack([_router(router).score(x, part) for part in signatures], dim=1)


_router = functools.cache(make_router)


def _choose_down(
    x: Tensor,
    whole: Tensor | None,
    gates: Gates,
    a: Tensor,
    choosing: Choosing,
    extras: Extras,
    rows: Rows | None,
    *,
    features: int,
    router: str | None,
    backend: Backend,
) -> tuple[Tensor, Down]:
    """Choose experts [T, S, K] for the tokens of x [T, I], and project down.

    Gates score, or `router` does, with signatures [S * C, W]. If `whole` is given, x and a are one
    rank's slice of the `features`. Then `whole` is the sum of all ranks' `gate_statistics` if gates
    score, and x with all features if a router does. With `rows`, tokens have mixtures or knobs of
    their own, which no kernel reads, and signatures are whole.
    """
    if whole is None and router is None and rows is None:
        experts, _, down = backend.gated_down(x, gates, a, choosing, extras)
        return experts, down
    every = x if whole is None else whole
    signatures = gates.signatures.view(*gates.open.shape, -1)
    if router is not None:
        scores = scores_by(router, every, signatures)
    elif whole is not None:
        scores = scores_of(every, gates.sums, features)
    else:
        scores = torch.stack([gate_scores(x, part) for part in signatures], dim=1)
    routing = choose_open(scores, gates.open, choosing, extras, rows)
    if extras.tally is not None:
        add_to_tally(extras.tally, routing.experts, routing.weights)
    return routing.experts, backend.routed_down(x, a, routing.experts, routing.weights)


def _fork(turn: Tensor, x: Tensor, whole: Tensor | None) -> None:
    """Mark the point before the layer's product. In a CUDA graph `add_routed_` starts from here.

    Both declare a write to `turn`, one dummy tensor for all layers. This false dependency keeps the
    compiler from reordering them.
    """
    if may_run_beside(x):
        fork(x.device)


def _add_routed(
    output: Tensor,
    turn: Tensor,
    x: Tensor,
    whole: Tensor | None,
    signatures: Tensor,
    sums: Tensor,
    open_slots: Tensor,
    a: Tensor,
    b: list[Tensor],
    prior: Tensor | None,
    tally: Tensor | None,
    rows: list[Tensor],
    features: int,
    router: str | None,
    backend: str,
    *choosing: Any,
) -> None:
    """Add what the chosen experts make of x [T, I] to output [T, sum of O], part after part.

    For whole, features and router see `_choose_down`. Each of b is [C, O, R]. prior and tally are
    fp32 and have a row for each token that the engine may put into a forward. prior [N, C] is added
    to the scores of every part. The chosen experts' weights are added to tally [N, 1 + C], whose
    first column is for "no expert". rows are the tables of `Rows` [N, ...], or empty. Call `fork_`
    before, with the same `turn`. Raises ValueError if T > N.
    """
    prior, tally = (_first(table, len(x)) for table in (prior, tally))
    own = Rows(*(_first(table, len(x)) for table in rows)) if rows else None
    if prior is not None:
        prior = prior[:, : open_slots.shape[1]]
    computes = BACKENDS[backend]
    with beside(x.device) if may_run_beside(x) else nullcontext():
        experts, down = _choose_down(
            x,
            whole,
            Gates(signatures, sums, open_slots),
            a,
            Choosing(*choosing),
            Extras(prior, tally),
            own,
            features=features,
            router=router,
            backend=computes,
        )
    computes.routed_up_all_(output, b, down, experts)


def _first(table: Any, tokens: int) -> Any:
    if table is not None and tokens > len(table):
        raise ValueError(f"phatgoose: {tokens} tokens in a forward, room for {len(table)}.")
    return None if table is None else table[:tokens]


_library.define("fork_(Tensor(a!) turn, Tensor x, Tensor? whole) -> ()")
_library.impl("fork_", _fork, "CompositeExplicitAutograd")
torch.library.register_fake("phatgoose::fork_", lambda turn, x, whole: None, lib=_library)
_library.define(
    "add_routed_(Tensor(a!) output, Tensor(b!) turn, Tensor x, Tensor? whole, Tensor signatures,"
    " Tensor sums, Tensor open_slots, Tensor a, Tensor[] b, Tensor? prior, Tensor(c!)? tally,"
    f" Tensor[] rows, int features, str? router, str backend, {CHOOSING}) -> ()",
)
_library.impl("add_routed_", _add_routed, "CompositeExplicitAutograd")
torch.library.register_fake("phatgoose::add_routed_", lambda *arguments: None, lib=_library)
