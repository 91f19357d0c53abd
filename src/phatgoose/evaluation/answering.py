"""Answers a stream of examples by many methods, and keeps what came of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from phatgoose.errors import ConfigError, PhatgooseError, first_line
from phatgoose.evaluation.answers import (
    Chunk,
    Known,
    Row,
    answer_chunks,
    answer_singles,
    chunks_of,
    place_of,
)
from phatgoose.evaluation.eval_tasks import Item
from phatgoose.evaluation.methods import Afterwards, Bench, Method, OneExpert, PerTask
from phatgoose.experts import adapter_hash


class Answering:
    """What is asked, and what came of it so far."""

    def __init__(
        self,
        bench: Bench,
        stream: Sequence[Item],
        *,
        out: Path,
        common: Mapping[str, Any],
        size: int,
        progress: bool,
    ) -> None:
        self.bench, self.stream, self.out = bench, stream, out
        self.common, self.size, self.progress = common, size, progress
        self.rows: dict[str, list[Row]] = {}  # by method
        self.failed: dict[str, str] = {}
        self.described: dict[str, dict[str, Any]] = {}
        self.chunks: list[Chunk] = []
        # What one adapter answered, by its hash, task and line: methods that choose it share that.
        self._alone: dict[tuple[str | None, str, int], Row] = {}

    def answer(self, methods: Sequence[Method]) -> None:
        """Answer by all methods. Those that need other methods' scores come last."""
        afterwards = [method for method in methods if isinstance(method, Afterwards)]
        probes = self._probes(methods)
        total = sum(len(self._items(method)) for method in methods)
        total += sum(len(items) for _, items in probes.values())
        with tqdm(total=total, unit="example", disable=not self.progress) as bar:
            for method in methods:
                if method not in afterwards:
                    self._record(method, self._answer(method, self._items(method), bar))
            self._answer_singles(list(probes.values()), bar)
            found = {
                key: self._answer(single, items, bar) for key, (single, items) in probes.items()
            }
            for method in afterwards:
                singles = {
                    single.expert: found[single.name, method.probe]
                    for single in method.singles(self.bench)
                }
                self._settle(method, singles, bar)
            bar.set_description("eval")
        self.rows = {m.name: self.rows[m.name] for m in methods if m.name in self.rows}

    def jobs(self, methods: Sequence[Method]) -> dict[str, tuple[Method, list[Item]]]:
        """List what can be answered without the scores of others."""
        found = {m.name: (m, self._items(m)) for m in methods if not isinstance(m, Afterwards)}
        for (name, probe), job in self._probes(methods).items():
            found[f"{name} on {probe or 'all'}"] = job
        return found

    def do(self, method: Method, items: Sequence[Item]) -> None:
        """Answer one job, into the folder. A method that cannot serve its pool leaves nothing."""
        with tqdm(total=len(items), unit="example", disable=not self.progress) as bar:
            self._answer(method, items, bar)

    def _probes(
        self, methods: Sequence[Method]
    ) -> dict[tuple[str, int | None], tuple[Method, list[Item]]]:
        """Find the single experts to ask, and what they are chosen by. Equal choices share them."""
        return {
            (single.name, method.probe): (single, self._probe(method))
            for method in methods
            if isinstance(method, Afterwards)
            for single in method.singles(self.bench)
        }

    def scores(self) -> dict[str, dict[str, list[float]]]:
        """Return the scores by task and method, in the task's order."""
        found: dict[str, dict[str, dict[int, float]]] = {}
        for method, rows in self.rows.items():
            for row in rows:
                of_method = found.setdefault(row["task"], {}).setdefault(method, {})
                of_method[row["line"]] = row["score"]
        return {
            task: {m: [by_line[line] for line in sorted(by_line)] for m, by_line in of_task.items()}
            for task, of_task in found.items()
        }

    def _answer(
        self, method: Method, items: Sequence[Item], bar: Any, known: Known | None = None
    ) -> list[Row] | str:
        """Return all rows of a method, or the reason why it cannot serve its pool."""
        bar.set_description(method.name)
        self.bench.progress = bar.update
        done, rows = bar.n, []
        try:
            settings = {**self.common, **method.settings(self.bench)}
            chunks = chunks_of(method, items, settings=settings, out=self.out, size=self.size)
            alone = self._places(method, items)
            shared = {place[1:]: row for place in alone if (row := self._alone.get(place))}
            shared |= known or {}
            for chunk_rows in answer_chunks(self.bench, method, chunks, known=shared):
                rows += chunk_rows
                bar.update(done + len(rows) - bar.n)  # what was read, or known
            self._alone.update(zip(alone, rows, strict=False))
        except PhatgooseError as error:
            bar.update(done + len(items) - bar.n)
            return " ".join(str(error).split())
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{method.name}: out of memory ({first_line(error)}). What is finished is kept: "
                "give smaller --tokens and --rows and start again."
            ) from error
        self.chunks += chunks
        return rows

    def _places(self, method: Method, items: Sequence[Item]) -> list[tuple[str | None, str, int]]:
        """The adapter of each example, its task and line, if a method answers by one adapter."""
        if not isinstance(method, OneExpert):
            return []
        chosen, pool = method.choose(items, self.bench), method.experts(self.bench)
        names = [name for name in chosen if name is None or isinstance(name, str)]
        if len(names) < len(items):
            return []  # mixtures
        hashes = {n: None if n is None else adapter_hash(pool[n].modules) for n in {*names}}
        return [(hashes[n], *place_of(item)) for n, item in zip(names, items, strict=True)]

    def _answer_singles(self, probes: Sequence[tuple[Method, list[Item]]], bar: Any) -> None:
        """Write what single experts answer, several in a batch. Who reads it counts it."""
        before = bar.n
        self.bench.progress = bar.update
        by_pool: dict[int, list[tuple[OneExpert, Chunk]]] = {}
        for single, items in probes:
            assert isinstance(single, OneExpert)
            settings = {**self.common, **single.settings(self.bench)}
            chunks = chunks_of(single, items, settings=settings, out=self.out, size=self.size)
            pool = id(single.experts(self.bench))
            by_pool.setdefault(pool, []).extend((single, chunk) for chunk in chunks)
        try:
            for of_pool in by_pool.values():
                pool_of = of_pool[0][0].experts(self.bench)
                answer_singles(self.bench, of_pool, size=self.size, pool=pool_of)
        except PhatgooseError:
            pass  # each single meets it again, and says so in its own cells
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"single experts: out of memory ({first_line(error)}). What is finished is kept: "
                "give smaller --tokens and --rows and start again."
            ) from error
        bar.update(before - bar.n)

    def _record(self, method: Method, rows: list[Row] | str) -> None:
        if isinstance(rows, str):
            self.failed[method.name] = rows
        else:
            self.rows[method.name] = rows
            self.described[method.name] = method.settings(self.bench)

    def _settle(self, method: Afterwards, singles: Mapping[str, list[Row] | str], bar: Any) -> None:
        """Choose experts by the singles' scores, then answer by the chosen."""
        items = self._items(method)
        if not items:
            self._record(method, "there is no held-out task to choose experts by")
            return
        rows: list[tuple[str, Row]] = []
        for expert, some in singles.items():
            if isinstance(some, str):
                self._record(method, f"single:{expert}: {some}")
                return
            rows += [(expert, row) for row in some]
        chosen = method.settle(_means(rows))
        known = {(r["task"], r["line"]): r for expert, r in rows if chosen[r["task"]] == expert}
        settled = PerTask(method.name, roles=method.roles, pool=method.pool, chosen=chosen)
        self._record(settled, self._answer(settled, items, bar, known))
        if method.name in self.described:
            self.described[method.name] |= {"kind": type(method).__name__, "probe": method.probe}

    def _items(self, method: Method) -> list[Item]:
        return [item for item in self.stream if item.task.role in method.roles]

    def _probe(self, method: Afterwards) -> list[Item]:
        """Take the first examples of each task in the stream, which is shuffled."""
        taken: dict[str, int] = {}
        items = []
        for item in self._items(method):
            taken[item.task.name] = taken.get(item.task.name, 0) + 1
            if method.probe is None or taken[item.task.name] <= method.probe:
                items.append(item)
        return items


def _means(rows: Sequence[tuple[str, Row]]) -> dict[str, dict[str, float]]:
    """Average the scores by task and expert."""
    scores: dict[str, dict[str, list[float]]] = {}
    for expert, row in rows:
        scores.setdefault(row["task"], {}).setdefault(expert, []).append(row["score"])
    return {
        task: {expert: sum(some) / len(some) for expert, some in of_task.items()}
        for task, of_task in scores.items()
    }
