"""Gate training on a base that two processes share: a folder, then who shards.

Without a launcher, `runs(1)` is the same training on whole bases.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from phatgoose import Gates, train_gates, train_gates_from_trainer, train_gates_together
from tests.train.toys import (
    make,
    make_batch,
    make_batches,
    make_collection,
    make_rows,
    modules_of,
)

TOGETHER = 4  # micro-batches a step, over all processes
BLOCKS = ("T5Block", "GPT2Block")
KINDS = ("t5", "gpt2")


def by_fsdp2(model: nn.Module) -> None:
    """A T5 by torch's own fully_shard, on each block and then on the rest; others by accelerate."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    if model.config.model_type != "t5":
        _by_accelerate(model, mesh)
        return
    for module in list(model.modules()):
        if type(module).__name__ in BLOCKS:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _by_accelerate(model: nn.Module, mesh: Any) -> None:
    """What accelerate's `prepare` does with fsdp_version 2, though not on a CPU by itself."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=mesh,
        parallelism_config=SimpleNamespace(fsdp_dim_names=["fsdp"]),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
    )
    assert fsdp2_prepare_model(accelerator, model) is model


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
    yield "trainer", trainer_run(processes, shard)
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


def trainer_run(processes: int, shard: Callable[[nn.Module], None]) -> Gates:
    """Gates with a Trainer's data and loss, on the model that it has sharded."""
    model = make("gpt2")
    shard(model)
    arguments = TrainingArguments(
        output_dir="never written",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=TOGETHER // processes,
        use_cpu=True,
        report_to="none",
    )
    trainer = Trainer(model, arguments, train_dataset=make_rows(16))
    return train_gates_from_trainer(trainer, save=False, steps=3, progress=False)


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
