"""Methods times tasks over one loaded base, written to a folder; goes on where it stopped."""

import hashlib
import platform
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tqdm.auto import tqdm

import phatgoose
from phatgoose.errors import ConfigError, PhatgooseError, first_line
from phatgoose.evaluation.answers import (
    Chunk,
    Known,
    Row,
    answer_chunks,
    answer_singles,
    chunks_of,
)
from phatgoose.evaluation.eval_tasks import EvalTask, Item
from phatgoose.evaluation.methods import (
    Afterwards,
    Bench,
    Method,
    OneExpert,
    PerTask,
    pool_hashes,
)
from phatgoose.evaluation.plots import draw
from phatgoose.evaluation.report import table
from phatgoose.evaluation.summary import summarise
from phatgoose.experts import identify_base
from phatgoose.files import write_bytes, write_json
from phatgoose.locks import claimed
from phatgoose.pool import ExpertPool


@dataclass(frozen=True)
class RunSettings:
    """How an evaluation computes. Sizes are those of the device unless given."""

    seed: int = 0  # of the stream's order and of the intervals
    limit: int | None = None  # examples a task, as `read_tasks` was given it; only noted
    general: Sequence[str] = ()  # adapters subtracted from every expert before; only noted
    share_prompts: bool = True
    tokens: int | None = None  # a batch of ranking, padding counted (131072; cpu 8192)
    rows: int | None = None  # a batch of generation (1024; cpu 64)
    part: int | None = None  # examples computed between saves (16384; cpu 1024)
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("limit", "tokens", "rows", "part"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")

    def sizes(self, device: str) -> dict[str, int]:
        usual = (8192, 64, 1024) if device == "cpu" else (131_072, 1024, 16_384)
        given = (self.tokens, self.rows, self.part)
        names = ("tokens", "rows", "part")
        return {n: g or u for n, g, u in zip(names, given, usual, strict=True)}


def run_evaluation(
    model: Any,
    tokenizer: Any,
    pool: ExpertPool,
    *,
    methods: Sequence[Method],
    tasks: Sequence[EvalTask],
    out: Path,
    settings: RunSettings | None = None,
    left_out: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Answer every task by every method, write `out`, and return what results.json holds.

    The examples of all tasks are shuffled into one stream, which no method is told the tasks of
    (but those defined by them). `out` receives results.json, table.md, pictures, and every answer
    as JSON lines under answers/METHOD. What is finished there is not computed again; files that are
    damaged or of other settings are. A method that cannot serve its pool leaves marked cells, with
    the reason.

    Args:
        model: the plain base, not routed. It comes back as it was.
        left_out: methods that were asked for and are not possible, and why; noted in the results.

    Raises ConfigError for two methods of one name, no tasks, or where not one method could answer;
    the reasons are in the message; or where another process evaluates into `out`. Out of memory is
    a ConfigError too, and what is finished stays.
    """
    evaluation = Evaluation(
        model, tokenizer, pool, methods=methods, tasks=tasks, out=out, settings=settings
    )
    with claimed(Path(out) / ".phatgoose.lock", str(out)):
        evaluation.answer()
        return evaluation.finish(left_out)


class Evaluation:
    """`run_evaluation` in its parts, so that several processes can share one folder.

    Each makes the same evaluation and does other `jobs()`; then one of them calls `answer()`, which
    finds the answers in the folder, and `finish()`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pool: ExpertPool,
        *,
        methods: Sequence[Method],
        tasks: Sequence[EvalTask],
        out: Path,
        settings: RunSettings | None = None,
    ) -> None:
        settings = settings or RunSettings()
        names = [method.name for method in methods]
        if len(set(names)) < len(names) or not names:
            raise ConfigError(f"methods: wanted different names, got {', '.join(names) or 'none'}.")
        asked = [task for task in tasks if task.unanswerable is None]
        if not asked:
            why = "; ".join(f"{t.name}: {t.unanswerable}" for t in tasks) or "none given"
            raise ConfigError(f"tasks: none can be asked ({why}).")
        self.methods, self.tasks, self.out, self.settings = methods, tasks, Path(out), settings
        self.model = model
        self.sizes = settings.sizes(model.device.type)
        rest = settings.share_prompts, self.sizes["tokens"], self.sizes["rows"]
        bench = Bench(model, tokenizer, pool, *rest)
        self.identity = _identify(model, tokenizer, pool)
        stream = [Item(task, place) for task in asked for place in range(len(task.examples))]
        random.Random(settings.seed).shuffle(stream)
        self._run = _Run(
            bench,
            stream,
            out=self.out,
            common={
                "phatgoose": phatgoose.__version__,
                "base": self.identity["base"]["weights"],
                "device": model.device.type,
                "share_prompts": settings.share_prompts,
            },
            size=self.sizes["part"],
            progress=settings.progress,
        )

    def jobs(self) -> dict[str, int]:
        """What can be answered independently of each other: names, and their numbers of examples.

        A method that chooses by the scores of single experts is one job for each of these.
        """
        return {name: len(items) for name, (_, items) in self._run.jobs(self.methods).items()}

    def do(self, job: str) -> None:
        """Answer one of `jobs()`, into the folder."""
        self._run.do(*self._run.jobs(self.methods)[job])

    def answer(self) -> None:
        """Answer by every method what is not in the folder yet."""
        self._run.answer(self.methods)

    def summary(self, tasks: Sequence[EvalTask] | None = None) -> dict[str, Any]:
        """The scores, averages, differences and gains over some of the tasks (None: all)."""
        names = [method.name for method in self.methods]
        tasks = self.tasks if tasks is None else tasks
        reasons = _reasons(tasks, self.methods, self._run.failed)
        return summarise(tasks, names, self._run.scores(), reasons, seed=self.settings.seed)

    def finish(
        self, left_out: Mapping[str, str] | None = None, *, pictures: bool = True
    ) -> dict[str, Any]:
        """Write results.json, table.md and pictures; return the results."""
        run, tasks = self._run, self.tasks
        names = [method.name for method in self.methods]
        failed = {name: run.failed[name] for name in names if name in run.failed}
        if len(failed) == len(names):
            why = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
            raise ConfigError(f"methods: none could answer ({why}).")
        results = {
            "settings": {
                "seed": self.settings.seed,
                "limit": self.settings.limit,
                "general": list(self.settings.general),
                "share_prompts": self.settings.share_prompts,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                **self.sizes,
            },
            "versions": _versions(self.model),
            **self.identity,
            "tasks": {task.name: _describe(task) for task in tasks},
            "methods": {name: run.described[name] for name in names if name in run.described},
            "failed": failed,
            "left_out": dict(left_out or {}),
            **self.summary(),
            "answers": [chunk.path.relative_to(self.out).as_posix() for chunk in run.chunks],
        }
        write_json(self.out / "results.json", results)
        write_bytes(self.out / "table.md", table(results).encode())
        if pictures:
            draw(results, self.out)
        return results


class _Run:
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

    def answer(self, methods: Sequence[Method]) -> None:
        """Answer all; those that need other methods' scores last."""
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
        """What can be answered without the scores of others."""
        found = {m.name: (m, self._items(m)) for m in methods if not isinstance(m, Afterwards)}
        for (name, probe), job in self._probes(methods).items():
            found[f"{name} on {probe or 'all'}"] = job
        return found

    def do(self, method: Method, items: Sequence[Item]) -> None:
        """Answer one job, into the folder; a method that cannot serve its pool leaves nothing."""
        with tqdm(total=len(items), unit="example", disable=not self.progress) as bar:
            self._answer(method, items, bar)

    def _probes(
        self, methods: Sequence[Method]
    ) -> dict[tuple[str, int | None], tuple[Method, list[Item]]]:
        """Single experts on the examples they are chosen by; two that choose alike share them."""
        return {
            (single.name, method.probe): (single, self._probe(method))
            for method in methods
            if isinstance(method, Afterwards)
            for single in method.singles(self.bench)
        }

    def scores(self) -> dict[str, dict[str, list[float]]]:
        """By task and method, in the task's order."""
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
        """All rows of a method; or the reason, where it cannot serve its pool."""
        bar.set_description(method.name)
        self.bench.progress = bar.update
        done, rows = bar.n, []
        try:
            settings = {**self.common, **method.settings(self.bench)}
            chunks = chunks_of(method, items, settings=settings, out=self.out, size=self.size)
            for chunk_rows in answer_chunks(self.bench, method, chunks, known=known):
                rows += chunk_rows
                bar.update(done + len(rows) - bar.n)  # what was read, or known
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

    def _answer_singles(self, probes: Sequence[tuple[Method, list[Item]]], bar: Any) -> None:
        """Write what single experts answer, several in a batch; who reads it counts it."""
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
        """The first examples of each task in the stream, which is shuffled."""
        taken: dict[str, int] = {}
        items = []
        for item in self._items(method):
            taken[item.task.name] = taken.get(item.task.name, 0) + 1
            if method.probe is None or taken[item.task.name] <= method.probe:
                items.append(item)
        return items


def _means(rows: Sequence[tuple[str, Row]]) -> dict[str, dict[str, float]]:
    """Mean score by task and expert."""
    scores: dict[str, dict[str, list[float]]] = {}
    for expert, row in rows:
        scores.setdefault(row["task"], {}).setdefault(expert, []).append(row["score"])
    return {
        task: {expert: sum(some) / len(some) for expert, some in of_task.items()}
        for task, of_task in scores.items()
    }


def _reasons(
    tasks: Sequence[EvalTask], methods: Sequence[Method], failed: Mapping[str, str]
) -> dict[tuple[str, str], str]:
    """Why a method has no score on a task, where it has none."""
    found = {}
    for task in tasks:
        for method in methods:
            words = "held-out tasks" if task.role == "own" else "the experts' own tasks"
            if task.unanswerable:
                found[task.name, method.name] = task.unanswerable
            elif method.name in failed:
                found[task.name, method.name] = failed[method.name]
            elif task.role not in method.roles:
                found[task.name, method.name] = f"defined on {words} only"
    return found


def _describe(task: EvalTask) -> dict[str, Any]:
    return {
        "role": task.role,
        "metric": task.metric,
        "n": len(task.examples),
        "hash": task.hash,
        "contaminated": dict(task.contaminated),
        "unanswerable": task.unanswerable,
    }


def _identify(model: Any, tokenizer: Any, pool: ExpertPool) -> dict[str, Any]:
    """The base and the experts by content."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        weights.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    base = {**identify_base(model, tokenizer).to_json(), "weights": weights.hexdigest()}
    return {"base": base, "experts": pool_hashes(pool)}


def _versions(model: Any) -> dict[str, str]:
    on_gpu = model.device.type == "cuda"
    name = torch.cuda.get_device_name(model.device) if on_gpu else platform.machine()
    return {
        "phatgoose": phatgoose.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "device": f"{model.device.type} ({name})",
    }
