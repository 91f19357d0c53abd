"""eval."""

import json
from argparse import Namespace
from pathlib import Path

import torch

from phatgoose import default
from phatgoose.cli.methods import less_general, method_inputs, training_examples
from phatgoose.errors import ConfigError
from phatgoose.evaluation import (
    RunSettings,
    make_methods,
    read_tasks,
    run_evaluation,
    table,
)
from phatgoose.experts.sources import expert_sources
from phatgoose.models import load_base
from phatgoose.pool import ExpertPool

CARD = "README.md"


def evaluate(arguments: Namespace) -> None:
    """Score methods on tasks; print the table."""
    settings = RunSettings(
        seed=arguments.seed,
        limit=arguments.limit,
        general=arguments.general or (),
        share_prompts=arguments.share_prompts,
        tokens=arguments.tokens,
        rows=arguments.rows,
    )
    if arguments.oracle_limit is not None and arguments.oracle_limit < 1:
        raise ConfigError(f"--oracle-limit must be at least 1, got {arguments.oracle_limit}.")
    names = [name for given in arguments.methods for name in given.split(",") if name]
    whole, out = ExpertPool.load(expert_sources(arguments.experts)), Path(arguments.out)
    pool = less_general(whole, arguments.general)
    training = training_examples(arguments.train_tasks, pool)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    model, tokenizer = load_base(
        arguments.base or default.BASE, device=arguments.device, dtype=dtype
    )
    inputs = method_inputs(
        arguments,
        pool,
        model,
        tokenizer,
        training=training,
        seed=arguments.seed,
        cache=out,
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
        cards=_cards(whole),
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


def _cards(pool: ExpertPool) -> dict[str, str]:
    """The experts' model cards, where they have one."""
    paths = {e.name: e.folder / CARD for e in pool if e.folder and (e.folder / CARD).is_file()}
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
