"""The gate phase after a transformers.Trainer or TRL SFTTrainer has trained an adapter."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phatgoose.errors import ConfigError
from phatgoose.experts import Gates
from phatgoose.train.gates import train_gates
from phatgoose.train.loop.seeding import seeded


def train_gates_from_trainer(
    trainer: Any, *, output_dir: str | Path | None = None, save: bool = True, **settings: Any
) -> Gates:
    """Train gates with a trainer's model, data, collator and loss; save adapter and gates.

    Call it after `trainer.train()`. Works with transformers.Trainer and TRL's SFTTrainer whose
    model is a PeftModel. The adapter is saved to `output_dir` (the trainer's own by default) as
    `trainer.save_model` does, then the gates beside it.

    Args:
        settings: passed on to `train_gates` (steps, learning_rate, seed, ...).

    Raises what `train_gates` raises.
    """
    folder = Path(output_dir or trainer.args.output_dir)
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "peft_config"):
        raise ConfigError(
            "trainer: its model is not a PeftModel. Give the trainer peft_config=LoraConfig(...), "
            "or a model from peft.get_peft_model."
        )

    def loss(_: nn.Module, batch: dict[str, Any]) -> Tensor:
        with trainer.compute_loss_context_manager():
            value: Tensor = trainer.compute_loss(model, batch)
            return value

    processing = trainer.processing_class
    processing = getattr(processing, "tokenizer", processing)  # a multimodal processor has one
    settings.setdefault("tokenizer", processing if hasattr(processing, "get_vocab") else None)
    if accelerator.mixed_precision == "bf16":
        settings.setdefault("autocast", torch.bfloat16)
    settings.setdefault("gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)
    settings.setdefault("seed", trainer.args.seed)
    with seeded(settings["seed"]):  # accelerate's sampler takes its seed when it is made
        batches = trainer.get_train_dataloader()
    gates = train_gates(model, batches, loss=loss, **settings)
    if save:
        trainer.save_model(str(folder))
        if accelerator.is_main_process:
            gates.save(folder)
        accelerator.wait_for_everyone()
    return gates
