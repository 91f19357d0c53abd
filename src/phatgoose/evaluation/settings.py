"""Settings of an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

from phatgoose.errors import ConfigError


@dataclass(frozen=True)
class RunSettings:
    """How an evaluation computes. Sizes are those of the device unless given."""

    seed: int = 0  # of the stream's order and of the intervals
    limit: int | None = None  # examples a task, as `read_tasks` was given it; only noted
    general: Sequence[str] = ()  # adapters subtracted from every expert before; only noted
    share_prompts: bool = True
    tokens: int | None = None  # a batch of ranking, padding counted (131072; cpu 8192)
    rows: int | None = None  # a batch of generation (1024; cpu 64)
    part: int | None = None  # examples computed between saves (16384; cpu 1024)
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("limit", "tokens", "rows", "part"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")

    def sizes(self, device: str) -> dict[str, int]:
        usual = (8192, 64, 1024) if device == "cpu" else (131_072, 1024, 16_384)
        given = (self.tokens, self.rows, self.part)
        names = ("tokens", "rows", "part")
        return {n: g or u for n, g, u in zip(names, given, usual, strict=True)}
