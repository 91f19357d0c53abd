"""The gate phase after transformers' Trainer, or one of TRL's, has trained an adapter."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from phatgoose.errors import (
    ConfigError,
    IncompatibleExpertError,
    PhatgooseError,
    TrainingError,
    first_line,
)
from phatgoose.experts import Gates, adapter_hash
from phatgoose.experts.lora import read_adapter
from phatgoose.train.gated_adapter import GatedAdapter
from phatgoose.train.gates import train_gates
from phatgoose.train.loop.seeding import seeded


def train_gates_from_trainer(
    trainer: Any, *, output_dir: str | Path | None = None, save: bool = True, **settings: Any
) -> Gates:
    """Train gates with a trainer's model, data, collator and loss; save adapter and gates.

    Call it after `trainer.train()`. Works with transformers.Trainer and TRL's SFTTrainer,
    DPOTrainer and GRPOTrainer whose model is a PeftModel; GRPO's answers are sampled with the gates
    as they are. First the adapter is saved to `output_dir` (the trainer's own by default), as
    `trainer.save_model` does, and read back: what could not become an expert is refused before
    anything is trained. The gates go beside it, or, if that fails, into a folder that is named.

    Args:
        settings: passed on to `train_gates` (steps, learning_rate, seed, ...).

    Raises what `train_gates` and `load_expert` raise, and:
        ConfigError: the trainer's model is not a PeftModel, or it has no data.
        TrainingError: the trainer's loss cannot be computed here, or the gates cannot be saved.
    """
    folder = Path(output_dir or trainer.args.output_dir)
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "peft_config"):
        raise ConfigError(
            "trainer: its model is not a PeftModel. Give the trainer peft_config=LoraConfig(...), "
            "or a model from peft.get_peft_model."
        )
    processing = trainer.processing_class
    processing = getattr(processing, "tokenizer", processing)  # a multimodal processor has one
    settings.setdefault("tokenizer", processing if hasattr(processing, "get_vocab") else None)
    if accelerator.mixed_precision == "bf16":
        settings.setdefault("autocast", torch.bfloat16)
    settings.setdefault("gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)
    settings.setdefault("seed", trainer.args.seed)
    adapter = GatedAdapter(model)
    if trainer.train_dataset is None:
        raise ConfigError("trainer: has no train_dataset. Give it the one it was trained with.")
    if save:
        _save_adapter(trainer, folder, adapter)
    with seeded(settings["seed"]):  # accelerate's sampler takes its seed when it is made
        batches = trainer.get_train_dataloader()
    with _losses(trainer, model, settings["gradient_accumulation_steps"]) as loss:
        try:
            gates = train_gates(model, batches, loss=loss, **settings)
        except CheckpointError as error:
            raise TrainingError(
                f"{type(trainer).__name__}: what it checkpoints is another thing the second time "
                f"({first_line(error)}). Turn gradient_checkpointing off for the gates."
            ) from error
    if save and accelerator.is_main_process:
        _save_gates(gates, folder)
    accelerator.wait_for_everyone()
    return gates


def _save_adapter(trainer: Any, folder: Path, adapter: GatedAdapter) -> None:
    """Save the adapter, and make sure that gates can be saved beside it."""
    wanted = adapter_hash(adapter.modules())
    trainer.save_model(str(folder))
    found: list[Any] = [None]
    if trainer.accelerator.is_main_process:
        try:
            _, modules = read_adapter(folder)
            if adapter_hash(modules) != wanted:
                raise IncompatibleExpertError(
                    f"{folder}: the trainer saved its adapter in another dtype, or another adapter "
                    "than the one it trained, so gates would not belong to it. Save it as it is in "
                    "memory."
                )
        except PhatgooseError as error:
            found = [error]
    broadcast_object_list(found)  # else the other processes would wait for this one
    if found[0] is not None:
        raise found[0]


def _save_gates(gates: Gates, folder: Path) -> None:
    """Save gates beside their adapter, else into a folder beside that; they took long to train."""
    try:
        gates.save(folder)
    except (PhatgooseError, OSError) as error:
        spare = folder.resolve().with_name(f"{folder.resolve().name}-gates")
        spare.mkdir(parents=True, exist_ok=True)
        gates.write(spare)
        raise TrainingError(
            f"{folder}: the gates are trained, but could not be saved there ({error}). They are in "
            f"{spare}: put the file beside the adapter that they were made for."
        ) from error


@contextmanager
def _losses(trainer: Any, model: Any, accumulated: int) -> Iterator[Any]:
    """The trainer's loss as `train_gates` wants it; the trainer is as before afterwards.

    GRPO and RLOO sample answers for several steps at once, and count the steps themselves.
    """
    rollouts = hasattr(trainer, "_buffered_inputs")
    own = ("_step", "_buffered_inputs", "current_gradient_accumulation_steps")
    before = {name: getattr(trainer, name) for name in own if hasattr(trainer, name)}
    if rollouts:
        trainer._step, trainer._buffered_inputs = 0, None
        trainer.current_gradient_accumulation_steps = accumulated

    def value(batch: Any) -> Tensor:
        if not rollouts:
            return trainer.compute_loss(model, batch)  # type: ignore[no-any-return]
        training, model.training = model.training, True  # of the model alone, not of its layers
        try:
            loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
        finally:
            model.training = training
        trainer._step += 1
        return loss * accumulated  # type: ignore[no-any-return] # it is divided once already

    def loss(_: nn.Module, batch: Any) -> Tensor:
        try:
            with trainer.compute_loss_context_manager():
                return value(batch)
        except (PhatgooseError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a trainer of which we know nothing
            raise TrainingError(
                f"{type(trainer).__name__}: its loss cannot be computed after its training "
                f"({type(error).__name__}: {first_line(error)}). Give batches, and a loss if it is "
                "not the model's own: phatgoose.train_gates(model, batches, loss=...)"
            ) from error

    try:
        yield loss
    finally:
        for name, kept in before.items():
            setattr(trainer, name, kept)
