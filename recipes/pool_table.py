"""The numbers of `evaluate_pool.py`, and their table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from pool_tasks import Task

from phatgoose.evaluation import Interval, resampled_means
from phatgoose.evaluation.statistics import interval

METHODS = ("base", "own", "routed")
PARTS = ("prompt", "last", "answer")  # of the own expert's share
SMALL_GAIN = 0.02  # own expert over base; below it a task's recovered share is mostly noise
Scores = Mapping[str, Mapping[str, Mapping[int, float]]]  # by task, method, line of the test split


def summarise(tasks: Sequence[Task], scores: Scores) -> dict[str, Any]:
    """Means with 95% bootstrap intervals, by task and over tasks; and the recovered gain.

    The recovered gain is (routed - base) / (own - base), each a mean over the tasks' means, with
    the examples of every task drawn again for the interval, the same for all methods.
    """
    rows: dict[str, Any] = {}
    averages: dict[str, Any] = {}
    for group in ("tasks", "heldout"):
        members = [task for task in tasks if task.group == group]
        methods = [m for m in METHODS if all(m in scores[task.name] for task in members)]
        if not members or not methods:
            continue
        values, samples = [], []
        for number, task in enumerate(members):
            table = np.array([[scores[task.name][m][line] for m in methods] for line in task.lines])
            values.append(table.mean(0))
            samples.append(resampled_means(table, seed=number))
            rows[task.name] = {"group": group, "metric": task.metric, "n": len(task.lines)}
            rows[task.name] |= summary(methods, values[-1], samples[-1])
        averages[group] = {"tasks": len(members)}
        averages[group] |= summary(methods, np.mean(values, axis=0), np.mean(samples, axis=0))
    return {"tasks": rows, "averages": averages}


def summary(methods: Sequence[str], values: np.ndarray, samples: np.ndarray) -> dict[str, Any]:
    """One row of the table: each method's interval, and the recovered gain if it can be told."""
    found: dict[str, Any] = {
        method: asdict(interval(values[i], samples[:, i])) for i, method in enumerate(methods)
    }
    if set(METHODS) <= set(methods):
        base, own, routed = (methods.index(method) for method in METHODS)
        gain = values[own] - values[base]
        found["recovered"] = None
        if gain >= SMALL_GAIN:
            gains = samples[:, own] - samples[:, base]
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = (samples[:, routed] - samples[:, base]) / gains
            value = (values[routed] - values[base]) / gain
            # A draw without any gain says nothing on how much of it was recovered.
            found["recovered"] = asdict(interval(value, ratios[gains > 0]))
    return found


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    settings, averages = results["settings"], results["averages"]
    lines = [
        "# The pool on its own tasks, and on held-out ones",
        "",
        f"{len(results['experts'])} experts; router {settings['router']}, top {settings['top_k']}, "
        f"temperature {settings['temperature']:g}, scale {settings['scale']}. "
        f"At most {settings['limit']} test examples a task, seed {settings['seed']}; "
        f"{settings['dtype']} on {results['versions']['device']}.",
        "",
        "Scores are 0 to 100, with a 95% bootstrap interval over the examples. *Base* is the bare "
        "model. *Own* is told the task and uses its expert alone. *Routed* is the pool, given all "
        "tasks' examples shuffled and unlabelled. *Recovered* is (routed - base) / (own - base), "
        f"left out where own gains less than {SMALL_GAIN * 100:g} points.",
    ]
    if results["own_share"]:
        lines += [
            "",
            "*Own share*: how much of the routing weight goes to the task's own expert, over all "
            "prompt tokens / the last one / the answer's tokens. "
            f"Chance is {100 / len(results['experts']):.1f}%.",
        ]
    for group, title in (("tasks", "Tasks with an expert"), ("heldout", "Held-out tasks")):
        if group in averages:
            lines += ["", f"## {title}", "", *group_table(results, group)]
    return "\n".join(lines) + "\n"


def group_table(results: dict[str, Any], group: str) -> Iterator[str]:
    average, shares = results["averages"][group], results["own_share"]
    columns = [m for m in (*METHODS, "recovered") if m in average]
    with_shares = group == "tasks" and bool(shares)
    heads = ["task", "metric", "n", *columns, *(["own share"] if with_shares else [])]
    yield "| " + " | ".join(heads) + " |"
    yield "|---|---|--:|" + "--:|" * (len(heads) - 3)
    rows = {name: r for name, r in results["tasks"].items() if r["group"] == group}
    for name, values in rows.items():
        cells = [name, values["metric"], str(values["n"]), *(cell(values[c]) for c in columns)]
        if with_shares:
            parts = (shares[name][part] for part in PARTS)
            cells.append(" / ".join(f"{share:.0%}" for share in parts))
        yield "| " + " | ".join(cells) + " |"
    total = [f"**average of {average['tasks']}**", "", str(sum(r["n"] for r in rows.values()))]
    total += [f"**{cell(average[c])}**" if average[c] else "" for c in columns]
    if with_shares:
        means = (np.mean([s[part] for s in shares.values()]) for part in PARTS)
        total.append(" / ".join(f"{share:.0%}" for share in means))
    yield "| " + " | ".join(total) + " |"


def cell(value: dict[str, float] | None) -> str:
    if value is None:
        return ""
    found = Interval(**value)
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"
