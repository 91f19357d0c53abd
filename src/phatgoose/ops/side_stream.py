"""A side stream for routing, so that in a CUDA graph it runs while the layer does.

The layer's own product is launched first. It leaves some multiprocessors free, and routing takes
those. In the other order, routing would hold all of them while the product waits.

One stream may read the other's memory without recording it. A fork waits for all earlier work, and
whoever forks joins before anything is freed. So the caller must keep what the other stream reads
until the join.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# With more tokens, routing and the layer would only compete for the same multiprocessors.
BESIDE_TOKENS = 256


def may_run_beside(x: Tensor) -> bool:
    """Tell whether a CUDA graph is being captured and x [..., I] has few tokens."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return False
    if x.shape[:-1].numel() > BESIDE_TOKENS:
        return False
    return torch.cuda.is_current_stream_capturing()


def fork(device: torch.device) -> None:
    """Call this before the layer: the side stream then waits for all work queued up to here."""
    _side_stream(device).wait_stream(torch.cuda.current_stream())


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Open this after the layer: the block runs on the side stream that was forked, then joins."""
    side = _side_stream(device)
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
