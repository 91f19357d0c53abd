"""The backends, and the one place that chooses which of them computes a routed layer."""

import functools
import logging

import torch

from phatgoose.errors import ConfigError
from phatgoose.ops.backends.base import Backend, Down
from phatgoose.ops.backends.reference import ReferenceBackend
from phatgoose.ops.backends.sorting import SortedBackend
from phatgoose.ops.backends.triton import TritonBackend

# By the name that users give. "auto" takes the first that can run.
BACKENDS: dict[str, Backend] = {
    "triton": TritonBackend(),
    "torch": SortedBackend(),
    "reference": ReferenceBackend(),
}

log = logging.getLogger(__name__)

__all__ = ["BACKENDS", "Backend", "Down", "backend_names", "choose_backend"]


def backend_names() -> tuple[str, ...]:
    """What `backend` may be."""
    return ("auto", *sorted(BACKENDS))


@functools.cache
def choose_backend(asked: str, device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """The name of what computes routed layers on a device, given the dtype of the factors.

    "reference" is the definition: it gathers the factors of every pair, for tests and small inputs.
    "torch" sorts the pairs by expert, on any device. "triton" has kernels for NVIDIA GPUs (and
    runs anywhere under TRITON_INTERPRET=1). "auto" is "triton" on an NVIDIA GPU, else "torch".
    Each choice is logged once.

    Raises ConfigError where the one asked for is unknown or cannot run.
    """
    if asked not in backend_names():
        raise ConfigError(f"backend must be one of {backend_names()}, got {asked!r}.")
    if asked == "auto":
        chosen = _automatic(device_type, dtype)
    else:
        chosen, problem = asked, BACKENDS[asked].why_not(device_type, dtype)
        if problem:
            raise ConfigError(f"backend={asked!r}: {problem}. Leave backend at 'auto'.")
    log.info("routed layers on %s in %s: backend %s", device_type, dtype, chosen)
    return chosen


def _automatic(device_type: str, dtype: torch.dtype) -> str:
    """The first that can run. Where a faster one cannot run on a GPU, the log says why."""
    passed_over: list[str] = []
    for name, backend in BACKENDS.items():
        if not backend.automatic:
            continue
        problem = backend.why_not(device_type, dtype)
        if problem is None:
            if device_type == "cuda":
                for why in passed_over:
                    log.warning("routed layers on cuda use the slower %r backend: %s", name, why)
            return name
        passed_over.append(problem)
    raise ConfigError(
        f"backend='auto': none can run on {device_type} in {dtype}: {'; '.join(passed_over)}."
    )
