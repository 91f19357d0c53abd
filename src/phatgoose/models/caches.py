"""What transformers calls a KV cache: its name has changed, and may again."""

import inspect
from collections.abc import Callable
from typing import Any

from phatgoose.errors import ConfigError

CACHE_ARGUMENTS = ("cache", "past_key_values")  # the latter until transformers 5.23


def cache_argument(function: Callable[..., Any]) -> str:
    """The name under which a transformers function takes a KV cache.

    Under another name the cache would go into `**kwargs`, and might be ignored without a word.
    Raises ConfigError where it takes none by a name that we know.
    """
    known = inspect.signature(function).parameters
    for name in CACHE_ARGUMENTS:
        if name in known:
            return name
    raise ConfigError(
        f"{getattr(function, '__qualname__', function)}: takes no KV cache as "
        f"{' or '.join(CACHE_ARGUMENTS)}, but {', '.join(known)}. Do without one (evaluation: "
        "share_prompts=False), or tell us of the model."
    )


def cache_of(model: Any, output: Any) -> Any:
    """The KV cache among a forward's outputs, by what it can do; ConfigError without one."""
    for value in output.values():
        if hasattr(value, "get_seq_length") and hasattr(value, "batch_select_indices"):
            return value
    raise ConfigError(
        f"{type(model).__name__}: its output has no KV cache, only {', '.join(output)}. Do without "
        "one (evaluation: share_prompts=False)."
    )
