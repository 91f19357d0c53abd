"""The interface of a backend, which computes a routed layer, and what its calls are given.

Letters: T tokens, S layers that share the input, C slots, K chosen, R rank, I and O features.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from phatgoose.ops.choose import Choosing
from phatgoose.ops.scoring import Extras, Gates, choose_by_gate


class Down(NamedTuple):
    """What passes from the way down to the way up.

    Its content is the backend's own affair. Its shapes must be linear in the number of tokens, so
    that a compiled graph serves any number of them.
    """

    z: Tensor  # w A x of every pair, fp32
    counts: Tensor
    members: Tensor


class Backend(ABC):
    """One way to compute a routed layer. A new one is a file here and a line in `BACKENDS`.

    A layer's LoRA runs in two halves, so that its own product can come between them: down (choose
    experts, w A x) needs only the input, up adds B z to the output in place.
    """

    automatic: ClassVar[bool] = True  # whether "auto" may take it
    spare_slots: ClassVar[bool] = False  # whether results do not depend on slots that are closed

    def why_not(self, device_type: str, dtype: torch.dtype) -> str | None:
        """Say why it cannot run on such a device with factors of this dtype; None if it can.

        The words follow "backend='name': " in an error.
        """
        return None

    def halves_gates(self, dtype: torch.dtype) -> bool:
        """Tell whether it wants signatures as two halves of the factors' dtype; see `pieces_of`."""
        return False

    @abstractmethod
    def empty_down(self, x: Tensor, a: Tensor, chosen: int) -> Down:
        """Make tensors of the shapes that the way down of x [T, I] and a [S, C, R, I] returns."""

    def gated_down(
        self, x: Tensor, gates: Gates, a: Tensor, choosing: Choosing, extras: Extras
    ) -> tuple[Tensor, Tensor, Down]:
        """Score by gate, choose, and project down.

        x [T, I]; a [S, C, R, I]. Returns experts int64 [T, S, K], weights fp32 [T, S, K], and what
        the way up wants.
        """
        routing = choose_by_gate(x, gates, choosing, extras)
        down = self.routed_down(x, a, routing.experts, routing.weights)
        return routing.experts, routing.weights, down

    @abstractmethod
    def routed_down(self, x: Tensor, a: Tensor, experts: Tensor, weights: Tensor) -> Down:
        """Project down with experts [T, S, K] and weights that were chosen elsewhere."""

    @abstractmethod
    def routed_up_(self, output: Tensor, b: Tensor, down: Down, experts: Tensor, part: int) -> None:
        """Add to output [T, O] what part's chosen experts make of z; b is [C, O, R], scaled.

        The rows of output may lie apart, its columns do not.
        """

    def routed_up_all_(
        self, output: Tensor, bs: Sequence[Tensor], down: Down, experts: Tensor
    ) -> None:
        """`routed_up_` for all parts; their outputs are the columns of `output`, in order."""
        first = 0
        for part, b in enumerate(bs):
            self.routed_up_(output[:, first : first + b.shape[1]], b, down, experts, part)
            first += b.shape[1]
