"""What one row of a batch, or one request, asks of the pool."""

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from phatgoose.errors import ConfigError

LARGEST = torch.finfo(torch.float32).max  # weights are kept in fp32


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which experts answer a sequence, and how strongly. Without any setting the router decides.

    Raises ConfigError for a number out of range, and for settings that contradict each other.
    """

    allow: tuple[str, ...] | None = None  # what the router chooses among; None: the whole pool
    deny: tuple[str, ...] = ()  # what it does not choose
    base: bool = False  # no expert at all
    # A fixed mixture, in the router's place: Σ w_e · scale_e · B_e A_e of any number of experts.
    weights: Mapping[str, float] | None = field(default=None, hash=False)
    scale: float | None = None  # multiplies all that experts add; None: 1
    top_k: int | Literal["all"] | None = None  # experts per token and layer; None: the pool's
    temperature: float | None = None  # of the softmax; None: the pool's

    def __post_init__(self) -> None:
        if self.allow is not None:
            object.__setattr__(self, "allow", _names("allow", self.allow))
        object.__setattr__(self, "deny", _names("deny", self.deny))
        if self.weights is not None:
            object.__setattr__(self, "weights", _weights(self.weights))
        self._check_numbers()
        self._check_whole()

    def _check_numbers(self) -> None:
        if not isinstance(self.base, bool):
            raise ConfigError(f"base must be true or false, got {_short(self.base)}.")
        if self.scale is not None:
            object.__setattr__(self, "scale", _number("scale", self.scale))
        if self.temperature is not None:
            temperature = _number("temperature", self.temperature)
            object.__setattr__(self, "temperature", temperature)
            if not torch.tensor(temperature, dtype=torch.float32) > 0:
                raise ConfigError(f"temperature must be above 0, got {temperature}.")
        top_k = self.top_k
        if top_k not in (None, "all") and not (type(top_k) is int and top_k >= 1):
            raise ConfigError(
                f'top_k must be a whole number, at least 1, or "all", got {_short(top_k)}.'
            )
        if max(self.mixture().values(), default=0.0) > LARGEST:
            raise ConfigError("weights times scale is more than float32 holds.")

    def _check_whole(self) -> None:
        """Raise ConfigError where one setting leaves another without a meaning."""
        if self.allow == ():
            raise ConfigError('"allow" is empty. Ask for {"base": true}, or name some.')
        if self.base and (self.allow is not None or self.deny):
            raise ConfigError('"base" leaves out every expert, so name none beside it.')
        own = [name for name in ("weights", *OWN) if getattr(self, name) is not None]
        if self.base and own:
            raise ConfigError(
                f'"base" leaves out every expert, so {own[0]} has no meaning beside it.'
            )
        router = [name for name in own if name not in ("weights", "scale")]
        router += [name for name in ("allow", "deny") if getattr(self, name)]
        if self.weights is not None and router:
            raise ConfigError(
                f"weights fix the mixture and the router is not asked, so {router[0]} "
                "has no meaning beside them. Leave one of the two out."
            )

    @property
    def is_own(self) -> bool:
        """Whether it asks for more than a smaller pool."""
        return self.weights is not None or any(getattr(self, name) is not None for name in OWN)

    def mixture(self) -> dict[str, float]:
        """The weights times the scale."""
        scale = 1.0 if self.scale is None else self.scale
        return {name: weight * scale for name, weight in (self.weights or {}).items()}

    def routed(self, names: Sequence[str]) -> list[str]:
        """Those of the pool's experts that may serve, in the pool's order.

        Raises ConfigError for experts that are not there, and if none is left.
        """
        for name in (*(self.allow or ()), *self.deny, *(self.weights or ())):
            if name not in names:
                raise ConfigError(
                    f"{name}: no expert of this name in the pool. It has: {', '.join(names)}."
                )
        if self.base:
            return []
        if self.weights is not None:
            return [name for name in names if name in self.weights]
        left = [n for n in names if (self.allow is None or n in self.allow) and n not in self.deny]
        if names and not left:
            raise ConfigError('"deny" leaves no expert. Ask for {"base": true} if that is meant.')
        return left

    def check_router(self, *, scale: str) -> None:
        """Raise ConfigError for a setting that changes nothing where experts are weighed so."""
        if self.temperature is not None and scale == "unit":
            raise ConfigError(
                'with scale="unit" every chosen expert has weight 1, so temperature '
                "changes nothing. Leave it out."
            )


OWN = ("scale", "top_k", "temperature")
KEYS = tuple(each.name for each in fields(Choice))


def _names(key: str, given: Iterable[Any]) -> tuple[str, ...]:
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        raise ConfigError(f"{key} must be a list of experts' names, got {_short(given)}.")
    return tuple(given)


def _weights(given: Any) -> dict[str, float]:
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ConfigError(
            f'weights must be experts\' names with numbers, {{"name": 0.7}} for '
            f"example, got {_short(given)}."
        )
    if not given:
        raise ConfigError("weights are empty. Name an expert, or ask for the base.")
    return {name: _number(f"the weight of {name}", value) for name, value in given.items()}


def _number(what: str, value: Any) -> float:
    if type(value) is bool or not isinstance(value, numbers.Real):
        raise ConfigError(f"{what} must be a number, got {_short(value)}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not 0 <= number <= LARGEST:  # NaN is not
        raise ConfigError(f"{what} must be at least 0 and finite, got {_short(value)}.")
    return number


def _short(value: Any, most: int = 100) -> str:
    """A value as one line of an error has it."""
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."
