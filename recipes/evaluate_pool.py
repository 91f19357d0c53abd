"""Measure a pool: the base, each expert on its own task, and the routed pool on everything.

    python recipes/evaluate_pool.py TASKS_DIR OUT_DIR --limit 100

TASKS_DIR holds tasks/NAME and heldout/NAME folders and INDEX.json with each task's metric. The
experts' tasks are answered as one unlabelled stream: batches mix all of them. Every cell (a task
under a method) is a file in OUT_DIR and is not made again; results.json and table.md come last.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import phatgoose
from phatgoose import default
from phatgoose.cli.sources import expert_sources
from phatgoose.evaluation import answer, interval, recovered_gain
from phatgoose.files import write_json
from phatgoose.models import load_base
from phatgoose.pool import ExpertPool
from phatgoose.tasks import Example, read_examples, split_file

CHUNK = 256  # examples of the mixed stream answered together


def main() -> int:
    args = arguments()
    index = {r["name"]: r for r in json.loads((args.tasks / "INDEX.json").read_text())}
    pool = ExpertPool.load(expert_sources(args.experts))
    model, tokenizer = load_base(args.base, device=args.device, dtype=torch.float32)
    phatgoose.route(model, pool, args.router, args.top_k, temperature=args.temperature)
    own = {name: load(args, "tasks", name) for name in pool.names}
    held = {name: load(args, "heldout", name) for name in heldout_names(args)}
    cells = Cells(args.out, index, lambda jobs: answer_all(model, tokenizer, jobs))
    for name, examples in own.items():
        with phatgoose.restrict(model, [name]):
            cells.make("own", {name: examples})
    with phatgoose.restrict(model, []):
        cells.make("base", own | held)
    cells.make("routed", own)
    cells.make("routed", held)
    report(args, cells, pool, list(own), list(held))
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", default=default.BASE)
    parser.add_argument("--experts", nargs="+")
    parser.add_argument("--limit", type=int, default=100, help="examples a task")
    parser.add_argument("--heldout", nargs="*", help="names; default: all in TASKS_DIR/heldout")
    parser.add_argument("--router", default="phatgoose")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load(args: argparse.Namespace, kind: str, name: str) -> list[Example]:
    """A fixed random part of a task's test split."""
    path = split_file(args.tasks / kind / name, "test")
    if path is None:
        raise SystemExit(f"{args.tasks / kind / name}: no test file for this task.")
    examples = read_examples(path)
    random.Random(args.seed).shuffle(examples)
    return examples[: args.limit]


def heldout_names(args: argparse.Namespace) -> list[str]:
    if args.heldout is not None:
        return args.heldout
    return sorted(path.name for path in (args.tasks / "heldout").iterdir() if path.is_dir())


Job = tuple[Example, str]  # an example and its metric


def answer_all(model: Any, tokenizer: Any, jobs: list[Job]) -> list[Any]:
    answers = []
    with tqdm(total=len(jobs), unit="example", leave=False) as bar:
        for start in range(0, len(jobs), CHUNK):
            examples, metrics = zip(*jobs[start : start + CHUNK], strict=True)
            answers += answer(model, tokenizer, examples, metrics, progress=bar.update)
    return answers


class Cells:
    """Scores by task and method, one file each, so that an interrupted run goes on."""

    def __init__(
        self, out: Path, index: dict[str, Any], answer: Callable[[list[Job]], list[Any]]
    ) -> None:
        self.out = out
        self.index = index
        self.answer = answer

    def make(self, method: str, tasks: dict[str, list[Example]]) -> None:
        """Answer the tasks that are not there yet, as one shuffled stream."""
        todo = [name for name in tasks if not self._path(name, method).exists()]
        print(f"{method}: {len(todo)} of {len(tasks)} tasks to do", file=sys.stderr)
        jobs = [(name, example) for name in todo for example in tasks[name]]
        random.Random(0).shuffle(jobs)
        found = self.answer([(e, self.index[name]["metric"]) for name, e in jobs]) if jobs else []
        for name in todo:
            rows = [
                {"prompt": e.prompt, "target": e.target, "prediction": a.prediction, "score": a.score}
                for (task, e), a in zip(jobs, found, strict=True)
                if task == name
            ]
            write_json(self._path(name, method), rows)

    def scores(self, task: str, method: str) -> list[float]:
        return [row["score"] for row in json.loads(self._path(task, method).read_text())]

    def _path(self, task: str, method: str) -> Path:
        return self.out / method / f"{task}.json"


def report(
    args: argparse.Namespace, cells: Cells, pool: ExpertPool, own: list[str], held: list[str]
) -> None:
    """Write results.json and table.md, and print the table."""
    results: dict[str, dict[str, Any]] = {}
    for task in own + held:
        for method in ("base", "own", "routed") if task in own else ("base", "routed"):
            scores = cells.scores(task, method)
            low, high = interval(scores)
            mean = sum(scores) / len(scores)
            cell = {"score": 100 * mean, "low": 100 * low, "high": 100 * high, "n": len(scores)}
            results.setdefault(task, {})[method] = cell
    means = {m: {t: results[t][m]["score"] for t in own} for m in ("base", "own", "routed")}
    average = {f"own tasks, {m}": sum(means[m].values()) / len(own) for m in means}
    for method in ("base", "routed") if held else ():
        total = sum(results[task][method]["score"] for task in held)
        average[f"held out, {method}"] = total / len(held)
    gain = recovered_gain(means["base"], means["own"], means["routed"])
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    settings = {k: v for k, v in settings.items() if k not in ("tasks", "out", "base", "experts")}
    written = {
        "results": results,
        "average": average,
        "recovered_gain": gain,
        "settings": settings,
        "experts": {e.name: e.gates.record.adapter if e.gates else None for e in pool},
        "versions": {"phatgoose": phatgoose.__version__, "torch": torch.__version__},
    }
    write_json(args.out / "results.json", written)
    text = table(results, average, gain, own, held)
    (args.out / "table.md").write_text(text)
    print(text)


def table(
    results: dict[str, Any], average: dict[str, float], gain: float, own: list[str], held: list[str]
) -> str:
    def cell(task: str, method: str) -> str:
        c = results[task][method]
        return f"{c['score']:.1f} ({c['low']:.0f}-{c['high']:.0f})"

    lines = ["| expert task | base | own expert | routed pool |", "|---|---|---|---|"]
    lines += [f"| {t} | " + " | ".join(cell(t, m) for m in ("base", "own", "routed")) + " |" for t in own]
    averages = [f"{average[f'own tasks, {m}']:.1f}" for m in ("base", "own", "routed")]
    lines += ["| **average** | " + " | ".join(f"**{a}**" for a in averages) + " |", ""]
    lines += [f"Recovered gain, (routed - base) / (own - base): **{gain:.2f}**", ""]
    if held:
        lines += ["| held-out task | base | routed pool |", "|---|---|---|"]
        lines += [f"| {t} | {cell(t, 'base')} | {cell(t, 'routed')} |" for t in held]
        averages = [f"{average[f'held out, {m}']:.1f}" for m in ("base", "routed")]
        lines += ["| **average** | " + " | ".join(f"**{a}**" for a in averages) + " |"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
