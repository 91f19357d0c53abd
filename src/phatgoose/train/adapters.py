"""Trains LoRAs: one with transformers.Trainer, or many in one pass over the base."""

import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import torch

from phatgoose.errors import ConfigError, first_line
from phatgoose.experts import LoraModule
from phatgoose.experts.base import base_name
from phatgoose.experts.lora import lora_of, read_adapter, write_adapter
from phatgoose.files import new_folder
from phatgoose.tasks import Encoded, collate
from phatgoose.train.gated_adapter import lora_layers
from phatgoose.train.joint.groups import AdapterGroup, in_groups
from phatgoose.train.joint.model import check_model
from phatgoose.train.loop.placement import place
from phatgoose.train.loop.run import Run
from phatgoose.train.loop.seeding import seeded
from phatgoose.train.loop.stream import Batch
from phatgoose.train.loop.targets import batch_losses
from phatgoose.train.settings import MAX_GRAD_NORM, AdapterTraining

Modules = dict[str, LoraModule]


def train_adapter(
    model: Any,
    encoded: Sequence[Encoded],
    output_dir: str | Path,
    settings: AdapterTraining | None = None,
    *,
    pad: int,
    progress: bool = True,
) -> Any:
    """Train a LoRA on encoded examples and save it to `output_dir`; return the PeftModel.

    The loss is on the targets. Linear warm-up, then cosine decay to zero. The matrices are trained
    in fp32; if saved in bf16, the model keeps the rounded values too, so that gates trained next
    belong to exactly what is on disk.
    """
    from transformers import PrinterCallback, TrainingArguments

    settings = settings or AdapterTraining()
    if not encoded:
        raise ConfigError("train_adapter: there are no examples to train on. Give at least one.")
    seq2seq = bool(model.config.is_encoder_decoder)
    torch.manual_seed(settings.seed)
    peft_model = _with_lora(model, settings)
    _check_savable(peft_model)
    trainer = _trainer_class()(
        model=peft_model,
        args=TrainingArguments(
            output_dir=str(output_dir),
            max_steps=settings.steps,
            per_device_train_batch_size=min(settings.batch_size, len(encoded)),
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=settings.warmup_steps,
            weight_decay=settings.weight_decay,
            max_grad_norm=MAX_GRAD_NORM,
            seed=settings.seed,
            bf16=settings.bf16,
            use_cpu=next(model.parameters()).device.type == "cpu",
            save_strategy="no",
            report_to="none",
            logging_steps=max(1, settings.steps // 20),
            disable_tqdm=not progress,
            remove_unused_columns=False,
        ),
        train_dataset=list(encoded),  # type: ignore[arg-type]
        data_collator=lambda rows: collate(rows, pad=pad, seq2seq=seq2seq),
    )
    if not progress:
        trainer.remove_callback(PrinterCallback)
    with redirect_stdout(sys.stderr):  # where the Trainer prints its losses
        trainer.train()
    adapter = [p for p in peft_model.parameters() if p.requires_grad]
    dtype = getattr(torch, settings.save_dtype)
    for parameter in adapter:
        parameter.data = parameter.data.to(dtype)
    with _replaced(Path(output_dir)) as partial:
        peft_model.save_pretrained(str(partial))
    for parameter in adapter:
        parameter.data = parameter.data.to(torch.float32)
    return peft_model


def _trainer_class() -> Any:
    """transformers.Trainer, with logits only where there are labels."""
    from transformers import Trainer

    class TargetTrainer(Trainer):
        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            alone = self.accelerator.num_processes == 1 and self.args.n_gpu <= 1
            losses = batch_losses(model, inputs) if alone and not return_outputs else None
            if losses is None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if num_items_in_batch is None or not self.model_accepts_loss_kwargs:
                return losses.mean()
            return losses.sum() / num_items_in_batch

    return TargetTrainer


def train_adapters_together(
    model: Any,
    tasks: Mapping[str, Sequence[Encoded]],
    output_dir: str | Path,
    settings: AdapterTraining | None = None,
    *,
    pad: int,
    together: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Modules]:
    """Train a LoRA for each task, all at once; each is what `train_adapter` gives for it alone.

    Initial values, order of the examples, schedule, clipping and rounding are `train_adapter`'s,
    with the settings `settings.of_expert(name)`; with dropout the draws differ. Each adapter is
    saved to a PEFT folder in `output_dir`, named like its task. Returns the modules, which
    `train_gates_together` takes.

    Args:
        model: the plain transformers base, decoder-only or encoder-decoder; comes back unchanged.
        tasks: encoded examples by the task's name.
        together: how many to train at once, the others after them; default: all.
        checkpoint: a folder to save progress in, and to go on from.

    Raises:
        ConfigError: a task without examples, a setting out of range, or a model that is refused.
        TrainingError: a task's loss is not finite; it is named, and none has been updated.
    """
    settings = settings or AdapterTraining()
    _check_tasks(tasks)
    check_model(model)
    groups = list(in_groups(list(tasks), together))
    autocast = torch.bfloat16 if settings.bf16 else None
    run = Run.start(autocast=autocast, checkpoint=checkpoint, progress=progress)
    place(model, run.accelerator)
    own = {name: settings.of_expert(name) for name in tasks}
    common, config = _initial(model, settings)
    seq2seq = bool(model.config.is_encoder_decoder)
    modules: dict[str, Modules] = {}
    for number, names in enumerate(groups, start=1):
        first = [_initial(model, own[n])[0] if settings.seed_each else common for n in names]
        group = AdapterGroup(model, first, names, settings, run)
        examples = {name: tasks[name] for name in names}
        group.train(
            {
                name: _batches(encoded, own[name], pad=pad, seq2seq=seq2seq)
                for name, encoded in examples.items()
            },
            identity={"set of examples": sha256(repr(examples).encode()).hexdigest()},
            numbered=f" {number}/{len(groups)}" if len(groups) > 1 else "",
        )
        for expert, name in enumerate(names):
            modules[name] = group.modules(expert)
            if run.accelerator.is_main_process:
                _save(Path(output_dir) / name, config, modules[name])
    run.accelerator.wait_for_everyone()
    return {
        name: {site: LoraModule(m.a.float(), m.b.float(), m.scale) for site, m in found.items()}
        for name, found in modules.items()
    }


def _check_tasks(tasks: Mapping[str, Sequence[Encoded]]) -> None:
    if not tasks:
        raise ConfigError("tasks: there are none to train. Give at least one.")
    for name, encoded in tasks.items():
        if not encoded:
            raise ConfigError(f"{name}: there are no examples to train on. Give at least one.")


def _with_lora(model: Any, settings: AdapterTraining) -> Any:
    """A PeftModel with a new LoRA; ConfigError where the model has no layer of the names wanted."""
    from peft import get_peft_model

    seq2seq = bool(model.config.is_encoder_decoder)
    try:
        return get_peft_model(model, settings.lora_config(seq2seq=seq2seq))
    except ValueError as error:
        raise ConfigError(
            f"target_modules: {settings.target_modules} cannot be adapted in "
            f"{type(model).__name__} ({first_line(error)}). Give the last parts of the names of "
            "linear layers."
        ) from error


def _check_savable(peft_model: Any) -> None:
    """Refuse an adapter that could have no gates, or not be read again, before it is trained."""
    for _ in lora_layers(peft_model, "default"):
        pass
    with tempfile.TemporaryDirectory() as folder:
        peft_model.save_pretrained(folder)
        read_adapter(Path(folder))


def _initial(model: Any, settings: AdapterTraining) -> tuple[Modules, dict[str, Any]]:
    """The adapter as PEFT initialises it on this model, and its config; the model is as before."""
    from peft.tuners.lora import LoraLayer

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with seeded(settings.seed):
        peft_model = _with_lora(model, settings)
    try:
        layers = {
            base_name(path): layer
            for path, layer in peft_model.named_modules()
            if isinstance(layer, LoraLayer)
        }
        modules = {site: lora_of(layer, "default") for site, layer in layers.items()}
        config = {**peft_model.peft_config["default"].to_dict(), "inference_mode": True}
    finally:
        peft_model.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config
        for parameter in trainable:
            parameter.requires_grad_(True)
    return modules, config


def _batches(
    encoded: Sequence[Encoded], settings: AdapterTraining, *, pad: int, seq2seq: bool
) -> Iterator[Batch]:
    """Batches without end, in the order in which transformers.Trainer takes them."""
    generator = torch.Generator()
    for epoch in count():
        generator.manual_seed(settings.seed + epoch)
        order = torch.randperm(len(encoded), generator=generator).tolist()
        for start in range(0, len(order), settings.batch_size):
            rows = [encoded[i] for i in order[start : start + settings.batch_size]]
            yield collate(rows, pad=pad, seq2seq=seq2seq)


def _save(folder: Path, config: Mapping[str, Any], modules: Mapping[str, LoraModule]) -> None:
    """Write an adapter into a new folder, or in place of the one that is there."""
    with _replaced(folder) as partial:
        write_adapter(partial, config, modules)


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A folder to write an adapter into, which takes the place of `folder`; other files stay."""
    with new_folder(folder, replace=True) as partial:
        if folder.is_dir():
            shutil.copytree(folder, partial, dirs_exist_ok=True)
        yield partial
