"""What one request asks of the pool: JSON in `SamplingParams.extra_args["phatgoose"]`."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from phatgoose.errors import ConfigError

KEYS = ("allow", "deny", "base", "routing")
REPORTS = ("shares", "tokens")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which experts may serve a request, and what is reported of those that did.

    Raises ConfigError if it contradicts itself.
    """

    allow: tuple[str, ...] | None = None  # None: all of the pool
    deny: tuple[str, ...] = ()
    base: bool = False  # no expert at all
    routing: Literal["shares", "tokens"] | None = None

    def __post_init__(self) -> None:
        if self.allow == ():
            raise ConfigError('phatgoose: "allow" is empty. Ask for {"base": true}, or name some.')
        if self.base and (self.allow is not None or self.deny):
            raise ConfigError('phatgoose: "base" leaves out every expert, so name none beside it.')
        if self.routing is not None and self.routing not in REPORTS:
            raise ConfigError(
                f"phatgoose: routing must be one of {', '.join(REPORTS)}, got {self.routing!r}."
            )

    @classmethod
    def read(cls, text: Any) -> "Choice":
        """Parse the JSON, or take it parsed. Raises ConfigError for what is not understood."""
        try:
            given = json.loads(text) if isinstance(text, str) else text
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"phatgoose: the request's settings are no JSON ({error}).") from None
        if not isinstance(given, dict):
            raise ConfigError(
                f"phatgoose: a request's settings are a JSON object, got {type(given).__name__}."
            )
        for key in given:
            if key not in KEYS:
                raise ConfigError(
                    f"phatgoose: a request has no setting {key!r}. Choose from: {', '.join(KEYS)}."
                )
        if not isinstance(given.get("base") or False, bool):
            raise ConfigError(f"phatgoose: base must be true or false, got {given['base']!r}.")
        allow = given.get("allow")
        return cls(
            allow=None if allow is None else _names("allow", allow),
            deny=_names("deny", given.get("deny") or []),
            base=bool(given.get("base")),
            routing=given.get("routing"),
        )

    def text(self) -> str:
        """The JSON that `read` reads."""
        return json.dumps({key: value for key, value in asdict(self).items() if value})

    def routed(self, names: Sequence[str]) -> list[str]:
        """Those of the pool's experts that may serve the request, in the pool's order.

        Raises ConfigError for experts that are not there, and if none is left.
        """
        for name in (*(self.allow or ()), *self.deny):
            if name not in names:
                raise ConfigError(
                    f"{name}: no expert of this name in the pool. It has: {', '.join(names)}."
                )
        if self.base:
            return []
        left = [n for n in names if (self.allow is None or n in self.allow) and n not in self.deny]
        if names and not left:
            raise ConfigError(
                'phatgoose: "deny" leaves no expert. Ask for {"base": true} if that is meant.'
            )
        return left

    def salt(self, pool: dict[str, Any], own: str = "") -> str:
        """A `cache_salt` for vLLM: prompts cached under other experts are not this request's.

        `pool` is what `phatgoose_pool` returned, `own` a salt the caller has already.
        Raises what `routed` raises.
        """
        routed = self.routed([expert["name"] for expert in pool["experts"]])
        made_of = json.dumps([pool["fingerprint"], routed, own])
        return hashlib.sha256(made_of.encode()).hexdigest()


def _names(key: str, given: Iterable[Any]) -> tuple[str, ...]:
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        raise ConfigError(f"phatgoose: {key} must be a list of experts' names, got {given!r}.")
    return tuple(given)
