"""Settings of the adapter phase and of the gate phase. Nothing heavy is imported here."""

import math
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Literal, get_args

from phatgoose.errors import ConfigError

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
    seed_each: bool = False  # for many at once: each a seed of its own, from `seed` and its name
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

    def of_expert(self, name: str) -> "AdapterTraining":
        """The settings that give one of many experts the same result if it is trained alone."""
        if not self.seed_each:
            return self
        digest = sha256(f"{self.seed} {name}".encode()).digest()
        return replace(self, seed=int.from_bytes(digest[:4], "little"), seed_each=False)

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
        """Make PEFT's LoraConfig of these settings."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
        )


@dataclass(frozen=True, kw_only=True)
class GateTraining:
    """Settings of the gate phase; defaults as published (arXiv:2402.05859, section 4 and code)."""

    steps: int = 100
    learning_rate: float = 5e-3  # published with batches of 1024 sequences
    warmup_ratio: float = 0.06  # linear, then constant
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    gradient_accumulation_steps: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}.")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be above 0, got {self.learning_rate}.")
        if not 0 <= self.warmup_ratio <= 1:
            raise ConfigError(f"warmup_ratio must be between 0 and 1, got {self.warmup_ratio}.")
        if not self.max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm must be above 0, got {self.max_grad_norm}.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be between 0 and 2**32 - 1, got {self.seed}.")
        if self.gradient_accumulation_steps < 1:
            raise ConfigError(
                "gradient_accumulation_steps must be at least 1, got "
                f"{self.gradient_accumulation_steps}."
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from zero."""
        warmup = max(1, round(self.warmup_ratio * self.steps))
        return self.learning_rate * min(1.0, (step + 1) / warmup)


@dataclass(frozen=True, kw_only=True)
class SignatureMeasuring:
    """How much of an expert's data signatures are measured on."""

    examples: int = 256
    batch_size: int = 16
    seed: int = 0
