"""SEQR."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from phatgoose.experts import Expert
from phatgoose.routers.base import Router
from phatgoose.routers.spectral import norms


@final
class SeqrRouter(Router):
    """The expert of the largest ‖B A x‖ = ‖R A x‖, with B = Q R, at weight 1.

    Fleshman and Van Durme 2025, arXiv:2509.18093. Its normalisation of each expert's norms is
    "seqr+zscore".
    """

    name = "seqr"
    defaults = {"top_k": 1, "scale": "unit"}

    def signature(self, expert: Expert, module: str) -> Float[Tensor, " RI"]:
        lora = expert.modules[module].plain(f"seqr: {expert.name} at {module}")
        inner = torch.linalg.qr(lora.b.double(), mode="r").R
        product: Tensor = lora.scale * inner @ lora.a.double()
        return product.float().flatten()

    def score(
        self, x: Float[Tensor, "T I"], signatures: Float[Tensor, "E RI"]
    ) -> Float[Tensor, "T E"]:
        return norms(x, signatures)
