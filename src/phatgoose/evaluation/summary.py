"""Computes the numbers of an evaluation: means, paired differences and gains, with intervals."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from phatgoose.evaluation.eval_tasks import EvalTask
from phatgoose.evaluation.statistics import RESAMPLES, interval, resampled_means

REFERENCE = "phatgoose"  # what other methods are compared with
SMALL_GAIN = 0.02  # own expert over base; below it the share recovered is mostly noise
Scores = Mapping[str, Mapping[str, Sequence[float]]]  # by task and method, in the task's order
Cell = dict[str, Any]


@dataclass(frozen=True)
class _Means:
    """One method's mean on one task or over several, and what resampling makes of it."""

    value: float
    samples: Float[np.ndarray, " S"]
    n: int

    def cell(self, scale: float = 100) -> Cell:
        found = interval(scale * self.value, scale * self.samples)
        return {"score": found.value, "low": found.low, "high": found.high, "n": self.n}


def missing(reason: str) -> Cell:
    """Make a cell without a score, which says why."""
    return {"score": None, "low": None, "high": None, "n": 0, "reason": reason}


def summarise(
    tasks: Sequence[EvalTask],
    methods: Sequence[str],
    scores: Scores,
    reasons: Mapping[tuple[str, str], str],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Compute all that a table says, 0 to 100, with 95% bootstrap intervals over the examples.

    A draw takes as many examples of each task as it has, with replacement. All methods get the same
    draw, so their differences are paired. Tasks are fixed. An average is the mean of the tasks'
    means. `reasons` says by (task, method) why a score is missing.
    """
    means = _means(tasks, scores, seed=seed, resamples=resamples)
    results = {
        task.name: {
            m: means[task.name][m].cell()
            if m in means[task.name]
            else missing(reasons[task.name, m])
            for m in methods
        }
        for task in tasks
    }
    groups = {
        role: [t for t in tasks if t.role == role and t.unanswerable is None]
        for role in ("heldout", "own")
    }
    over = {role: _averages(group, methods, means) for role, group in groups.items()}
    main = "heldout" if groups["heldout"] else "own"
    why = {role: _why(groups[role], methods, reasons, over[role]) for role in over}
    return {
        "results": results,
        "average_over": main,
        "average": _cells(methods, over[main], why[main]),
        "own_average": _cells(methods, over["own"], why["own"]),
        "difference": _differences(methods, over[main]),
        "differences": {t.name: _differences(methods, means[t.name]) for t in tasks},
        "recovered_gain": _recovered(methods, over["own"], why["own"]),
        "recovered_gains": {
            t.name: {
                m: cell
                for m, cell in _recovered(methods, means[t.name], {}).items()
                if cell["score"] is not None
            }
            for t in groups["own"]
        },
    }


def _means(
    tasks: Sequence[EvalTask], scores: Scores, *, seed: int, resamples: int
) -> dict[str, dict[str, _Means]]:
    found: dict[str, dict[str, _Means]] = {}
    for task in tasks:
        of_task = scores.get(task.name, {})
        found[task.name] = {}
        if of_task:
            table = np.array([of_task[m] for m in of_task], dtype=float).T
            # By the task's name, so that leaving out another task changes no interval.
            own_seed = zlib.crc32(f"{seed} {task.name}".encode())
            samples = resampled_means(table, resamples=resamples, seed=own_seed)
            found[task.name] = {
                m: _Means(float(table[:, i].mean()), samples[:, i], len(table))
                for i, m in enumerate(of_task)
            }
    return found


def _averages(
    group: Sequence[EvalTask], methods: Sequence[str], means: Mapping[str, Mapping[str, _Means]]
) -> dict[str, _Means]:
    """Average over a group of tasks the methods that have a score on every one."""
    found = {}
    for method in methods:
        of_tasks = [means[task.name][method] for task in group if method in means[task.name]]
        if group and len(of_tasks) == len(group):
            value = sum(m.value for m in of_tasks) / len(of_tasks)
            samples = np.mean([m.samples for m in of_tasks], axis=0)
            found[method] = _Means(value, samples, sum(m.n for m in of_tasks))
    return found


def _why(
    group: Sequence[EvalTask],
    methods: Sequence[str],
    reasons: Mapping[tuple[str, str], str],
    there: Mapping[str, _Means],
) -> dict[str, str]:
    """Say why methods have no average."""
    if not group:
        return dict.fromkeys(methods, "no such tasks")
    return {
        m: next(reasons[t.name, m] for t in group if (t.name, m) in reasons)
        for m in methods
        if m not in there
    }


def _cells(
    methods: Sequence[str], means: Mapping[str, _Means], why: Mapping[str, str]
) -> dict[str, Cell]:
    return {m: means[m].cell() if m in means else missing(why[m]) for m in methods}


def _differences(methods: Sequence[str], means: Mapping[str, _Means]) -> dict[str, Cell]:
    """Subtract PHATGOOSE from each method, over the same draws."""
    if REFERENCE not in means:
        return {}
    reference = means[REFERENCE]
    return {
        m: _Means(
            means[m].value - reference.value, means[m].samples - reference.samples, means[m].n
        ).cell()
        for m in methods
        if m in means and m != REFERENCE
    }


def _recovered(
    methods: Sequence[str], means: Mapping[str, _Means], why: Mapping[str, str]
) -> dict[str, Cell]:
    """Compute (method - base) / (own - base) in percent, for every other method."""
    others = [m for m in methods if m not in ("base", "own")]
    lacking = [m for m in ("base", "own") if m not in means]
    if lacking:
        reason = why.get(lacking[0], "not asked for")
        return dict.fromkeys(others, missing(f"needs the score of {lacking[0]}: {reason}"))
    base, own = means["base"], means["own"]
    gain, gains = own.value - base.value, own.samples - base.samples
    if gain < SMALL_GAIN:
        reason = f"own experts gain less than {100 * SMALL_GAIN:g} points over the base"
        return dict.fromkeys(others, missing(reason))
    found = {}
    for m in others:
        if m not in means:
            found[m] = missing(why.get(m, "no score"))
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = (means[m].samples - base.samples) / gains
        # A draw without any gain says nothing on how much of it was recovered.
        value = (means[m].value - base.value) / gain
        found[m] = _Means(value, ratios[gains > 0], means[m].n).cell()
    return found
