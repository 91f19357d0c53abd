"""Pools that mix experts with gates and experts without."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from phatgoose.errors import MissingGateError
from phatgoose.experts import Expert
from phatgoose.ops import EPS, gate_scores
from phatgoose.routers.base import Modifier, Router
from phatgoose.routers.inputs import read_by, written_by
from phatgoose.routers.spectral import right_singular

AVERAGE = "average_activation"  # the signature to start from where there is one


@final
class MixedRouter(Router):
    """PHATGOOSE, where an expert without gates joins with a vector derived from what it has.

    That is its average activation if there is one, and else its Arrow vector, turned to give
    background text a positive mean score. It competes fairly with trained gates: the vector is
    scaled, and moved along the mean μ of standardised background activations, so that on background
    text its scores have the mean and the standard deviation that the trained gates' have on average
    at that module. So it is a gate like the others, at no cost in speed. Ours, not the paper's.

    `derivations` tells which experts that concerns. The background, unless given as token ids, is
    sampled from the base. Raises MissingGateError where no expert has gates.
    """

    name = "phatgoose_mixed"
    standardises = True

    def __init__(self, *, background: Int[Tensor, "B L"] | None = None) -> None:
        self._background = background
        self._gates: dict[str, list[Tensor]] = {}  # trained ones, by module
        self._vectors: dict[tuple[str, str], Tensor] = {}  # derived ones

    def prepare(self, model: Any, experts: Sequence[Expert]) -> None:
        for expert in experts:
            for module, gate in expert.gates.vectors.items() if expert.gates else ():
                self._gates.setdefault(module, []).append(_standardised(gate.float()))
        without = [expert for expert in experts if expert.gates is None]
        if not without:
            return
        modules = list({module: None for expert in without for module in expert.modules})
        lacking = [module for module in modules if module not in self._gates]
        if lacking:
            raise MissingGateError(
                f"{without[0].name}: has no gates, and no other expert has any at {lacking[0]} to "
                "measure it against. Use the router arrow or adapter_evidence, or train gates: "
                "phatgoose gate"
            )
        if self._background is None:
            self._background = written_by(model)
        activations: dict[str, list[Tensor]] = {}

        def seen(module: str, x: Tensor) -> None:
            x = x.flatten(0, -2)
            activations.setdefault(module, []).append(F.layer_norm(x.float(), x.shape[-1:]).cpu())

        # One module at a time would run the model as often; all at once would keep them all.
        for start in range(0, len(modules), 16):
            activations.clear()
            part = modules[start : start + 16]
            read_by(model, self._background, part, seen)
            for module in part:
                self._derive(without, module, torch.cat(activations[module]))

    def _derive(self, experts: Sequence[Expert], module: str, u: Float[Tensor, "T I"]) -> None:
        scores = u @ torch.stack(self._gates[module]).T / math.sqrt(u.shape[1])
        wanted = scores.mean(0).mean(), scores.var(0).mean().sqrt()
        for expert in experts:
            if module in expert.modules:
                vector = _starting_vector(expert, module, u)
                self._vectors[expert.name, module] = _matched(vector, u, *wanted)

    def signature(self, expert: Expert, module: str) -> Float[Tensor, " I"]:
        if expert.gates is None:
            return self._vectors[expert.name, module]
        return _standardised(expert.gates.vectors[module].float())

    def score(
        self, x: Float[Tensor, "T I"], signatures: Float[Tensor, "E I"]
    ) -> Float[Tensor, "T E"]:
        return gate_scores(x, signatures)


def _standardised(v: Float[Tensor, " I"]) -> Float[Tensor, " I"]:
    return F.layer_norm(v, v.shape, eps=EPS)


def derivations(router: Router, experts: Iterable[Expert]) -> dict[str, str]:
    """Say what a router made a vector of in place of a gate, by the name of each such expert.

    It is empty for routers that derive none. With modifiers, the innermost router counts.
    """
    while isinstance(router, Modifier) and router.inner is not None:
        router = router.inner
    if not isinstance(router, MixedRouter):
        return {}
    return {e.name: _source(e) for e in experts if e.gates is None}


def _source(expert: Expert) -> str:
    return AVERAGE if AVERAGE in expert.signatures else "arrow"


def _starting_vector(expert: Expert, module: str, u: Float[Tensor, "T I"]) -> Float[Tensor, " I"]:
    if _source(expert) == AVERAGE:
        return _standardised(expert.signatures[AVERAGE].vectors[module])
    vector = _standardised(right_singular(expert.modules[module])[1][0].float())
    return vector if (u @ vector).mean() >= 0 else -vector


def _matched(
    vector: Float[Tensor, " I"], u: Float[Tensor, "T I"], mean: Tensor, deviation: Tensor
) -> Float[Tensor, " I"]:
    """a · vector + b · μ whose scores over u have this mean and standard deviation, a above 0.

    With p and q the scores of vector and μ: b = (mean - a E p) / E q, and the variance
    a² Var p + 2ab Cov + b² Var q is then a quadratic in a. Where it has no root (μ alone varies
    more than wanted), its vertex comes closest.
    """
    root = math.sqrt(u.shape[1])
    mu = u.mean(0)
    p, q = (u @ vector / root).double(), (u @ mu / root).double()
    (pp, pq), (_, qq) = torch.cov(torch.stack([p, q]))
    shift, slope = mean.double() / q.mean(), -p.mean() / q.mean()
    square = pp + 2 * slope * pq + slope**2 * qq
    linear = 2 * shift * (pq + slope * qq)
    rest = shift**2 * qq - deviation.double() ** 2
    root_of = (linear**2 - 4 * square * rest).clamp_min(0).sqrt()
    a = (-linear + root_of) / (2 * square)
    derived: Tensor = a * vector.double() + (shift + slope * a) * mu.double()
    return derived.float()
