"""The published router."""

from typing import final

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from phatgoose.experts import Expert
from phatgoose.experts.kinds import GATES
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
    needs = GATES
    instead = (
        "adapter_evidence, arrow or, where other experts of the pool have gates, phatgoose_mixed"
    )

    def signature(self, expert: Expert, module: str) -> Float[Tensor, " I"]:
        gate = self.kept(expert)[module].float()
        return F.layer_norm(gate, gate.shape, eps=EPS)

    def score(
        self, x: Float[Tensor, "T I"], signatures: Float[Tensor, "E I"]
    ) -> Float[Tensor, "T E"]:
        return gate_scores(x, signatures)
