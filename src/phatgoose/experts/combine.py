"""Sums of LoRA products, as one LoRA."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from phatgoose.errors import IncompatibleExpertError
from phatgoose.experts.delta import Delta
from phatgoose.experts.differences import LinearDifference
from phatgoose.experts.lora_parts import LoraParts
from phatgoose.experts.low_rank import LoraModule


def weighted_sum(terms: Sequence[tuple[float, Delta]], *, rank: int | None = None) -> Delta:
    """Σ w_i · scale_i · B_i A_i over (w_i, LoRA_i) of one site, as one LoRA of scale 1, in fp32.

    What a kind has beside the product is summed too. Raises IncompatibleExpertError for several
    kinds that have something beside it.

    Without `rank` it is the factors side by side, weights and scales in B, of the sum of the ranks.
    With one, it is the best approximation of at most that rank (Eckart and Young, 1936), with the
    singular values split evenly between the factors. Computed in float64 and rounded to fp32 once,
    so the product is good to about 1e-7 of its size either way.
    """
    a = torch.cat([lora.a.detach().to("cpu", torch.float64) for _, lora in terms])  # [S I]
    b = torch.cat(
        [w * lora.scale * lora.b.detach().to("cpu", torch.float64) for w, lora in terms], dim=1
    )  # [O S]
    if rank is not None and rank < len(a):
        a, b = _truncated(a, b, rank)
    low = LoraModule(a.float(), b.float(), 1.0)
    # A LoRA with a bias is a linear difference, too, beside such.
    found = {type(delta) for _, delta in terms if delta.rest}
    kinds = found - {LoraParts} if LinearDifference in found else found
    if len(kinds) > 1:
        words = ", ".join(sorted(str(kind.kind) for kind in kinds))
        raise IncompatibleExpertError(
            f"experts of several kinds ({words}) adapt one module, and no adapter can be all of "
            "them. Merge experts of one kind, or of one and plain LoRA."
        )
    for kind in kinds:
        rest: dict[str, Tensor] = {}
        for weight, delta in terms:
            for key, tensor in delta.rest.items():
                part = weight * tensor.detach().to("cpu", torch.float64)
                rest[key] = rest[key] + part if key in rest else part
        return kind.merged(low, {key: tensor.float() for key, tensor in rest.items()})
    return low


def _truncated(
    a: Float[Tensor, "S I"], b: Float[Tensor, "O S"], rank: int
) -> tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]:
    """The factors of the first `rank` singular triples of B A, without forming it [O, I]."""
    q_a, r_a = torch.linalg.qr(a.T)
    q_b, r_b = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)  # at most [S S]
    root = s[:rank].sqrt()
    return root[:, None] * (vh[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root
