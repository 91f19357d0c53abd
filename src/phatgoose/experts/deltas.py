"""The kinds of adapters: a literal list, and which of them some tensors are."""

from collections.abc import Iterable

from phatgoose.experts.delta import Delta
from phatgoose.experts.low_rank import LoraModule

DELTAS: list[type[Delta]] = [LoraModule]


def kind_of(keys: Iterable[str]) -> type[Delta] | None:
    """The kind that has exactly these tensors at a module."""
    found = frozenset(keys)
    return next((kind for kind in DELTAS if kind.keys == found), None)


def split_key(key: str) -> tuple[str, str] | None:
    """The module's name and the rest of a tensor's key; None where no kind has such a tensor."""
    for suffix in sorted({suffix for kind in DELTAS for suffix in kind.keys}):
        if key.endswith("." + suffix):
            return key[: -len(suffix) - 1], suffix
    return None


def supported_fields() -> set[str]:
    """Fields of adapter_config.json that some kind stands for."""
    return {field for kind in DELTAS for field in kind.fields}
