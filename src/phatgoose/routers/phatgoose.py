"""The published router."""

from typing import final

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from phatgoose.errors import MissingGateError
from phatgoose.experts import Expert
from phatgoose.ops import EPS, gate_scores
from phatgoose.routers.base import Router


@final
class PhatgooseRouter(Router):
    """Standardise token and gate over their features, then dot: v̂·û / sqrt(I).

    Standardising uses the population variance and eps 1e-5. No sigmoid at inference.
    arXiv:2402.05859, section 3.2.
    """

    name = "phatgoose"
    standardises = True

    def signature(self, expert: Expert, module: str) -> Float[Tensor, " I"]:
        if expert.gates is None:
            how = (
                f"Train them: phatgoose gate {expert.folder}"
                if expert.folder
                else "It was made of other adapters, whose gates are not its own"
            )
            raise MissingGateError(
                f"{expert.name}: has no gates, and the phatgoose router needs them. {how}. Or "
                "use a router that needs none: adapter_evidence, arrow, or, where other experts of "
                "the pool have gates, phatgoose_mixed."
            )
        gate = expert.gates.vectors[module].float()
        return F.layer_norm(gate, gate.shape, eps=EPS)

    def score(
        self, x: Float[Tensor, "T I"], signatures: Float[Tensor, "E I"]
    ) -> Float[Tensor, "T E"]:
        return gate_scores(x, signatures)
