"""eval."""

import json
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from phatgoose import default
from phatgoose.cli.sources import expert_sources
from phatgoose.errors import ConfigError, TaskFormatError
from phatgoose.evaluation import (
    Inputs,
    RunSettings,
    make_methods,
    read_tasks,
    run_evaluation,
    table,
)
from phatgoose.models import load_base
from phatgoose.pool import ExpertPool
from phatgoose.pool.retrieval import build_index
from phatgoose.tasks import Example, load_examples, split_file

CARD = "README.md"


def evaluate(arguments: Namespace) -> None:
    """Score methods on tasks; print the table."""
    settings = RunSettings(
        seed=arguments.seed,
        limit=arguments.limit,
        share_prompts=arguments.share_prompts,
        tokens=arguments.tokens,
        rows=arguments.rows,
    )
    if arguments.oracle_limit is not None and arguments.oracle_limit < 1:
        raise ConfigError(f"--oracle-limit must be at least 1, got {arguments.oracle_limit}.")
    names = [name for given in arguments.methods for name in given.split(",") if name]
    pool, out = ExpertPool.load(expert_sources(arguments.experts)), Path(arguments.out)
    training = _training(arguments.train_tasks, pool)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    model, tokenizer = load_base(
        arguments.base or default.BASE, device=arguments.device, dtype=dtype
    )
    index = partial(
        build_index,
        training,
        model,
        tokenizer,
        encoder=arguments.encoder,
        seed=arguments.seed,
        cache=out,
    )
    inputs = Inputs(
        pool,
        index=index if training else None,
        multitask=Path(arguments.multitask) if arguments.multitask else None,
        probe=arguments.oracle_limit,
    )
    methods, left_out = make_methods(names, inputs)
    tasks = read_tasks(
        arguments.tasks,
        pool.names,
        model,
        tokenizer,
        limit=arguments.limit,
        seed=arguments.seed,
        training=training,
        cards=_cards(pool),
    )
    results = run_evaluation(
        model,
        tokenizer,
        pool,
        methods=methods,
        tasks=tasks,
        out=out,
        settings=settings,
        left_out=left_out,
    )
    print(json.dumps(results, ensure_ascii=False) if arguments.json else table(results))


def _training(folder: str | None, pool: ExpertPool) -> dict[str, list[Example]]:
    """The training examples of every expert, by name."""
    if folder is None:
        return {}
    found: dict[str, Any] = {name: split_file(Path(folder) / name, "train") for name in pool.names}
    lacking = [name for name, path in found.items() if path is None]
    if lacking:
        raise TaskFormatError(
            f"{folder}: holds no {lacking[0]}/train.jsonl, and retrieval needs the prompts of "
            f"every expert ({len(lacking)} of {len(pool)} lack them). Name task folders like "
            "experts."
        )
    return {name: load_examples(path) for name, path in found.items()}


def _cards(pool: ExpertPool) -> dict[str, str]:
    """The experts' model cards, where they have one."""
    paths = {e.name: e.folder / CARD for e in pool if e.folder and (e.folder / CARD).is_file()}
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
