"""Routing on a stream of its own, so that in a CUDA graph the layer need not wait for it.

Memory of one stream that the other reads stays safe without being recorded: a fork waits for all
there was before, and whoever forks joins before anything is freed. So the caller keeps what was
read on the other stream until then.
"""

import functools

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


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
