"""LAG."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from phatgoose.errors import ConfigError
from phatgoose.experts import Expert
from phatgoose.ops import choose_experts
from phatgoose.routers.base import Router
from phatgoose.routers.spectral import norms, scaled_vectors


@final
class LagRouter(Router):
    """Arrow keeps `candidates` experts, SpectR (‖S Vᵀ x‖) takes the best of them, at weight 1.

    Fleshman and Van Durme 2025, arXiv:2507.05346, with its 20 candidates. In a pool of no more
    experts than that it is SpectR's best one.
    """

    name = "lag"
    defaults = {"top_k": 1, "scale": "unit"}

    def __init__(self, candidates: int = 20) -> None:
        if candidates < 1:
            raise ConfigError(f"candidates must be at least 1, got {candidates}.")
        self.candidates = candidates

    def signature(self, expert: Expert, module: str) -> Float[Tensor, " RI"]:
        return scaled_vectors(expert.modules[module])

    def score(
        self, x: Float[Tensor, "T I"], signatures: Float[Tensor, "E RI"]
    ) -> Float[Tensor, "T E"]:
        scores = norms(x, signatures)
        if len(signatures) <= self.candidates:
            return scores
        first = F.normalize(signatures[:, : x.shape[-1]], dim=-1)  # the top vector, as in Arrow
        kept = choose_experts((x.float() @ first.T).abs(), self.candidates).experts
        return torch.full_like(scores, -torch.inf).scatter(1, kept, scores.gather(1, kept))
