"""Making a transformers model route, in place, and undoing it."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import NoReturn

import torch
from torch import Tensor, nn

from phatgoose.errors import ConfigError, IncompatibleExpertError, RoutingError
from phatgoose.experts import Expert, identify_base
from phatgoose.experts.base import linear_sizes
from phatgoose.experts.verify import check_modules
from phatgoose.nn import Bank, ContextKeeper, RoutingSettings, RoutingState, Site, Trace
from phatgoose.ops.choose import Scale
from phatgoose.pool.pool import ExpertPool
from phatgoose.routers import Router, make_router

ATTRIBUTE = "_phatgoose"
COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def route(
    model: nn.Module,
    pool: ExpertPool,
    router: str | Router = "phatgoose",
    top_k: int = 2,
    *,
    temperature: float = 1.0,
    scale: Scale = "softmax",
    null_score: float | None = None,
) -> nn.Module:
    """Make a plain transformers model route every token among the pool's experts; return it.

    The model is changed in place, by hooks on its linear layers: `generate`, caches, beams,
    pipelines and evaluation work as before, `state_dict` is the same, and `unroute` restores it
    exactly. The pool may change while it routes.

    Args:
        model: the experts' base model; not a PeftModel.
        router: a router's name, or a Router.
        top_k: experts per token and layer (published: 2). A layer with fewer candidates uses those.
        temperature: divides the kept scores before their softmax (published: 1).
        scale: "softmax" weighs the kept experts as published; "unit" gives each weight 1, so
            top_k=1 uses the best one as strongly as its adapter was trained.
        null_score: the score of an extra candidate that adds nothing (None: no such candidate).

    Raises:
        RoutingError: empty pool, top_k above its size, a PeftModel, or a model already routed.
        IncompatibleExpertError: an expert was trained on another base.
        MissingGateError: the router needs gates an expert does not have.
        ConfigError: a setting is out of range, or no router has that name.
    """
    settings = RoutingSettings(
        top_k=top_k, temperature=temperature, scale=scale, null_score=null_score
    )
    if ATTRIBUTE in model.__dict__:
        raise RoutingError("route: this model routes already. Call phatgoose.unroute(model) first.")
    if hasattr(model, "get_base_model") or any(hasattr(m, "base_layer") for m in model.modules()):
        raise RoutingError(
            "route: the model has PEFT adapters in it. Give the plain base model "
            "(peft_model.unload() returns it)."
        )
    if not len(pool):
        raise RoutingError("route: the pool is empty. Add an expert first.")
    if top_k > len(pool):
        raise RoutingError(
            f"route: top_k is {top_k}, the pool has {len(pool)} experts. Choose top_k of at most "
            f"{len(pool)}, or add experts."
        )
    routed = RoutedModel(model, pool, make_router(router), settings)
    model.__dict__[ATTRIBUTE] = routed
    return model


def unroute(model: nn.Module) -> nn.Module:
    """Take the routing off a model: its outputs are bit for bit those of before `route`."""
    _routed(model).close()
    del model.__dict__[ATTRIBUTE]
    return model


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[Trace]:
    """Record the routing of every forward inside the block; the trace is complete after it."""
    routed = _routed(model)
    if routed.state.trace is not None:
        raise RoutingError("record: this model is being recorded already.")
    trace = Trace(names=routed.pool.names, top_k=routed.state.settings.top_k)
    routed.state.trace = trace
    try:
        yield trace
        trace.close()
    finally:
        routed.state.trace = None


@contextlib.contextmanager
def restrict(model: nn.Module, experts: Iterable[str]) -> Iterator[None]:
    """Let the forwards inside the block use only these experts; none at all is the bare base.

    A single expert has weight 1 wherever it is, which is the plain adapter. Raises ConfigError for
    a name that is not in the pool, or where one name stands in place of a list.
    """
    routed = _routed(model)
    if isinstance(experts, str):
        raise ConfigError(f"restrict wants a list of names, got {experts!r} alone.")
    before = routed.state.allowed
    routed.state.allowed = frozenset(routed.pool[name].name for name in experts)
    try:
        yield
    finally:
        routed.state.allowed = before


def _routed(model: nn.Module) -> "RoutedModel":
    try:
        return model.__dict__[ATTRIBUTE]
    except KeyError:
        raise RoutingError(
            "this model does not route. Call phatgoose.route(model, pool) first."
        ) from None


class RoutedModel:
    """The sites of one model, kept in step with the pool."""

    def __init__(
        self, model: nn.Module, pool: ExpertPool, router: Router, settings: RoutingSettings
    ) -> None:
        self.model = model
        self.pool = pool
        self.sites: dict[str, Site] = {}
        self._layers = dict(model.named_modules())
        self._identity = identify_base(model)
        self._ready: dict[str, dict[str, Tensor]] = {}  # signatures of experts about to be added
        self.state = RoutingState(router, settings, ContextKeeper(model), [])
        try:
            for expert in pool:
                self._check(expert)
            self._reserve(pool)
            for expert in pool:
                self.add(expert)
        except BaseException:
            self.close()
            raise
        pool.follow(self)

    def close(self) -> None:
        """Take every hook and bank off the model."""
        self.pool.unfollow(self)
        for site in self.sites.values():
            site.close()
        self.state.keeper.close()

    def __deepcopy__(self, _: object) -> NoReturn:
        raise RoutingError(
            "copy.deepcopy: a routed model cannot be copied, its hooks would still serve the "
            "original. Call phatgoose.unroute(model), copy it, then route both."
        )

    def prepare_add(self, expert: Expert) -> None:
        """Check an expert and make room for it: whatever can fail, before anything changes."""
        self._check_not_recorded()
        self._check(expert)
        self._reserve([expert])

    def cancel_add(self, expert: Expert) -> None:
        """Give back what `prepare_add` took, if it got that far."""
        self._ready.pop(expert.name, None)
        self._tidy()

    def add(self, expert: Expert) -> None:
        """Give the expert the next slot at each site it adapts."""
        index, signatures = len(self.state.experts), self._ready.pop(expert.name)
        for name, lora in expert.modules.items():
            self.sites[name].bank.append(index, signatures[name], lora)
        self.state.experts.append(expert)

    def prepare_remove(self, name: str) -> None:
        self._check_not_recorded()
        if len(self.pool) - 1 < self.state.settings.top_k:
            raise RoutingError(
                f"{name}: removing it would leave {len(self.pool) - 1} experts, a routed model "
                f"uses top_k={self.state.settings.top_k}. Add another first, or unroute the model."
            )

    def remove(self, index: int) -> None:
        for site in self.sites.values():
            site.bank.remove(index)
        del self.state.experts[index]
        self._tidy()

    def _tidy(self) -> None:
        """Leave no spare ranks, and no site without experts."""
        for name, site in list(self.sites.items()):
            site.bank.trim()
            if not len(site.bank):
                site.close()
                del self.sites[name]

    def _check_not_recorded(self) -> None:
        if self.state.trace is not None:
            raise RoutingError(
                "the pool cannot change while a model it routes is being recorded: the trace's "
                "indices would change their meaning. Leave the record block first."
            )

    def _check(self, expert: Expert) -> None:
        difference = expert.base and expert.base.difference(self._identity)
        if difference:
            raise IncompatibleExpertError(
                f"{expert.name}: was made for another base than this model: {difference}."
            )
        for problem in check_modules(expert, self.model):
            raise IncompatibleExpertError(problem)
        signature = self.state.router.signature
        self._ready[expert.name] = {name: signature(expert, name) for name in expert.modules}

    def _reserve(self, experts: Iterable[Expert]) -> None:
        """Size every bank for these experts on top of those it has, in one go."""
        needed: dict[str, list[int]] = {}
        for expert in experts:
            for name, lora in expert.modules.items():
                needed.setdefault(name, []).append(lora.rank)
        for name, ranks in needed.items():
            bank = self._site(name).bank
            bank.reserve(len(bank) + len(ranks), max(ranks))

    def _site(self, name: str) -> Site:
        if name not in self.sites:
            layer = self._layers[name]
            sizes = linear_sizes(layer)
            assert sizes is not None, name  # check_modules saw to it
            bank = Bank(*sizes, device=_device(layer), dtype=_dtype(layer, self.model))
            self.sites[name] = Site(name, layer, bank, self.state)
        return self.sites[name]


def _device(layer: nn.Module) -> torch.device:
    return next((p.device for p in layer.parameters()), torch.device("cpu"))


def _dtype(layer: nn.Module, model: nn.Module) -> torch.dtype:
    """The dtype to compute LoRA products in: the layer's own, or the model's if it is quantised."""
    for dtype in (
        getattr(getattr(layer, "weight", None), "dtype", None),
        getattr(model, "dtype", None),
    ):
        if dtype in COMPUTE_DTYPES:
            return dtype
    return torch.get_default_dtype()
