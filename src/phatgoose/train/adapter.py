"""Training a LoRA adapter on examples: PEFT for the layers, transformers.Trainer for the loop."""

import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from phatgoose.errors import ConfigError
from phatgoose.tasks import Encoded, collate

SaveDtype = Literal["float32", "bfloat16"]
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class AdapterTraining:
    """Settings of the adapter phase."""

    rank: int = 8
    alpha: int = 16
    target_modules: str | list[str] = "all-linear"
    dropout: float = 0.0
    steps: int = 500
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_ratio: float = 0.06
    weight_decay: float = 0.0
    seed: int = 0
    bf16: bool = False  # run the model under bf16 autocast
    save_dtype: SaveDtype = "float32"

    def __post_init__(self) -> None:
        for field in ("rank", "alpha", "steps", "batch_size", "learning_rate"):
            if not getattr(self, field) > 0:
                raise ConfigError(f"{field} must be above 0, got {getattr(self, field)}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be at least 0 and below 1, got {self.dropout}.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be between 0 and 2**32 - 1, got {self.seed}.")
        if not 0 <= self.warmup_ratio <= 1:
            raise ConfigError(f"warmup_ratio must be between 0 and 1, got {self.warmup_ratio}.")
        if self.save_dtype not in get_args(SaveDtype):
            raise ConfigError(
                f"save_dtype must be one of {get_args(SaveDtype)}, got {self.save_dtype!r}."
            )

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup_ratio * self.steps)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from zero, as transformers.Trainer has it."""
        if step < self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def lora_config(self, *, seq2seq: bool) -> Any:
        """PEFT's LoraConfig for it."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
        )


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
    from peft import get_peft_model
    from transformers import PrinterCallback, Trainer, TrainingArguments

    settings = settings or AdapterTraining()
    if not encoded:
        raise ConfigError("train_adapter: there are no examples to train on. Give at least one.")
    seq2seq = bool(model.config.is_encoder_decoder)
    torch.manual_seed(settings.seed)
    peft_model = get_peft_model(model, settings.lora_config(seq2seq=seq2seq))
    trainer = Trainer(
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
    peft_model.save_pretrained(str(output_dir))
    for parameter in adapter:
        parameter.data = parameter.data.to(torch.float32)
    return peft_model
