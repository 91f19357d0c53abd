"""Launching a Triton kernel with little ado."""

from typing import Any

import torch
import triton
from torch import Tensor


class Kernel:
    """A Triton kernel, launched past Triton's own dispatch once it is compiled for a kind of call.

    That dispatch takes several times as long as the launch itself, and a layer launches up to eight
    kernels. Constants are given by name, as the kernel declares them behind its other arguments.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        *arguments: Any,
        num_warps: int = 4,
        num_stages: int = 3,
        **constants: Any,
    ) -> None:
        options = {"num_warps": num_warps, "num_stages": num_stages}
        if not isinstance(self.function, triton.JITFunction):  # interpreted
            self.function[grid](*arguments, **constants, **options)
            return
        device = arguments[0].device
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(grid, *arguments, **options, **constants)
            return
        key = (
            device.index,
            num_warps,
            num_stages,
            *map(_kind, arguments),
            *constants.values(),
        )
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self.function[grid](*arguments, **constants, **options)
            return
        names = self.function.arg_names[len(arguments) :]
        compiled[grid](*arguments, *[constants[name] for name in names])


def _kind(argument: Any) -> Any:
    """What Triton compiles for: dtype and alignment, or what it knows of a number."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    return float
