"""How close is close enough: the one table of tolerances, by dtype."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Upper bounds on norm(found - wanted) / norm(wanted)."""

    output: float  # of one operation, layer or fp32 model
    delta: float  # of what routing adds to the base's output, and of gradients through a model
    model: float  # of logits, where the two that are compared round in different places


TOLERANCE = {
    # The ops sum in fp32 whatever comes in, so float64 is hardly closer.
    torch.float64: Tolerance(output=1e-6, delta=1e-5, model=1e-5),
    torch.float32: Tolerance(output=1e-5, delta=1e-4, model=1e-5),
    torch.float16: Tolerance(output=1.5e-3, delta=4e-3, model=5e-3),
    torch.bfloat16: Tolerance(output=1e-2, delta=2e-2, model=4e-2),
}


def relative_error(found: Tensor, wanted: Tensor, size: Tensor | None = None) -> float:
    """norm(found - wanted) / norm(size), `wanted` being the size unless another is given.

    A sum that may cancel is measured by the size of its terms.
    """
    assert found.shape == wanted.shape, f"{list(found.shape)} is not {list(wanted.shape)}"
    found, wanted = found.detach().double(), wanted.detach().double()
    unit = float((wanted if size is None else size.detach().double()).norm())
    return float((found - wanted).norm()) / (unit or 1.0)


def assert_near(found: Tensor, wanted: Tensor, bound: float, size: Tensor | None = None) -> None:
    error = relative_error(found, wanted, size)
    assert error <= bound, f"relative error {error:.2e} is above {bound:.0e}"
