"""Ways to answer a stream of examples: routers, single experts, mixtures, merges, references."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import phatgoose
from phatgoose.errors import ConfigError
from phatgoose.evaluation.batches import Experts, Progress
from phatgoose.evaluation.eval_tasks import Item, Role
from phatgoose.evaluation.evaluate import predict
from phatgoose.evaluation.lorahub import SHOTS, STEPS, search_weights
from phatgoose.experts import Expert, adapter_hash
from phatgoose.experts.kinds import GATES
from phatgoose.experts.signatures import vectors_hash
from phatgoose.pool import ExpertPool
from phatgoose.pool.retrieval import ExampleIndex
from phatgoose.routers import Router, derivations, make_router
from phatgoose.tasks import Example

Answering = Callable[[Sequence[Item]], list[str]]
ASSIGNED = "uniform"  # routers are not asked where every row has its expert; this one needs nothing
BOTH: tuple[Role, ...] = ("own", "heldout")


@dataclass
class Bench:
    """What every method works with: the plain model, its pool, and how to batch."""

    model: Any
    tokenizer: Any
    pool: ExpertPool
    share_prompts: bool = True
    tokens: int = 8192  # a batch of ranking
    rows: int = 64  # a batch of generation
    progress: Progress = False

    def answer(self, items: Sequence[Item], experts: Experts | None = None) -> list[str]:
        """Answer by the model as it stands; or, if it routes, by what `assign` takes."""
        return predict(
            self.model,
            self.tokenizer,
            [item.example for item in items],
            max_new_tokens=[item.task.max_new_tokens for item in items],
            max_tokens_per_batch=self.tokens,
            batch_size=self.rows,
            share_prompts=self.share_prompts,
            experts=experts,
            progress=self.progress,
        )


@dataclass(frozen=True)
class Method(ABC):
    """One way to answer a stream of examples.

    `pool` is the pool it uses, the evaluation's unless given, so that pools of several sizes can
    be compared over the same tasks.
    """

    name: str
    roles: tuple[Role, ...] = field(default=BOTH, kw_only=True)  # of the tasks it is defined on
    pool: ExpertPool | None = field(default=None, kw_only=True, compare=False)

    @abstractmethod
    def settings(self, bench: Bench) -> dict[str, Any]:
        """Return all that its answers depend on, apart from base and examples, as JSON values."""

    @abstractmethod
    def ready(self, bench: Bench) -> AbstractContextManager[Answering]:
        """Set the model up, and undo it afterwards. What it yields answers examples.

        Raises PhatgooseError where the pool does not serve this method.
        """

    def experts(self, bench: Bench) -> ExpertPool:
        return self.pool or bench.pool


@dataclass(frozen=True)
class Base(Method):
    """The plain model."""

    def settings(self, bench: Bench) -> dict[str, Any]:
        return {"kind": "base"}

    @contextmanager
    def ready(self, bench: Bench) -> Iterator[Answering]:
        yield bench.answer


@dataclass(frozen=True)
class Routed(Method):
    """The routed pool; `options` are those of `phatgoose.route`, the router's own unless given.

    A router that is no name has to be told apart by `made_with`, as JSON values.
    """

    router: str | Router = "phatgoose"
    options: Mapping[str, Any] = field(default_factory=dict)
    made_with: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.router, Router) and not self.made_with:
            raise ConfigError(
                f"{self.name}: say what this router was made with (made_with=...), so that its "
                "answers are not taken for another's."
            )

    def settings(self, bench: Bench) -> dict[str, Any]:
        pool, router = self.experts(bench), make_router(self.router)
        found: dict[str, Any] = {
            "kind": "router",
            "router": self.router if isinstance(self.router, str) else type(router).__name__,
            **self.made_with,
            **router.defaults,
            **self.options,
            "experts": pool_hashes(pool),
        }
        if derived := derivations(router, pool):
            found["derived"] = derived
        return found

    @contextmanager
    def ready(self, bench: Bench) -> Iterator[Answering]:
        phatgoose.route(bench.model, self.experts(bench), self.router, **self.options)
        try:
            yield bench.answer
        finally:
            phatgoose.unroute(bench.model)


@contextmanager
def together(
    bench: Bench, pool: ExpertPool
) -> Iterator[Callable[[Sequence[Item], Experts], list[str]]]:
    """Set the model up to answer each example by an expert, or a mixture, of its own."""
    phatgoose.route(bench.model, pool, ASSIGNED)
    try:
        yield bench.answer
    finally:
        phatgoose.unroute(bench.model)


class OneExpert(Method):
    """Answers each example by one expert at weight 1, or by one fixed mixture."""

    @abstractmethod
    def choose(self, items: Sequence[Item], bench: Bench) -> Experts:
        """Return the expert, or the weights, of each example. None is the bare base."""

    @contextmanager
    def ready(self, bench: Bench) -> Iterator[Answering]:
        self.settle_first(bench)
        with together(bench, self.experts(bench)) as answer:
            yield lambda items: answer(items, self.choose(items, bench))

    def settle_first(self, bench: Bench) -> None:
        """Do what has to be done while the model is plain."""


@dataclass(frozen=True)
class Own(OneExpert):
    """Knows the task and takes the expert of its name. It is defined on the experts' own tasks."""

    roles: tuple[Role, ...] = field(default=("own",), kw_only=True)

    def settings(self, bench: Bench) -> dict[str, Any]:
        return {"kind": "own", "adapters": adapter_hashes(self.experts(bench))}

    def choose(self, items: Sequence[Item], bench: Bench) -> Experts:
        return [item.task.name for item in items]


@dataclass(frozen=True)
class Single(OneExpert):
    """Takes one expert for everything."""

    expert: str = ""

    def settings(self, bench: Bench) -> dict[str, Any]:
        adapter = adapter_hash(self.experts(bench)[self.expert].modules)
        return {"kind": "single", "expert": self.expert, "adapter": adapter}

    def choose(self, items: Sequence[Item], bench: Bench) -> Experts:
        return [self.expert] * len(items)


@dataclass(frozen=True)
class Weighted(OneExpert):
    """Takes one fixed mixture for everything."""

    weights: Mapping[str, float] = field(default_factory=dict)

    def settings(self, bench: Bench) -> dict[str, Any]:
        used = {name: adapter_hash(self.experts(bench)[name].modules) for name in self.weights}
        return {"kind": "weights", "weights": dict(self.weights), "adapters": used}

    def choose(self, items: Sequence[Item], bench: Bench) -> Experts:
        return [self.weights] * len(items)


@dataclass(frozen=True)
class LoraHub(OneExpert):
    """Takes one mixture for everything, which suits a few examples best (arXiv:2307.13269)."""

    examples: Sequence[Example] = ()
    shots: int = SHOTS
    steps: int = STEPS
    seed: int = 0
    found: dict[str, float] = field(default_factory=dict, compare=False)  # once it was ready

    def settings(self, bench: Bench) -> dict[str, Any]:
        texts = json.dumps([asdict(example) for example in self.examples])
        return {
            "kind": "lorahub",
            "examples": hashlib.sha256(texts.encode()).hexdigest(),
            "shots": self.shots,
            "steps": self.steps,
            "seed": self.seed,
            "adapters": adapter_hashes(self.experts(bench)),
        }

    def settle_first(self, bench: Bench) -> None:
        if not self.found:
            weights = search_weights(
                bench.model,
                bench.tokenizer,
                self.experts(bench),
                self.examples,
                shots=self.shots,
                steps=self.steps,
                seed=self.seed,
            )
            self.found.update(weights)

    def choose(self, items: Sequence[Item], bench: Bench) -> Experts:
        return [self.found] * len(items)


@dataclass(frozen=True)
class PerTask(OneExpert):
    """Takes one expert for each task, which the scores of the singles chose."""

    chosen: Mapping[str, str] = field(default_factory=dict)  # by task

    def settings(self, bench: Bench) -> dict[str, Any]:
        used = {name: adapter_hash(self.experts(bench)[name].modules) for name in self.names}
        return {"kind": "per task", "experts": dict(self.chosen), "adapters": used}

    def choose(self, items: Sequence[Item], bench: Bench) -> Experts:
        return [self.chosen[item.task.name] for item in items]

    @property
    def names(self) -> list[str]:
        return sorted(set(self.chosen.values()))


@dataclass(frozen=True)
class Retrieval(OneExpert):
    """Takes the expert of the stored example that is nearest to a prompt (arXiv:2302.03202)."""

    index: Callable[[], ExampleIndex] | None = None  # asked for when it is needed

    def settings(self, bench: Bench) -> dict[str, Any]:
        index = self._index()
        return {
            "kind": "retrieval",
            "index": index.key,
            "encoder": index.encoder,
            "adapters": adapter_hashes(self.experts(bench)),
        }

    def choose(self, items: Sequence[Item], bench: Bench) -> Experts:
        prompts = [item.example.prompt for item in items]
        return [*self._index().choose(prompts, bench.model, bench.tokenizer)]

    def _index(self) -> ExampleIndex:
        if self.index is None:
            raise ConfigError(f"{self.name}: needs an index of the experts' training prompts.")
        return self.index()


@dataclass(frozen=True)
class Static(Method):
    """Takes one adapter at weight 1. It is made of the pool, or read, when it is needed."""

    make: Callable[[ExpertPool], Expert] | None = None
    made_with: Mapping[str, Any] = field(default_factory=dict)  # settings, hashes

    def settings(self, bench: Bench) -> dict[str, Any]:
        adapters = adapter_hashes(self.experts(bench))
        return {"kind": "static", **self.made_with, "adapters": adapters}

    @contextmanager
    def ready(self, bench: Bench) -> Iterator[Answering]:
        assert self.make is not None
        alone = ExpertPool([self.make(self.experts(bench))])
        phatgoose.route(bench.model, alone, ASSIGNED)
        try:
            yield lambda items: bench.answer(items, alone.names * len(items))
        finally:
            phatgoose.unroute(bench.model)


@dataclass(frozen=True)
class Afterwards(Method, ABC):
    """An upper reference, which the held-out scores of every single expert choose.

    Singles answer `probe` examples of each task (None: all of them). Then the chosen expert answers
    all. Its score is less biased upward if it was chosen on few.
    """

    roles: tuple[Role, ...] = field(default=("heldout",), kw_only=True)
    probe: int | None = None

    def singles(self, bench: Bench) -> list[Single]:
        return [
            Single(f"single:{name}", roles=self.roles, pool=self.pool, expert=name)
            for name in self.experts(bench).names
        ]

    @abstractmethod
    def settle(self, means: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
        """Choose the expert of each task, given the mean scores by task and expert."""

    def settings(self, bench: Bench) -> dict[str, Any]:
        return {"probe": self.probe, "adapters": adapter_hashes(self.experts(bench))}

    def ready(self, bench: Bench) -> AbstractContextManager[Answering]:
        raise ConfigError(f"{self.name}: has to be settled by the scores of single experts first.")


class BestIndividual(Afterwards):
    """The one expert with the highest held-out average. arXiv:2402.05859, section 4."""

    def settle(self, means: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
        totals: dict[str, float] = {}
        for of_task in means.values():
            for expert, mean in of_task.items():
                totals[expert] = totals.get(expert, 0.0) + mean
        best = max(totals, key=totals.__getitem__)  # the first of equals
        return dict.fromkeys(means, best)


class Oracle(Afterwards):
    """The best expert of each held-out task. arXiv:2402.05859, section 4."""

    def settle(self, means: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
        return {task: max(of_task, key=of_task.__getitem__) for task, of_task in means.items()}


def adapter_hashes(pool: ExpertPool) -> dict[str, str]:
    return {expert.name: adapter_hash(expert.modules) for expert in pool}


def pool_hashes(pool: ExpertPool) -> dict[str, dict[str, Any]]:
    """Hash what experts are, by content."""
    hashes = {}
    for expert in pool:
        kept = {kind: vectors_hash(found.vectors) for kind, found in expert.signatures.items()}
        hashes[expert.name] = {
            "adapter": adapter_hash(expert.modules),
            "gates": kept.pop(GATES, None),  # apart, as in results that exist
            "signatures": kept,
        }
    return hashes
