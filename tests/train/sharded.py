"""Gate training on a base that two processes share: a folder, then who shards.

Without a launcher, `runs(1)` is the same training on whole bases.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from phatgoose import Gates, train_gates, train_gates_together
from tests.train.toys import make, make_batch, make_batches, make_collection, modules_of

TOGETHER = 4  # micro-batches a step, over all processes
BLOCKS = ("T5Block", "GPT2Block")
KINDS = ("t5", "gpt2")


def by_fsdp2(model: nn.Module) -> None:
    """torch's own fully_shard, on each block and then on the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in list(model.modules()):
        if type(module).__name__ in BLOCKS:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def by_deepspeed(model: nn.Module) -> None:
    """ZeRO-3, every weight in parts however small."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    deepspeed.initialize(model=model, config=config)


def runs(processes: int, shard: Callable[[nn.Module], None]) -> Iterator[tuple[str, Gates]]:
    """Gates alone and together; before the former, a step as a trainer's leaves its traces."""
    settings = {
        "steps": 3,
        "gradient_accumulation_steps": TOGETHER // processes,
        "progress": False,
    }
    for kind in KINDS:
        model = make(kind)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        shard(model)
        if shard is by_fsdp2:
            model(**make_batch(kind)).loss.backward()
            model.zero_grad()
        yield kind, train_gates(model, make_batches(8, kind), **settings)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())
        base, models = make_collection(kind)
        adapters = modules_of(models)
        data = {name: make_batches(8, kind, lengths=(4, 2 + i)) for i, name in enumerate(models)}
        shard(base)
        for name, gates in train_gates_together(base, adapters, data, **settings).items():
            yield f"{kind}-{name}", gates


def main(folder: Path, how: str) -> None:
    accelerator = Accelerator(cpu=True)
    rank, told = accelerator.process_index, {}
    shard = {"fsdp2": by_fsdp2, "deepspeed": by_deepspeed}[how]
    for name, gates in runs(accelerator.num_processes, shard):
        save_file(
            {key: vector.contiguous() for key, vector in gates.vectors.items()},
            folder / f"{name}-{rank}.safetensors",
        )
        told[name] = describe(gates)
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    accelerator.end_training()


def describe(gates: Gates) -> dict[str, Any]:
    """What does not depend on rounding."""
    record = gates.record
    return {
        "base": record.base.shape,
        "adapter": record.adapter,
        "examples": record.examples,
        "tokens": record.tokens,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
