"""Launches a Triton kernel with little overhead."""

from typing import Any

import torch
import triton


class Kernel:
    """A Triton kernel, launched past Triton's own dispatch once it is compiled for a kind of call.

    That dispatch takes several times as long as the launch itself, and a layer launches up to eight
    kernels. Pass constants by name, as the kernel declares them behind its other arguments.
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
        kinds = [device.index, num_warps, num_stages, *constants.values()]
        for argument in arguments:  # what Triton compiles for
            if type(argument) is int:
                fits = -(2**31) <= argument < 2**31
                kinds.append((argument == 1) + 2 * (argument % 16 == 0) + 4 * fits)
            elif type(argument) is float:
                kinds.append(float)
            else:
                kinds += argument.dtype, argument.data_ptr() % 16 == 0
        key = tuple(kinds)
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self.function[grid](*arguments, **constants, **options)
            return
        names = self.function.arg_names[len(arguments) :]
        compiled[grid](*arguments, *[constants[name] for name in names])
