"""The kinds of adapters: a literal list, and which of them some tensors are."""

from collections.abc import Iterable, Mapping
from typing import Any

from phatgoose.experts.delta import Delta
from phatgoose.experts.embeddings import EmbeddingLora, TokenRows
from phatgoose.experts.initial import InitialLora
from phatgoose.experts.lora_parts import LoraParts
from phatgoose.experts.low_rank import LoraModule
from phatgoose.experts.parameters import ParameterLora
from phatgoose.experts.saved import SavedModule

# The first that fits is taken.
DELTAS: list[type[Delta]] = [
    ParameterLora,
    InitialLora,
    LoraModule,
    LoraParts,
    EmbeddingLora,
    TokenRows,
    SavedModule,
]


def kind_of(keys: Iterable[str], module: str, config: Mapping[str, Any]) -> type[Delta] | None:
    """The kind of a module with exactly these tensors."""
    found = frozenset(keys)
    return next((kind for kind in DELTAS if kind.fits(found, module, config)), None)


def split_key(key: str) -> tuple[str, str] | None:
    """The module's name and the rest of a tensor's key; None where no kind has such a tensor."""
    suffixes = {suffix for kind in DELTAS for suffix in kind.keys | kind.optional}
    for suffix in sorted(suffixes, key=len, reverse=True):  # "weight" ends others, too
        if key.endswith("." + suffix):
            module = key[: -len(suffix) - 1]
            # A tensor such as lora_A.other.weight is not of a module called so.
            inside = any(part.startswith("lora_") for part in module.split("."))
            return None if inside else (module, suffix)
    return None


def supported_fields() -> set[str]:
    """Fields of adapter_config.json that some kind stands for."""
    return {field for kind in DELTAS for field in kind.fields}
