"""How tokens choose among experts."""

import functools
import logging
import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from phatgoose.errors import ConfigError
from phatgoose.ops import Choosing, backend_names
from phatgoose.ops.choose import Scale
from phatgoose.routers import Router

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RoutingSettings:
    """The knobs of routing. Defaults are the published ones (arXiv:2402.05859, section 3.2)."""

    top_k: int | Literal["all"] = 2
    temperature: float = 1.0  # divides the kept scores before their softmax
    scale: Scale = "softmax"  # "unit": every kept expert at weight 1, as its adapter was trained
    null_score: float | None = None  # score of "no expert"; None leaves it out, as published
    backend: str = "auto"  # what computes a routed layer; see ops.choose_backend

    def __post_init__(self) -> None:
        if self.top_k != "all" and not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise ConfigError(
                f'top_k must be at least 1, got {self.top_k!r} ("all" keeps every expert).'
            )
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"temperature must be above 0 and finite, got {self.temperature}.")
        if self.scale not in get_args(Scale):
            raise ConfigError(f"scale must be one of {get_args(Scale)}, got {self.scale!r}.")
        if self.backend not in backend_names():
            raise ConfigError(f"backend must be one of {backend_names()}, got {self.backend!r}.")
        if self.null_score is not None and not math.isfinite(self.null_score):
            raise ConfigError(f"null_score must be finite, got {self.null_score}.")

    @classmethod
    def of(cls, router: Router, **given: Any) -> "RoutingSettings":
        """The router's own settings (`Router.defaults`) where `given` ones are None or missing."""
        chosen = {name: value for name, value in given.items() if value is not None}
        return cls(**{**router.defaults, **chosen})

    def kept(self, candidates: int) -> int:
        """How many experts a token keeps at most, of so many candidates."""
        return candidates if self.top_k == "all" else self.top_k

    def choosing(self, slots: int) -> Choosing:
        """The settings as operators take them, for a bank of so many slots."""
        unit = self.scale == "unit"
        return Choosing(self.kept(slots), self.temperature, unit, self.null_score)

    def note_size(self, experts: int) -> None:
        """Log, once a process, if a pool of so many experts has fewer than top_k."""
        if self.top_k != "all" and experts < self.top_k:
            _say_fewer(self.top_k, experts)


KNOBS = tuple(each.name for each in fields(RoutingSettings) if each.name != "backend")


@functools.cache
def _say_fewer(top_k: object, experts: int) -> None:
    log.warning("top_k is %s and the pool has %d expert(s): each token uses all.", top_k, experts)
