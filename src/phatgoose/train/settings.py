"""Settings of the gate phase."""

from dataclasses import dataclass

from phatgoose.errors import ConfigError


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
