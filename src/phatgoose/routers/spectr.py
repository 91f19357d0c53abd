"""SpectR, in both readings."""

from typing import final

from jaxtyping import Float
from torch import Tensor

from phatgoose.experts import Expert
from phatgoose.routers.base import Router
from phatgoose.routers.spectral import norms, right_singular, scaled_vectors


@final
class SpectrRouter(Router):
    """‖S Vᵀ x‖ = ‖B A x‖, with B A = U S Vᵀ: how much the adapter would change this token.

    Fleshman and Van Durme 2025, arXiv:2504.03454, with S in the projection.
    """

    name = "spectr"

    def signature(self, expert: Expert, module: str) -> Float[Tensor, " RI"]:
        return scaled_vectors(expert.modules[module])

    def score(
        self, x: Float[Tensor, "T I"], signatures: Float[Tensor, "E RI"]
    ) -> Float[Tensor, "T E"]:
        return norms(x, signatures)


@final
class SpectrNormRouter(Router):
    """‖Vᵀ x‖: how much of this token lies in the adapter's input space, each direction alike.

    The other reading of arXiv:2504.03454, without S.
    """

    name = "spectr_norm"

    def signature(self, expert: Expert, module: str) -> Float[Tensor, " RI"]:
        return right_singular(expert.modules[module])[1].float().flatten()

    def score(
        self, x: Float[Tensor, "T I"], signatures: Float[Tensor, "E RI"]
    ) -> Float[Tensor, "T E"]:
        return norms(x, signatures)
