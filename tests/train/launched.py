"""Gate training as each process of `accelerate launch` runs it; the argument is a folder.

Without a launcher, `runs(1)` is the same training over the same effective batches.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from phatgoose import Gates, train_gates, train_gates_from_trainer, train_gates_together
from phatgoose.train.loop import loop as loop_module
from tests.train.toys import (
    Interrupted,
    PowerCut,
    make,
    make_batches,
    make_collection,
    make_rows,
    modules_of,
)

TOGETHER = 4  # micro-batches a step, over all processes


def runs(processes: int, folder: Path | None = None) -> Iterator[tuple[str, Gates]]:
    """The same gates over a list, a DataLoader, and a DataLoader that accelerate has prepared."""
    rows, batches = make_rows(24), make_batches(13)
    checkpoint = folder and folder / "gates.checkpoint"
    settings = {
        "steps": 10,
        "gradient_accumulation_steps": TOGETHER // processes,
        "progress": False,
    }
    yield "list", train_gates(make(), batches, checkpoint=checkpoint, **settings)
    yield "shuffled", train_gates(make(), DataLoader(rows, 2, shuffle=True), **settings)
    prepared = Accelerator().prepare(DataLoader(rows, 2))
    yield "prepared", train_gates(make(), prepared, **settings)
    settings["steps"] = 16
    if folder is not None:
        checkpoint = folder / "interrupted.checkpoint"
        with contextlib.suppress(PowerCut):
            interrupted = Interrupted(batches * 4, after=12 * TOGETHER)
            train_gates(make(), interrupted, checkpoint=checkpoint, **settings)
        assert checkpoint.exists()
    yield "interrupted", train_gates(make(), batches, checkpoint=checkpoint, **settings)
    base, models = make_collection()
    data = {name: make_batches(13, lengths=(4, 6, 2 + i)) for i, name in enumerate(models)}
    data["e1"] = DataLoader(rows, 2, shuffle=True)
    together = folder and folder / "together"
    for name, gates in train_gates_together(
        base, modules_of(models), data, checkpoint=together, **settings
    ).items():
        yield f"together-{name}", gates


def trainer_run(folder: Path) -> Gates:
    """An adapter and gates by a Trainer, into a folder that all processes share."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    trainer = Trainer(model, arguments, train_dataset=make_rows(16))
    trainer.train()
    return train_gates_from_trainer(trainer, steps=3, progress=False)


def count_writes() -> dict[str, int]:
    """Count what this process writes."""
    counts = {"checkpoints": 0, "gates": 0}

    def counting(kind: str, function: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            counts[kind] += 1
            return function(*arguments)

        return counted

    loop_module.save_checkpoint = counting("checkpoints", loop_module.save_checkpoint)
    Gates.save = counting("gates", Gates.save)
    return counts


def main(folder: Path) -> None:
    accelerator, counts = Accelerator(cpu=True), count_writes()
    rank = accelerator.process_index
    told = {"processes": accelerator.num_processes, "examples": {}, "last_loss": {}}
    for name, gates in runs(accelerator.num_processes, folder):
        save_file(dict(gates.vectors), folder / f"{name}-{rank}.safetensors")
        told["examples"][name] = gates.record.examples
        told["last_loss"][name] = gates.record.last_loss
    gates = trainer_run(folder / "expert")
    save_file(dict(gates.vectors), folder / f"trainer-{rank}.safetensors")
    (folder / f"told-{rank}.json").write_text(json.dumps({**told, **counts}))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
