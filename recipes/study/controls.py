"""Controls that a sceptic asks for: ways to answer that should do worse if routing matters."""

import dataclasses
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import phatgoose
from phatgoose.evaluation.eval_tasks import EvalTask, Item
from phatgoose.evaluation.methods import Bench, Method, pool_hashes
from phatgoose.experts import Expert, LoraModule
from phatgoose.pool import ExpertPool
from phatgoose.pool.retrieval import ExampleIndex


def random_pool(pool: ExpertPool) -> ExpertPool:
    """The pool with random adapters, each update as large as the trained one; gates are kept."""
    return ExpertPool(
        Expert(
            expert.name,
            {site: _random(expert.name, site, module) for site, module in expert.modules.items()},
            base_name=expert.base_name,
            signatures=expert.signatures,
        )
        for expert in pool
    )


def _random(name: str, site: str, module: Any) -> LoraModule:
    draw = torch.Generator().manual_seed(zlib.crc32(f"{name} {site}".encode()))
    a, b = (torch.randn(x.shape, generator=draw) for x in (module.a, module.b))
    b *= _norm(module.a.float(), module.b.float()) / _norm(a, b)
    return LoraModule(a, b, module.scale)


def _norm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Frobenius norm of b @ a, without the product."""
    return ((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt()


def nearest_experts(
    tasks: Sequence[EvalTask], index: ExampleIndex, model: Any, tokenizer: Any
) -> dict[str, list[str]]:
    """The experts near each task: the one retrieval chooses most, and those of a like skill."""
    found = {}
    for task in tasks:
        prompts = [example.prompt for example in task.examples]
        [(most, _)] = Counter(index.choose(prompts, model, tokenizer)).most_common(1)
        found[task.name] = sorted({most, *task.contaminated})
    return found


@dataclass(frozen=True)
class WithoutNearest(Method):
    """A router over the pool without the experts nearest to each task."""

    router: str = "phatgoose"
    nearest: Callable[[], Mapping[str, Sequence[str]]] = field(default=dict, compare=False)

    def settings(self, bench: Bench) -> dict[str, Any]:
        removed = {task: list(names) for task, names in self.nearest().items()}
        experts = pool_hashes(self.experts(bench))
        return {"kind": "without", "router": self.router, "removed": removed, "experts": experts}

    @contextmanager
    def ready(self, bench: Bench) -> Iterator[Callable[[Sequence[Item]], list[str]]]:
        yield lambda items: self._answer(items, bench)

    def _answer(self, items: Sequence[Item], bench: Bench) -> list[str]:
        removed = self.nearest()
        of: dict[tuple[str, ...], list[int]] = {}
        for place, item in enumerate(items):
            of.setdefault(tuple(removed[item.task.name]), []).append(place)
        answers = [""] * len(items)
        for gone, places in of.items():
            rest = ExpertPool(e for e in self.experts(bench) if e.name not in gone)
            phatgoose.route(bench.model, rest, self.router)
            try:
                found = bench.answer([items[place] for place in places])
            finally:
                phatgoose.unroute(bench.model)
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
        return answers


def held_out(method: Method) -> Method:
    """A method that is asked held-out tasks alone."""
    return dataclasses.replace(method, roles=("heldout",))
