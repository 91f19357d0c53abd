"""Many experts, some at a time."""

from collections.abc import Iterator, Sequence
from hashlib import sha256

from phatgoose.errors import ConfigError


def in_groups(names: Sequence[str], together: int | None) -> Iterator[list[str]]:
    """The names in turn, so many at a time; ConfigError if that is below one."""
    if together is not None and together < 1:
        raise ConfigError(f"together must be at least 1, got {together}.")
    size = together or max(1, len(names))
    for start in range(0, len(names), size):
        yield list(names[start : start + size])


def group_name(names: Sequence[str]) -> str:
    """A short name for a group's files."""
    return sha256(repr(list(names)).encode()).hexdigest()[:12]
