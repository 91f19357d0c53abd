"""Answers prompts that belong to no task, by any method."""

from collections.abc import Sequence
from typing import Any

from phatgoose.errors import ConfigError
from phatgoose.evaluation.eval_tasks import EvalTask, Item
from phatgoose.evaluation.generation import MAX_NEW_TOKENS
from phatgoose.evaluation.methods import BOTH, Bench, Method
from phatgoose.pool import ExpertPool
from phatgoose.tasks import Example


def answer_prompts(
    model: Any,
    tokenizer: Any,
    pool: ExpertPool,
    prompts: Sequence[str | Example],
    method: Method,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """Answer each prompt greedily, by the code that answers the tasks of an evaluation.

    `model` is the plain base, and comes back as it was. All prompts go in one batch.

    Raises ConfigError for a method that is defined on tasks only, and what `Method.ready` raises
    where the pool does not serve the method.
    """
    if method.roles != BOTH:
        raise ConfigError(
            f"{method.name}: is told by an example's task which expert to use, and a prompt has "
            "none. Choose single:NAME, retrieval or a router; phatgoose eval knows tasks."
        )
    examples = [Example(p, "") if isinstance(p, str) else p for p in prompts]
    asked = EvalTask(
        "prompts", "heldout", "exact_match", range(len(prompts)), examples, max_new_tokens
    )
    bench = Bench(model, tokenizer, method.pool or pool, rows=max(1, len(prompts)))
    with method.ready(bench) as answer:
        return answer([Item(asked, place) for place in range(len(prompts))])
