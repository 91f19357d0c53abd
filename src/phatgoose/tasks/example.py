"""A prompt and its reference answer, as texts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One prompt with its reference answer."""

    prompt: str  # the inputs, with the separator after them
    target: str
    choices: tuple[str, ...] | None = None  # the answers to choose from, `target` among them
