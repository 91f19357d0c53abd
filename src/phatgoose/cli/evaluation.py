"""eval."""

import json

from phatgoose.cli.arguments.evaluation import Evaluate
from phatgoose.cli.loading import load
from phatgoose.cli.methods import (
    base_of,
    less_general,
    method_inputs,
    tell_found,
    training_examples,
    whole_pool,
)
from phatgoose.evaluation import (
    RunSettings,
    make_methods,
    read_tasks,
    run_evaluation,
    table,
)
from phatgoose.pool import ExpertPool

CARD = "README.md"


def evaluate(asked: Evaluate) -> None:
    """Score methods on tasks; print the table."""
    settings = RunSettings(
        seed=asked.seed,
        limit=asked.limit,
        general=asked.general or (),
        share_prompts=asked.share_prompts,
        tokens=asked.tokens,
        rows=asked.rows,
    )
    names = [name for given in asked.methods for name in given.split(",") if name]
    whole = whole_pool(asked)
    pool = less_general(whole, asked.general)
    training = training_examples(asked.train_tasks, pool, chat=asked.chat)
    model, tokenizer = load(base_of(asked, whole), asked)
    inputs = method_inputs(
        asked,
        pool,
        model,
        tokenizer,
        training=training,
        chat=asked.chat,
        seed=asked.seed,
        cache=asked.out,
        probe=asked.oracle_limit,
    )
    if asked.weights is not None and not {"weights", "all"} & set(names):
        names.append("weights")
    methods, left_out = make_methods(names, inputs)
    tasks = read_tasks(
        asked.tasks,
        pool.names,
        model,
        tokenizer,
        limit=asked.limit,
        seed=asked.seed,
        training=training,
        cards=_cards(whole),
        chat=asked.chat,
    )
    results = run_evaluation(
        model,
        tokenizer,
        pool,
        methods=methods,
        tasks=tasks,
        out=asked.out,
        settings=settings,
        left_out=left_out,
    )
    for method in methods:
        tell_found(method)
    print(json.dumps(results, ensure_ascii=False) if asked.json else table(results))


def _cards(pool: ExpertPool) -> dict[str, str]:
    """The experts' model cards, where they have one."""
    paths = {e.name: e.folder / CARD for e in pool if e.folder and (e.folder / CARD).is_file()}
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
