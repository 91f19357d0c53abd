"""The tasks that `evaluate_pool.py` asks about."""

import json
import random
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phatgoose.errors import TaskFormatError
from phatgoose.evaluation import grade
from phatgoose.tasks import Example, read_examples, split_file

SPARE_TOKENS, BOUND_STEP = 4, 32  # answers may be this much longer than a task's longest target


@dataclass(frozen=True)
class Task:
    """The examples of one task to answer."""

    name: str
    group: str  # "tasks": has an expert; "heldout"
    metric: str
    lines: list[int]  # which of the test split's examples, from 0
    examples: list[Example]
    max_new_tokens: int  # where answers are generated


@dataclass(frozen=True)
class Item:
    """One example in a stream of many tasks."""

    task: Task
    place: int  # among the task's examples

    @property
    def example(self) -> Example:
        return self.task.examples[self.place]


def read_tasks(args: Namespace, experts: Sequence[str], tokenizer: Any) -> list[Task]:
    """The experts' tasks, then the held-out ones, each with a seeded subset of its test split."""
    index = args.tasks / "INDEX.json"
    try:
        records = {(r["split"], r["name"]): r["metric"] for r in json.loads(index.read_text())}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TaskFormatError(
            f"{index}: is no list of records with name, split and metric ({error!r})."
        ) from None
    own = [("tasks", name) for name in experts if ("tasks", name) in records]
    for name in sorted(set(experts) - {name for _, name in own}):
        print(f"{name}: no task of this name, so it is in the pool only", file=sys.stderr)
    held_out = [] if args.no_heldout else [key for key in records if key[0] == "heldout"]
    return [
        read_task(args, group, name, metric=records[group, name], tokenizer=tokenizer)
        for group, name in [*own, *held_out]
    ]


def read_task(args: Namespace, group: str, name: str, *, metric: str, tokenizer: Any) -> Task:
    path = split_file(args.tasks / group / name, "test")
    if path is None:
        raise TaskFormatError(f"{args.tasks / group / name}: holds no test.jsonl.")
    everything = read_examples(path)
    count = min(args.limit, len(everything))
    lines = sorted(random.Random(f"{args.seed} {name}").sample(range(len(everything)), count))
    examples = [everything[line] for line in lines]
    # A metric that does not fit, or whose package is missing, is better known now than later.
    grade([""] * count, examples, metric)
    longest = max(len(tokenizer(e.target, add_special_tokens=False)["input_ids"]) for e in examples)
    # Rounded up, so that tasks of the mixed stream share batches, which go on until their bound.
    bound = -(-(longest + SPARE_TOKENS) // BOUND_STEP) * BOUND_STEP
    return Task(name, group, metric, lines, examples, bound)
