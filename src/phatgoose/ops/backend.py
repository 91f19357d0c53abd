"""Which implementation computes a routed layer: chosen here, and only here."""

import functools
import logging
import os
from typing import Literal

import torch

from phatgoose.errors import ConfigError

Backend = Literal["auto", "reference", "torch", "triton"]
BACKENDS = ("auto", "reference", "torch", "triton")

log = logging.getLogger(__name__)


@functools.cache
def choose_backend(asked: Backend, device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """The implementation for a device and the dtype of the factors; each choice is logged once.

    "reference" is the definition: it gathers the factors of every pair, for tests and small inputs.
    "torch" sorts the pairs by expert, on any device. "triton" has kernels for NVIDIA GPUs (and
    runs anywhere under TRITON_INTERPRET=1). "auto" is "triton" on an NVIDIA GPU, else "torch".

    Raises ConfigError where the one asked for is unknown or cannot run.
    """
    problem = _why_no_triton(device_type, dtype)
    if asked == "triton" and problem:
        raise ConfigError(f"backend='triton': {problem}. Leave backend at 'auto'.")
    chosen: str = asked
    if asked == "auto":
        chosen = "torch" if problem else "triton"
        if device_type == "cuda" and problem:
            log.warning("routed layers on cuda use the slower 'torch' backend: %s", problem)
    log.info("routed layers on %s in %s: backend %s", device_type, dtype, chosen)
    return chosen


def _why_no_triton(device_type: str, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot run on a device, in words, or None."""
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
