"""The right singular vectors of an expert's update, the input directions it acts on."""

import torch
from jaxtyping import Float
from torch import Tensor

from phatgoose.experts import Delta


def right_singular(lora: Delta) -> tuple[Float[Tensor, " R"], Float[Tensor, "R I"]]:
    """Singular values (falling) and right singular vectors (rows) of scale · B A, in fp64.

    Exact through the R x R core: with B = Q_b R_b and Aᵀ = Q_a R_a, the core scale · R_b R_aᵀ has
    the same singular values, and its right vectors times Q_aᵀ are those of the product, which is
    never formed. The largest entry of every vector is positive, so that the result depends on the
    adapter alone. Directions on which the update is zero (up to rounding) are zero rows.
    """
    lora = lora.plain(
        "a router by singular vectors", "Choose adapter_evidence, leave the expert out"
    )
    q, inner = torch.linalg.qr(lora.a.double().T)
    outer = torch.linalg.qr(lora.b.double(), mode="r").R
    _, values, vectors = torch.linalg.svd(lora.scale * outer @ inner.T, full_matrices=False)
    vectors = vectors @ q.T
    vectors = vectors * vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    real = values > max(lora.a.shape + lora.b.shape) * 1e-15 * values.max()
    rank = lora.rank  # where features are fewer than ranks there are fewer of both
    values = torch.nn.functional.pad(values * real, (0, rank - len(values)))
    vectors = vectors * real.unsqueeze(1)
    return values, torch.nn.functional.pad(vectors, (0, 0, 0, rank - len(vectors)))


def scaled_vectors(lora: Delta) -> Float[Tensor, " RI"]:
    """S Vᵀ of scale · B A = U S Vᵀ, in fp32 and flattened: what `norms` takes for ‖B A x‖."""
    values, vectors = right_singular(lora)
    return (values.unsqueeze(1) * vectors).float().flatten()


def norms(x: Float[Tensor, "T I"], signatures: Float[Tensor, "E W"]) -> Float[Tensor, "T E"]:
    """‖M x‖ in fp32 for signatures that are matrices M [R I], flattened; W = R * I."""
    width = x.shape[-1]
    products = x.float() @ signatures.reshape(-1, width).T
    scores: Tensor = products.view(len(x), len(signatures), -1).norm(dim=-1)
    return scores
