"""analyze: where the tokens of whole tasks go, and whether they find their expert."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phatgoose import analysis
from phatgoose.cli.arguments.analysis import Analyze
from phatgoose.cli.inference import routed_model
from phatgoose.cli.options import KNOBS
from phatgoose.cli.sources import by_name
from phatgoose.errors import ConfigError
from phatgoose.nn import RoutingSettings
from phatgoose.reading import read_json
from phatgoose.routers import make_router
from phatgoose.tasks import Example, load_examples, task_folders


def analyze(asked: Analyze) -> None:
    """Route each task's test examples, write numbers and pictures, print a line for each task."""
    folders = by_name(task_folders(asked.tasks))
    tasks = {name: _sample(folder, name, asked) for name, folder in folders.items()}
    named, else_named = _oracles(asked.oracle, tasks)
    model, tokenizer, pool = routed_model(asked)
    own = {task: task for task in tasks if task in pool.names}
    oracle = {**else_named, **own, **named}
    found = analysis.analyse_tasks(model, tokenizer, tasks, oracle=oracle, progress=True)
    files = analysis.save_analyses(
        found, tokenizer, asked.out, settings=_settings(asked), progress=True
    )
    rows = {name: _row(result) for name, result in found.items()}
    if asked.json:
        print(json.dumps({"tasks": rows, "files": list(map(str, files))}, ensure_ascii=False))
        return
    _print(rows)
    each = asked.out / "tasks"
    print(f"\nAll tasks: {files[1]}, {files[2]}. Each task: {each}. Numbers: {files[0]}")


def _settings(asked: Analyze) -> dict[str, Any]:
    """What was asked, with the router's own knobs where none were given."""
    knobs = RoutingSettings.of(make_router(asked.router), **asked.routing())
    return {
        "base": asked.base,
        "general": asked.general,
        "router": asked.router,
        "limit": asked.limit,
        "seed": asked.seed,
        **{knob: getattr(knobs, knob) for knob in KNOBS},
    }


def _sample(folder: Path, name: str, asked: Analyze) -> list[Example]:
    """A seeded subset of a task's test split, in its order."""
    everything = load_examples(folder, "test", chat=asked.chat)
    count = min(asked.limit, len(everything))
    lines = random.Random(f"{asked.seed} {name}").sample(range(len(everything)), count)
    return [everything[line] for line in sorted(lines)]


def _oracles(
    values: Sequence[str], tasks: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """Oracles by task: those named for one task, and those for tasks without an expert."""
    named: dict[str, str] = {}
    else_named: dict[str, str] = {}
    for value in values:
        task, sign, expert = value.partition("=")
        if value.endswith(".json"):
            else_named.update({t: e for t, e in _read_oracles(Path(value)).items() if t in tasks})
        elif not sign:
            else_named.update(dict.fromkeys(tasks, value))
        elif task not in tasks:
            raise ConfigError(
                f"--oracle {value}: no task is named {task}. There are {', '.join(tasks)}."
            )
        else:
            named[task] = expert
    return named, else_named


def _read_oracles(path: Path) -> dict[str, str]:
    """The best single expert of each task, by an evaluation's results."""
    try:
        oracle: dict[str, str] = read_json(path, error=ConfigError)["oracle"]
        if not all(isinstance(expert, str) for expert in oracle.values()):
            raise TypeError("its oracle names no experts")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: no results of an evaluation with its best experts ({error!r}). Wanted "
            '{"oracle": {TASK: EXPERT, ...}}, or name them: --oracle TASK=EXPERT.'
        ) from None
    return oracle


def _row(result: analysis.TaskAnalysis) -> dict[str, Any]:
    """The gist of a task's analysis."""
    numbers = analysis.describe(result)
    most = max(range(len(result.experts)), key=lambda i: numbers["shares"][i])
    keys = ("examples", "tokens", "oracle", "oracle_share", "oracle_rank")
    return {
        **{key: numbers[key] for key in keys},
        "most_used": result.experts[most],
        "most_used_share": numbers["shares"][most],
        "entropy": sum(layer["entropy"] for layer in numbers["layers"]) / len(numbers["layers"]),
        "experts_per_token": {stream: result.distinct_mean(stream) for stream in result.distinct},
    }


def _print(rows: Mapping[str, dict[str, Any]]) -> None:
    lines = [("task", "most used", "Oracle", "share", "rank", "bits", "experts/token")]
    for name, row in rows.items():
        share = row["oracle_share"]
        lines.append(
            (
                name,
                f"{row['most_used']} {row['most_used_share']:.1%}",
                row["oracle"] or "-",
                "-" if share is None else f"{share:.1%}",
                str(row["oracle_rank"] or "-"),
                f"{row['entropy']:.2f}",
                ", ".join(f"{mean:.1f}" for mean in row["experts_per_token"].values()),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())
