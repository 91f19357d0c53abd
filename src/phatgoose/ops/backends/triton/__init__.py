"""Triton kernels for NVIDIA GPUs, as a backend."""

import importlib
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from phatgoose.ops.backends.base import Backend, Down
from phatgoose.ops.choose import Choosing
from phatgoose.ops.scoring import Extras, Gates

HALF = (torch.bfloat16, torch.float16)


@final
class TritonBackend(Backend):
    """Kernels for NVIDIA GPUs since Ampere; on a CPU under TRITON_INTERPRET=1."""

    spare_slots = True  # so a compiled model does not depend on how many experts there are

    def why_not(self, device_type: str, dtype: torch.dtype) -> str | None:
        if dtype == torch.float64:
            return "the factors are in float64, the kernels compute in float32"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if not interpreted:
            if device_type != "cuda":
                return f"the model is on {device_type}, Triton needs an NVIDIA GPU"
            if torch.version.hip:
                return "the kernels were never tested on an AMD GPU"
            if torch.cuda.get_device_capability() < (8, 0):
                return "the GPU is older than Ampere (compute capability 8.0)"
        try:
            import triton  # noqa: F401  (whether it is there)
        except ImportError:
            return "triton is not installed (pip install triton)"
        return None

    def halves_gates(self, dtype: torch.dtype) -> bool:
        return dtype in HALF

    @cached_property
    def _launch(self) -> Any:
        """The launchers, which import Triton: it may be missing, and is slow to import."""
        return importlib.import_module("phatgoose.ops.backends.triton.launch")

    def empty_down(self, x: Tensor, a: Tensor, chosen: int) -> Down:
        down: Down = self._launch.empty_down(x, a, chosen)
        return down

    def gated_down(
        self, x: Tensor, gates: Gates, a: Tensor, choosing: Choosing, extras: Extras
    ) -> tuple[Tensor, Tensor, Down]:
        # The signatures' own dtype is that of the products with them.
        x = x.to(gates.signatures.dtype)
        found: tuple[Tensor, Tensor, Down] = self._launch.gated_down(x, gates, a, choosing, extras)
        return found

    def routed_down(self, x: Tensor, a: Tensor, experts: Tensor, weights: Tensor) -> Down:
        down: Down = self._launch.routed_down(x, a, experts, weights)
        return down

    def routed_up_(self, output: Tensor, b: Tensor, down: Down, experts: Tensor, part: int) -> None:
        self._launch.routed_up_(output, b, down, experts, part)

    def routed_up_all_(
        self, output: Tensor, bs: Sequence[Tensor], down: Down, experts: Tensor
    ) -> None:
        if not self._launch.few_routed_up_all_(output, bs, down, experts):
            super().routed_up_all_(output, bs, down, experts)
