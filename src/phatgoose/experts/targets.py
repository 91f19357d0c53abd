"""Which modules a config's `target_modules` and its kin name, as PEFT reads them."""

from collections.abc import Mapping
from typing import Any

from phatgoose.errors import ExpertFormatError
from phatgoose.experts.patterns import PatternError, Patterns


class Targets:
    """What a config adapts. What it does not say in a way we can match names every module:

    PEFT saved what it had found by it. Such are patterns that `Patterns` does not understand,
    "all-linear", and `layers_pattern`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._with, self._without = (
            _matcher(field, config.get(field)) for field in ("target_modules", "exclude_modules")
        )
        wanted = config.get("target_modules")
        self._in_full = wanted if isinstance(wanted, list) else []
        layers = config.get("layers_to_transform")
        unknown = isinstance(wanted, str) or config.get("layers_pattern") or layers in (None, [])
        self._layers = None if unknown else layers if isinstance(layers, list) else [layers]

    def name(self, module: str) -> bool:
        """Whether PEFT adapts `module`. Raises PatternError where matching takes too long."""
        if self._without is not None and self._without(module):
            return False
        if self._with is not None and not self._with(module):
            return False
        if self._layers is None or module in self._in_full:
            return True
        # PEFT takes the first number that has a dot and one more part before it, and a part behind.
        numbers = [part for part in module.split(".")[2:-1] if part.isdecimal()]
        return bool(numbers) and int(numbers[0]) in self._layers


def _matcher(field: str, said: Any) -> Any:
    """A function of a module's name, or None where nothing can be told."""
    if isinstance(said, list | tuple | set):
        return lambda module: any(module == n or module.endswith(f".{n}") for n in said)
    if said and not isinstance(said, str):
        raise ExpertFormatError(
            f"adapter_config.json: {field} is {said!r}, wanted is a list of names, or one pattern. "
            "Save the adapter again with PEFT."
        )
    if not said or said.lower() == "all-linear":
        return None
    try:
        patterns = Patterns([f"^(?:{said})"])
    except PatternError:
        return None
    return lambda module: patterns.first(module) is not None
