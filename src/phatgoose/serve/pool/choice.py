"""What one request asks of the pool: JSON in `SamplingParams.extra_args["phatgoose"]`."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from phatgoose.errors import ConfigError
from phatgoose.nn import Choice
from phatgoose.nn.choice import KEYS as CHOICE_KEYS

KEYS = (*CHOICE_KEYS, "routing")
REPORTS = ("shares", "tokens")


@dataclass(frozen=True, kw_only=True)
class Request(Choice):
    """A choice, and what is reported of the experts that served.

    Raises ConfigError if it contradicts itself.
    """

    routing: Literal["shares", "tokens"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.routing is not None and self.routing not in REPORTS:
            raise ConfigError(
                f"phatgoose: routing must be one of {', '.join(REPORTS)}, got {self.routing!r}."
            )

    @classmethod
    def read(cls, text: Any) -> "Request":
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
        return cls(**{key: value for key, value in given.items() if value is not None})

    def text(self) -> str:
        """The JSON that `read` reads."""
        return json.dumps(_said(self))

    def check_room(self, pool: Mapping[str, Any]) -> None:
        """Raise ConfigError where a server that started so cannot do what is asked.

        `pool` is what `phatgoose_pool` returned.
        """
        most = pool["mixture"]
        if self.is_own and not most:
            raise ConfigError(
                "phatgoose: this server takes no weights, scale, top_k or temperature of requests. "
                'Start it with room for them: phatgoose serve --max-mixture, or "max_mixture" in '
                "additional_config."
            )
        self.check_router(scale=pool["scale"])
        if not self.is_own:
            return
        kept = pool["capacity"] if self.top_k == "all" else self.top_k or 0
        for what, count in (("weights", len(self.weights or ())), ("top_k", kept)):
            if count > most:
                raise ConfigError(
                    f"phatgoose: {what} asks for {count} experts, and this server has room for "
                    f"{most} a request. Ask for fewer, or start it with a larger max_mixture."
                )

    def salt(self, pool: dict[str, Any], own: str = "") -> str:
        """A `cache_salt` for vLLM: prompts cached under other experts are not this request's.

        `pool` is what `phatgoose_pool` returned, `own` a salt the caller has already.
        Raises what `routed` raises.
        """
        made_of: list[Any] = [pool["fingerprint"], self.routed(_names(pool)), own]
        if self.is_own:
            knobs = {"scale": self.scale, "top_k": self.top_k, "temperature": self.temperature}
            made_of += [sorted((self.weights or {}).items()), knobs]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _names(pool: Mapping[str, Any]) -> list[str]:
    return [expert["name"] for expert in pool["experts"]]


def _said(request: Request) -> dict[str, Any]:
    """The settings that are not as they would be anyway."""
    usual = asdict(Request())
    return {key: value for key, value in asdict(request).items() if value != usual[key]}
