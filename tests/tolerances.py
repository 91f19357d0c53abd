"""How close is close enough: the one table of tolerances, by dtype."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Upper bounds on norm(found - wanted) / norm(wanted)."""

    output: float  # of a layer's or a model's output
    delta: float  # of what routing adds to the base's output
    gradient: float
    weight: float = 1e-5  # of routing weights, which are fp32 everywhere


TOLERANCE = {
    # The ops sum in fp32 whatever comes in, so float64 is no closer.
    torch.float64: Tolerance(output=1e-6, delta=1e-6, gradient=1e-6),
    torch.float32: Tolerance(output=1e-5, delta=1e-4, gradient=1e-5),
    torch.float16: Tolerance(output=2e-3, delta=2e-2, gradient=4e-3),
    torch.bfloat16: Tolerance(output=2e-2, delta=5e-2, gradient=3e-2),
}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """norm(found - wanted) / norm(wanted); the plain norm of the difference where wanted is 0."""
    assert found.shape == wanted.shape, f"{list(found.shape)} is not {list(wanted.shape)}"
    found, wanted = found.detach().double(), wanted.detach().double()
    size = float(wanted.norm())
    return float((found - wanted).norm()) / (size or 1.0)


def assert_near(found: Tensor, wanted: Tensor, bound: float) -> None:
    error = relative_error(found, wanted)
    assert error <= bound, f"relative error {error:.2e} is above {bound:.0e}"
