"""Average Activation."""

from typing import final

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from phatgoose.experts import Expert
from phatgoose.ops import EPS, gate_scores
from phatgoose.routers.base import Measuring, Router, Vectors


@final
class AverageActivationRouter(Router):
    """PHATGOOSE with a mean in place of the gate: v̂·û / sqrt(I).

    v is the mean over an expert's examples of the mean over each one's tokens of the module's
    input, with the expert applied. It needs one forward over some of the expert's data, and no
    training. arXiv:2402.05859, section 4 (Average Activation).
    """

    name = "average_activation"
    standardises = True
    needs = measures = "average_activation"

    @classmethod
    def measure(cls, given: Measuring) -> list[Vectors]:
        return given.mean_inputs()

    def signature(self, expert: Expert, module: str) -> Float[Tensor, " I"]:
        mean = self.kept(expert)[module]
        return F.layer_norm(mean, mean.shape, eps=EPS)

    def score(
        self, x: Float[Tensor, "T I"], signatures: Float[Tensor, "E I"]
    ) -> Float[Tensor, "T E"]:
        return gate_scores(x, signatures)
