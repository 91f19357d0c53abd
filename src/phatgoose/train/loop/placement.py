"""Where a base's weights are: on one device, spread by `device_map`, or sharded over processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from phatgoose.errors import ConfigError


def refuse_fsdp1(model: nn.Module) -> None:
    """Raise ConfigError where weights are parts of flat ones and cannot be told apart."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ConfigError(
            "the model is sharded by FSDP1, whose layers hold no weights of their own. Shard it by "
            "FSDP2: torch's fully_shard, or accelerate's fsdp_version 2."
        )


def place(model: nn.Module, accelerator: Accelerator) -> None:
    """Put the model on its process's device, unless it is spread or sharded already."""
    if accelerator.num_processes > 1 and not is_spread(model) and not is_sharded(model):
        model.to(accelerator.device)


def is_spread(model: nn.Module) -> bool:
    """Tell whether accelerate has spread the model by a device_map."""
    return any(hasattr(module, "hf_device_map") for module in model.modules())


def is_sharded(model: nn.Module) -> bool:
    """Tell whether some weights are sharded over processes, by FSDP2 or DeepSpeed's ZeRO-3."""
    return any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters())


def device_of(module: nn.Module) -> torch.device:
    """Say where a module computes. An offloaded one's weights are there only while it does."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # accelerate's hooks may come in sequence
            place = getattr(one, "execution_device", None)
            if place is not None:
                return torch.empty(0, device=place).device  # "cuda" becomes "cuda:0"
        for parameter in part.parameters(recurse=False):
            return parameter.device
    return torch.device("cpu")


@contextmanager
def whole_weight(module: nn.Module) -> Iterator[Tensor]:
    """Return a module's weight. It is brought back if offloaded, and gathered if sharded.

    Every process has to ask for a sharded weight, in the same order.
    """
    from accelerate.utils import align_module_device

    with align_module_device(module):
        weight: Any = module.weight
        if hasattr(weight, "full_tensor"):
            yield weight.full_tensor()
        elif hasattr(weight, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([weight]):
                yield weight.detach().clone()
        else:
            yield weight
