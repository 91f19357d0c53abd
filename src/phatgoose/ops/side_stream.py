"""Routing on a stream of its own, so that in a CUDA graph it and the layer run together.

The layer's own product is launched first: it leaves some multiprocessors free, which routing then
has. The other way round routing would hold all of them while the product waits.

Memory of one stream that the other reads stays safe without being recorded: a fork waits for all
there was before, and whoever forks joins before anything is freed. So the caller keeps what is
read on the other stream until then.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# With more tokens, routing and the layer would only wait for the same multiprocessors.
BESIDE_TOKENS = 256


def may_run_beside(x: Tensor) -> bool:
    """Whether x [..., I] is on its way into a CUDA graph, with few tokens."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return False
    if x.shape[:-1].numel() > BESIDE_TOKENS:
        return False
    return torch.cuda.is_current_stream_capturing()


def fork(device: torch.device) -> None:
    """Before the layer: what comes to run beside it waits for all there is up to here."""
    _side_stream(device).wait_stream(torch.cuda.current_stream())


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """After the layer: run this beside it, on the stream that was forked before it, and join."""
    side = _side_stream(device)
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
