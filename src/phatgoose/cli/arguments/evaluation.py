"""eval."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phatgoose.cli.fields import Command, option
from phatgoose.cli.options import (
    ChatOption,
    ExpertsOptions,
    JsonOption,
    LoadOptions,
    MethodOptions,
)


@dataclass(frozen=True, kw_only=True)
class Evaluate(ChatOption, MethodOptions, ExpertsOptions, LoadOptions, JsonOption):
    """Score methods on tasks, and write a table, pictures and every answer."""

    tasks: Sequence[str] = option(
        "tasks: folders that hold test.jsonl, folders of such folders, or the published suites "
        "t0ho, bbh and bbl",
        metavar="TASK",
    )
    out: Path = option(
        "folder for the results; where it holds some of the same evaluation, that goes on"
    )
    methods: Sequence[str] = option(
        "methods to compare: routers, base, own, single:NAME, retrieval, best_individual, oracle, "
        "multitask and so on, or all; commas work too",
        default=("base,own,phatgoose",),
        metavar="METHOD",
    )
    limit: int | None = option(
        "test examples of each task; without it, all of them", default=None, least=1, metavar="N"
    )
    seed: int = option(
        "seed of which examples are taken, and of the order in which they come", default=0
    )
    oracle_limit: int | None = option(
        "examples of each task that oracle and best_individual choose the best expert by; without "
        "it, all of them",
        default=None,
        least=1,
        metavar="N",
    )
    tokens: int | None = option(
        "tokens in a batch of ranking; without it, 131072, and 8192 on a CPU",
        default=None,
        least=1,
    )
    rows: int | None = option(
        "prompts in a batch of generation; without it, 1024, and 64 on a CPU",
        default=None,
        least=1,
    )
    share_prompts: bool = option(
        "read a prompt once for all its choices, which is faster and the same up to rounding; "
        "--no-share-prompts reads it for each choice",
        default=True,
    )


COMMANDS = (Command("eval", Evaluate, run="evaluation:evaluate"),)
