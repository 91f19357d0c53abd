"""Makes a transformers model route, in place, and undoes it."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from torch import nn

from phatgoose.errors import ConfigError, RoutingError
from phatgoose.nn import Choice, RoutingSettings, Trace
from phatgoose.ops import choose_backend
from phatgoose.ops.choose import Scale
from phatgoose.pool.pool import ExpertPool
from phatgoose.pool.routed_model import RoutedModel
from phatgoose.routers import Router, make_router

ATTRIBUTE = "_phatgoose"
Asked = str | Mapping[str, float] | Choice | None  # what stands for a row; see `assign`


def route(
    model: nn.Module,
    pool: ExpertPool,
    router: str | Router = "phatgoose",
    top_k: int | Literal["all"] | None = None,
    *,
    temperature: float | None = None,
    scale: Scale | None = None,
    null_score: float | None = None,
    backend: str = "auto",
    capacity: int | None = None,
    max_rank: int | None = None,
    same_base: bool = False,
) -> nn.Module:
    """Make a plain transformers model route every token among the pool's experts; return it.

    Hooks change the model in place: `generate`, caches, beams and pipelines work as before,
    `state_dict` is the same, and `unroute` restores it exactly. The pool may change meanwhile.

    Args:
        model: the experts' base model; not a PeftModel.
        router: a router's name, or a Router.
        top_k: experts per token and layer, or "all". Where there are fewer, it uses those.
        temperature: divides the kept scores before their softmax.
        scale: "softmax" weighs the kept experts as published; "unit" gives each weight 1. These
            three are what the router's own paper has unless given, see `Router.defaults`: top_k=2,
            temperature=1 and scale="softmax" for PHATGOOSE.
        null_score: the score of an extra candidate that adds nothing (None: no such candidate).
        backend: what computes a routed layer: "triton" (NVIDIA GPUs), "torch" (any device),
            "reference" (the definition, slow), or "auto", one of the first two by device.
        capacity: how many experts a layer has room for; the pool's own number by default. Within
            it the pool changes without new memory, and compiled models and CUDA graphs stay valid.
        max_rank: likewise, the highest rank a layer has room for.
        same_base: the model is the base that the experts name, whatever either is called. Without
            it, a warning says which names nothing shows to be of one base.

    Raises:
        RoutingError: empty pool, a PeftModel, or a model already routed.
        IncompatibleExpertError, MissingGateError: an expert is of another base, or lacks gates.
        ConfigError: a setting is out of range, or no router has that name.
    """
    router = make_router(router)
    settings = RoutingSettings.of(
        router,
        top_k=top_k,
        temperature=temperature,
        scale=scale,
        null_score=null_score,
        backend=backend,
    )
    room = _room(capacity, max_rank)
    choose_backend(backend, next((p.device.type for p in model.parameters()), "cpu"))
    plain = _unrouted(model)
    if not len(pool):
        raise RoutingError("route: the pool is empty. Add an expert first.")
    settings.note_size(len(pool))
    with pool.lock.changing("route"):
        pool.rename_for(plain)
        plain.__dict__[ATTRIBUTE] = RoutedModel(plain, pool, router, settings, room, same_base)
    return model


def _room(capacity: int | None, max_rank: int | None) -> tuple[int, int]:
    """The least capacity and rank of a bank, 0 where none was given."""
    for name, value in (("capacity", capacity), ("max_rank", max_rank)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}.")
    return capacity or 0, max_rank or 0


def _unrouted(model: nn.Module) -> nn.Module:
    """The model itself; raises RoutingError unless its layers are plain, by their own names."""
    plain = _plain(model)
    if ATTRIBUTE in plain.__dict__:
        raise RoutingError("route: this model routes already. Call phatgoose.unroute(model) first.")
    for name, module in plain.named_modules():
        if "_orig_mod" in module._modules:
            raise RoutingError(
                f"route: {name} is compiled on its own, which hides the names of the layers in it. "
                "Route the model first, then compile its parts."
            )
    if hasattr(model, "get_base_model") or any(hasattr(m, "base_layer") for m in model.modules()):
        raise RoutingError(
            "route: the model has PEFT adapters in it. Give the plain base model "
            "(peft_model.unload() returns it)."
        )
    return plain


def unroute(model: nn.Module) -> nn.Module:
    """Take the routing off a model: its outputs are bit for bit those of before `route`."""
    routed = _routed(model)
    with routed.pool.lock.changing("unroute"):
        routed.close()
        del _plain(model).__dict__[ATTRIBUTE]
    return model


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[Trace]:
    """Record the routing of every forward inside the block; the trace is complete after it.

    Like `restrict` and `assign`, it is for the forwards of the thread, or asyncio task, that is in
    the block. Another thread may change the pool meanwhile: names of experts that join come last
    in the trace.
    """
    routed = _routed(model)
    rules, settings = routed.state.forwards.rules(), routed.state.settings
    if rules.trace is not None:
        raise RoutingError("record: this model is being recorded already.")
    names = routed.pool.names
    candidates = len(names) + (settings.null_score is not None)
    trace = Trace(names=names, top_k=min(settings.kept(len(names)), candidates))
    with routed.ruled(replace(rules, trace=trace), "record"):
        yield trace
        trace.close()


@contextlib.contextmanager
def restrict(model: nn.Module, experts: Iterable[str]) -> Iterator[None]:
    """Let the forwards inside the block use only these experts; none at all is the bare base.

    A single expert has weight 1 wherever it is, which is the plain adapter. Raises ConfigError for
    a name that is not in the pool, or where one name stands in place of a list.
    """
    routed = _routed(model)
    if isinstance(experts, str):
        raise ConfigError(f"restrict wants a list of names, got {experts!r} alone.")
    allowed = frozenset(routed.pool[name].name for name in experts)
    rules = replace(routed.state.forwards.rules(), allowed=allowed)
    for row in dict.fromkeys(rules.rows or ()) if allowed else ():
        _check_allowed(row, routed.pool.names, allowed)
    with routed.ruled(rules, "restrict"):
        yield


@contextlib.contextmanager
def assign(model: nn.Module, experts: Sequence[Asked]) -> Iterator[None]:
    """Have row i of every forward inside the block follow `experts[i]`, whatever others do.

    What stands for a row may be

    - an expert's name: that expert alone at weight 1, one ordinary LoRA;
    - weights, `{"a": 0.7, "b": 0.3}`: a fixed mixture of any number of experts, which adds
      Σ w_e · scale_e · B_e A_e at every layer. The weights are used as they are, so they need not
      sum to 1;
    - a `Choice`, which may also restrict the router's choice for this row, or give it a scale, a
      top_k or a temperature of its own. `Choice()` is routed as outside the block;
    - None: the bare base.

    The router is not asked about rows with a name, weights or None. With beams or several returned
    sequences, each row's choice serves all that come of it. One entry serves a batch of any size.

    Raises ConfigError for a name that is not in the pool or not allowed by `restrict`, for weights
    that are negative or not finite, for settings that contradict each other, or where nothing is
    given; RoutingError, in a forward, where the number of rows is no multiple of that of entries.
    """
    routed = _routed(model)
    rules = routed.state.forwards.rules()
    if isinstance(experts, str | Mapping | Choice) or not len(experts):
        raise ConfigError(f"assign wants a list with a name for every row, got {experts!r}.")
    rows = tuple(map(_choice, experts))
    for row in dict.fromkeys(rows):
        row.check_router(scale=routed.state.settings.scale)
        _check_allowed(row, routed.pool.names, rules.allowed)
    with routed.ruled(replace(rules, rows=rows), "assign"):
        yield


def _check_allowed(row: Choice, names: Sequence[str], allowed: frozenset[str] | None) -> None:
    """Raise ConfigError for experts that are not there, or that `restrict` leaves out."""
    left = row.routed(names)
    if allowed is None or row.base:
        return
    named = left if row.weights is not None or row.allow is not None else ()
    for name in named:
        if name not in allowed:
            raise ConfigError(
                f"assign: {name} is not among the experts this block is restricted to."
            )
    if allowed.isdisjoint(left):
        raise ConfigError(
            "assign: a row denies all experts that this block is restricted to. Give None for the "
            "bare base."
        )


def _choice(row: object) -> Choice:
    """What stands for a row, as a choice."""
    if row is None:
        return Choice(base=True)
    if isinstance(row, Choice):
        return row
    if isinstance(row, str):
        return Choice(weights={row: 1.0})
    if isinstance(row, Mapping):
        return Choice(weights=row)
    raise ConfigError(f"assign: a row is a name, weights, a Choice or None, got {row!r}.")


def _routed(model: nn.Module) -> RoutedModel:
    try:
        routed: RoutedModel = _plain(model).__dict__[ATTRIBUTE]
        return routed
    except KeyError:
        raise RoutingError(
            "this model does not route. Call phatgoose.route(model, pool) first."
        ) from None


def _plain(model: nn.Module) -> nn.Module:
    """The model itself, where `torch.compile` has wrapped it."""
    while "_orig_mod" in model._modules:
        model = model.get_submodule("_orig_mod")
    return model
