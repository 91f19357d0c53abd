"""Makes methods by name, as the command line asks for them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from phatgoose.errors import ConfigError
from phatgoose.evaluation import methods
from phatgoose.experts import Expert, adapter_hash, load_expert
from phatgoose.pool import Choice, ExpertPool, merge_experts
from phatgoose.pool.retrieval import ExampleIndex
from phatgoose.routers import MixedRouter, make_router, router_names
from phatgoose.tasks import Example

SINGLE = "single:"
COMBINED = (  # of routers with modifiers, in "all"
    "phatgoose+evidence",
    "phatgoose+prompt_evidence",
    "phatgoose+adapter_evidence",
    "phatgoose+adapter_prompt_evidence",
    "seqr+zscore",
)


@dataclass(frozen=True)
class Inputs:
    """What methods are made of, apart from the pool."""

    pool: ExpertPool
    index: Callable[[], ExampleIndex] | None = None  # of the experts' training prompts
    multitask: Path | None = None  # an adapter trained on the union of the experts' data
    probe: int | None = None  # examples a task that oracle and best_individual choose by
    weights: Mapping[str, float] | None = None  # of the method of this name
    examples: Sequence[Example] = ()  # a few, which lorahub finds weights by
    seed: int = 0  # of which examples lorahub takes


def method_names() -> list[str]:
    """List all names but single:NAME, in the order of a table."""
    return [*_MAKERS, *filter(is_router, router_names()), *COMBINED]


def is_router(name: str) -> bool:
    """Tell whether a router has this name. A modifier alone may not be one."""
    try:
        make_router(name)
    except ConfigError:
        return False
    return True


def is_method(name: str) -> bool:
    """Tell whether a method, which a router is too, has this name."""
    return name in _MAKERS or name.startswith(SINGLE) or is_router(name)


def make_methods(
    names: Sequence[str], inputs: Inputs
) -> tuple[list[methods.Method], dict[str, str]]:
    """Make methods by name. Returns them, and those that "all" had to leave out, with the reason.

    Raises ConfigError for an unknown name, or a method that lacks an input and was asked for.
    """
    made: dict[str, methods.Method] = {}
    left_out: dict[str, str] = {}
    for name in names:
        for each in method_names() if name == "all" else [name]:
            if name == "all" and each == MixedRouter.name and all(e.gates for e in inputs.pool):
                left_out[each] = "every expert has gates, so it would be phatgoose"
                continue
            try:
                made[each] = _make(each, inputs)
            except _LacksInput as error:
                if name != "all":
                    raise _lacking(each, error) from None
                left_out[each] = str(error)
    return list(made.values()), {k: v for k, v in left_out.items() if k not in made}


def make_method(name: str, inputs: Inputs) -> methods.Method:
    """Make one method by name. Raises ConfigError as `make_methods` does."""
    try:
        return _make(name, inputs)
    except _LacksInput as error:
        raise _lacking(name, error) from None


class _LacksInput(Exception):
    """Says what a method would need."""


def _lacking(name: str, error: _LacksInput) -> ConfigError:
    return ConfigError(f"methods: {name} {error}.")


def _make(name: str, inputs: Inputs) -> methods.Method:
    if name.startswith(SINGLE):
        expert = name.removeprefix(SINGLE)
        return methods.Single(name, expert=inputs.pool[expert].name)
    if name in _MAKERS:
        return _MAKERS[name](name, inputs)
    if is_router(name):
        return methods.Routed(name, router=name)
    if "+" in name or name in router_names():
        make_router(name)  # which says what is wrong with it
    known = ", ".join([*method_names(), f"{SINGLE}NAME"])
    raise ConfigError(f"methods: none is called {name!r}. Choose from: {known}.")


def _retrieval(name: str, inputs: Inputs) -> methods.Method:
    if inputs.index is None:
        raise _LacksInput("needs the experts' training prompts: --train-tasks")
    return methods.Retrieval(name, index=functools.cache(inputs.index))


def _weights(name: str, inputs: Inputs) -> methods.Method:
    if inputs.weights is None:
        raise _LacksInput("needs the experts' weights: --weights a=0.7,b=0.3")
    choice = Choice(weights=inputs.weights)
    choice.routed(inputs.pool.names)
    return methods.Weighted(name, weights=choice.mixture())


def _lorahub(name: str, inputs: Inputs) -> methods.Method:
    if not inputs.examples:
        raise _LacksInput("needs a few examples of the task: --examples FILE")
    return methods.LoraHub(name, examples=inputs.examples, seed=inputs.seed)


def _multitask(name: str, inputs: Inputs) -> methods.Method:
    if inputs.multitask is None:
        raise _LacksInput("needs an adapter trained on all experts' data: --multitask FOLDER")
    expert = load_expert(inputs.multitask)
    made_with = {"folder": expert.name, "adapter": adapter_hash(expert.modules)}
    return methods.Static(name, make=functools.partial(_given, expert), made_with=made_with)


def _merged(method: str, name: str, inputs: Inputs) -> methods.Method:
    return methods.Static(
        name,
        make=functools.partial(merge_experts, method=method, name=name),
        made_with={"merge": method},
    )


def _merged_svd(name: str, inputs: Inputs) -> methods.Method:
    """Average the experts at the largest of the pool's ranks."""
    rank = max(lora.rank for expert in inputs.pool for lora in expert.modules.values())
    return methods.Static(
        name,
        make=functools.partial(merge_experts, rank=rank, name=name),
        made_with={"merge": "average", "rank": rank},
    )


def _given(expert: Expert, pool: ExpertPool) -> Expert:
    return expert


_MAKERS: Mapping[str, Callable[[str, Inputs], methods.Method]] = {
    "base": lambda name, inputs: methods.Base(name),
    "own": lambda name, inputs: methods.Own(name),
    "retrieval": _retrieval,
    "best_individual": lambda name, inputs: methods.BestIndividual(name, probe=inputs.probe),
    "oracle": lambda name, inputs: methods.Oracle(name, probe=inputs.probe),
    "multitask": _multitask,
    "weights": _weights,
    "lorahub": _lorahub,
    "merged": functools.partial(_merged, "average"),
    "merged_svd": _merged_svd,
    "peft_linear": functools.partial(_merged, "linear"),
    "peft_ties": functools.partial(_merged, "ties"),
    "peft_dare": functools.partial(_merged, "dare_linear"),
}
