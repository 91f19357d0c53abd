"""The interface of a router."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from phatgoose.errors import ConfigError, MissingGateError
from phatgoose.experts import Expert
from phatgoose.experts.kinds import KINDS
from phatgoose.routers.running import prior_of
from phatgoose.types import TokenContext

Vectors = dict[str, Tensor]  # by the module's name


@dataclass(frozen=True)
class Measuring:
    """What `Router.measure` has to measure experts with."""

    model: Any  # the bare base
    experts: Sequence[Expert]
    prompts: Mapping[str, Sequence[int]]  # the token ids of an expert's prompts, by its name
    # For each expert and each module that it adapts, the mean over examples of the mean over an
    # example's tokens of the module's input, with the expert applied.
    mean_inputs: Callable[[], list[Vectors]]


class Router(ABC):
    """Keeps one signature for each expert and site, and scores each token against it.

    A new router is a subclass with a `name`; `route(model, pool, router="name")` then finds it.
    """

    name: ClassVar[str]
    # Whether `score` is s · standardised x / sqrt(I), which kernels compute and choose in one go.
    standardises: ClassVar[bool] = False
    # The kind of signature (`experts.kinds`) that every expert must have; None: no kind.
    needs: ClassVar[str | None] = None
    instead: ClassVar[str] = "adapter_evidence or arrow"  # routers for experts that lack it
    # The kind of signature that `measure` makes, if any.
    measures: ClassVar[str | None] = None
    # Of a prior made of `worth`: how much it counts, and whether a token of the prompt knows the
    # rest of it, so that prompts cannot share a prefix in a cache.
    strength: float = 1.0
    ahead: ClassVar[bool] = False
    # Whether `prepare` wants ordinary text as token ids (`take_background`) and cannot do without.
    wants_background: ClassVar[bool] = False
    # Its paper's own settings, by the names of RoutingSettings, where they are not PHATGOOSE's.
    defaults: ClassVar[Mapping[str, Any]] = {}
    _known: ClassVar[dict[str, type["Router"]]] = {}

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            Router._known[cls.name] = cls

    @property
    def has_prior(self) -> bool:
        """Whether to ask for `prior`, which takes knowing the tokens of every forward."""
        return self.weighs_ids or type(self).prior is not Router.prior

    @property
    def weighs_ids(self) -> bool:
        """Whether the prior is `strength` times the running mean of `worth`, and nothing else.

        An engine that batches many requests can keep such a prior, by a sum for each request.
        """
        return type(self).worth is not Router.worth and type(self).prior is Router.prior

    @property
    def scores(self) -> bool:
        """Whether `score` tells experts apart. If not, it is 0 for all of them."""
        return True

    @property
    def prepares_on(self) -> Literal["nothing", "first layer", "base"]:
        """What of the base `prepare` runs."""
        return "nothing" if type(self).prepare is Router.prepare else "base"

    def take_background(self, ids: Int[Tensor, "B L"]) -> None:
        """Take ordinary text. It is called before `prepare`, on routers that want some."""
        return

    def prepare(self, model: nn.Module, experts: Sequence[Expert]) -> None:
        """Measure what you need of the bare model and of the experts about to join.

        It is called before their signatures are asked for.
        """
        return

    @classmethod
    def measure(cls, given: Measuring) -> list[Vectors]:
        """Make the vectors of the kind `measures`, a dictionary for each expert in their order."""
        raise NotImplementedError(f"{cls.__name__} measures nothing")

    def kept(self, expert: Expert) -> Mapping[str, Float[Tensor, " I"]]:
        """The expert's vectors of the kind that this router needs, by module.

        Raises MissingGateError if it has none.
        """
        assert self.needs is not None, f"{self.name} needs no kind"
        found = expert.signatures.get(self.needs)
        if found is not None:
            return found.vectors
        kind = KINDS[self.needs]
        how = (
            f"Make them: {kind.remedy(expert.folder)}"
            if expert.folder
            else f"It was made of other adapters, whose {kind.words} are not its own"
        )
        raise MissingGateError(
            f"{expert.name}: has no {kind.words}, which the router {self.name} needs. {how}. Or "
            f"use a router that does not: {self.instead}."
        )

    @abstractmethod
    def signature(self, expert: Expert, module: str) -> Float[Tensor, " W"]:
        """What is kept of `expert` at `module`, in fp32, ready to score with.

        Mostly it is one vector of the module's input, W = I. A router that keeps more flattens it.
        A site pads shorter ones with zeros at the end. Raises MissingGateError if the expert lacks
        what the router needs.
        """

    @abstractmethod
    def score(
        self, x: Float[Tensor, "T I"], signatures: Float[Tensor, "E W"]
    ) -> Float[Tensor, "T E"]:
        """Score every token against every expert of the site, in fp32. -inf is no candidate."""

    def worth(self, experts: Sequence[Expert]) -> Float[Tensor, "V E"]:
        """What each token id is worth for each expert, in fp32. Its running mean makes the prior.

        The experts are prepared. It is called again and again, so keep what is costly.
        """
        raise NotImplementedError(f"{self.name} weighs no token ids")

    def prior(self, context: TokenContext, experts: list[Expert]) -> Float[Tensor, "T E"] | None:
        """Scores from the context alone, added to those of every module. None means no prior.

        Unless a router says otherwise, they are made of its `worth`, if it has one.

        T counts the B * L tokens of this forward, row after row. E counts all experts of the pool.
        `context.ids` also holds the tokens already in the KV cache. It is called once per forward.
        An encoder-decoder calls it once per stream: encoder, decoder, and encoder states as seen by
        cross-attention.
        """
        if not self.weighs_ids:
            return None
        worth = self.worth(experts).to(context.real.device)
        return prior_of(worth, context, strength=self.strength, ahead=self.ahead, who=self.name)


class Modifier(Router):
    """A router that changes the scores of another. Its name is "ROUTER+MODIFIER"."""

    def __init__(self, inner: Router | None = None) -> None:
        self.inner = inner
        if inner is not None:
            self.defaults = inner.defaults  # type: ignore[misc]  # this instance's own

    def prepare(self, model: nn.Module, experts: Sequence[Expert]) -> None:
        if self.inner is not None:
            self.inner.prepare(model, experts)

    @property
    def has_prior(self) -> bool:
        return self.inner is not None and self.inner.has_prior

    @property
    def weighs_ids(self) -> bool:
        return False

    @property
    def scores(self) -> bool:
        return self.inner is not None and self.inner.scores

    def take_background(self, ids: Int[Tensor, "B L"]) -> None:
        if self.inner is not None:
            self.inner.take_background(ids)

    def prior(self, context: TokenContext, experts: list[Expert]) -> Float[Tensor, "T E"] | None:
        return None if self.inner is None else self.inner.prior(context, experts)


def make_router(router: "str | Router") -> Router:
    """Make a router by its name: "phatgoose", or "phatgoose+evidence" with a modifier.

    A router that is one already is returned as it is.

    Raises ConfigError for an unknown name.
    """
    if isinstance(router, Router):
        return router
    name, *modifiers = router.split("+")
    made = _find(name)()
    for modifier in modifiers:
        kind = _find(modifier)
        if not issubclass(kind, Modifier):
            known = ", ".join(
                n for n, k in sorted(Router._known.items()) if issubclass(k, Modifier)
            )
            raise ConfigError(f"router: {modifier!r} modifies no other. Choose from: {known}.")
        made = kind(made)
    return made


def _find(name: str) -> type[Router]:
    if name not in Router._known:
        known = ", ".join(sorted(Router._known))
        raise ConfigError(f"router: no router is called {name!r}. Choose from: {known}.")
    return Router._known[name]


def router_names() -> list[str]:
    """The names that `make_router` knows, in the order of their definition."""
    return list(Router._known)


def measuring_routers() -> dict[str, type[Router]]:
    """Find the router that measures each kind of signature, the cheapest kinds first.

    Gates are trained instead.
    """
    found = {kind.measures: kind for kind in Router._known.values()}
    return {name: found[name] for name in KINDS if name in found}


def router_kinds() -> dict[str, type[Router]]:
    """The classes of routers by name, without modifiers."""
    return {n: kind for n, kind in Router._known.items() if not issubclass(kind, Modifier)}
