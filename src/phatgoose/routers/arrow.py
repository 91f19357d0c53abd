"""Arrow."""

from typing import final

from jaxtyping import Float
from torch import Tensor

from phatgoose.experts import Expert
from phatgoose.routers.base import Measuring, Router, Vectors
from phatgoose.routers.spectral import right_singular


@final
class ArrowRouter(Router):
    """|v·x|, v the top right singular vector of B A: the direction the adapter acts on most.

    A softmax of the kept scores over the temperature weighs them. It needs no data and no training.
    Ostapenko et al. 2024, arXiv:2405.11157, section 4.1; top 3 at temperature 1 are the defaults of
    PEFT's Arrow, which finds the same vector by power iteration from a random start.
    """

    name = "arrow"
    defaults = {"top_k": 3}
    measures = "arrow"

    @classmethod
    def measure(cls, given: Measuring) -> list[Vectors]:
        return [
            {name: right_singular(lora)[1][0].float() for name, lora in expert.modules.items()}
            for expert in given.experts
        ]

    def signature(self, expert: Expert, module: str) -> Float[Tensor, " I"]:
        if "arrow" in expert.signatures:  # as `phatgoose experts derive` kept it
            return expert.signatures["arrow"].vectors[module]
        return right_singular(expert.modules[module])[1][0].float()

    def score(
        self, x: Float[Tensor, "T I"], signatures: Float[Tensor, "E I"]
    ) -> Float[Tensor, "T E"]:
        return (x.float() @ signatures.T).abs()
