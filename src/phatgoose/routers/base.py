"""What a router is."""

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from phatgoose.errors import ConfigError
from phatgoose.experts import Expert
from phatgoose.types import TokenContext


class Router(ABC):
    """Offline, one signature per expert and site; online, a score per token and expert.

    A new router is a subclass with a `name`; `route(model, pool, router="name")` then finds it.
    """

    name: ClassVar[str]
    # Whether `score` is s · standardised x / sqrt(I), which kernels compute and choose in one go.
    standardises: ClassVar[bool] = False
    _known: ClassVar[dict[str, type["Router"]]] = {}

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            Router._known[cls.name] = cls

    @abstractmethod
    def signature(self, expert: Expert, module: str) -> Float[Tensor, " I"]:
        """What is kept of `expert` at `module`, in fp32, ready to score with.

        Raises MissingGateError where the expert lacks what the router needs.
        """

    @abstractmethod
    def score(
        self, x: Float[Tensor, "T I"], signatures: Float[Tensor, "E I"]
    ) -> Float[Tensor, "T E"]:
        """Score every token against every expert of the site, in fp32."""

    def prior(self, context: TokenContext, experts: list[Expert]) -> Float[Tensor, "T E"] | None:
        """Scores from the context alone, added to those of every module; None means no prior.

        T is the B * L tokens of this forward, row after row; E counts all experts of the pool.
        `context.ids` also holds the tokens already in the KV cache. Called once per
        forward; of an encoder-decoder once per stream: encoder, decoder, encoder states as seen by
        cross-attention.
        """
        return None


def make_router(router: "str | Router") -> Router:
    """A router by name, or the one given. Raises ConfigError for an unknown name."""
    if isinstance(router, Router):
        return router
    if router not in Router._known:
        known = ", ".join(sorted(Router._known))
        raise ConfigError(f"router: no router is called {router!r}. Choose from: {known}.")
    return Router._known[router]()
