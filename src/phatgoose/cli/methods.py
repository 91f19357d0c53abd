"""The pool and the methods that a command line names."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from phatgoose.cli.options import ExpertsOptions, MethodOptions
from phatgoose.errors import TaskFormatError
from phatgoose.evaluation import Inputs, LoraHub, Method
from phatgoose.experts import expert_sources
from phatgoose.experts.bases import one_base
from phatgoose.models import DEFAULT
from phatgoose.pool import ExpertPool, subtract_general
from phatgoose.pool.retrieval import build_index
from phatgoose.tasks import Example, load_examples, split_file
from phatgoose.text import visible


def load_pool(asked: ExpertsOptions) -> ExpertPool:
    """The experts of --experts, less what the adapters of --general know."""
    return less_general(whole_pool(asked), asked.general)


def whole_pool(asked: ExpertsOptions) -> ExpertPool:
    """The experts of --experts."""
    sources = expert_sources(asked.experts, asked.base)
    return ExpertPool.load(sources, same_base=asked.same_base)


def base_of(asked: ExpertsOptions, pool: ExpertPool) -> str:
    """The base of --base, or the one that the experts name; that of the package with its experts.

    Raises ConfigError where they name none, or several.
    """
    if asked.base or asked.experts is None:
        return asked.base or DEFAULT
    base = one_base({expert.name: expert.base_name for expert in pool})
    print(f"phatgoose: the base is {visible(base)}, which the experts name", file=sys.stderr)
    return base


def less_general(pool: ExpertPool, general: Sequence[str] | None) -> ExpertPool:
    """New experts, without gates, where there are general adapters; else the pool as it is."""
    if not general:
        return pool
    others = ExpertPool.load(expert_sources(general))
    return ExpertPool(subtract_general(pool, others), same_base=pool.same_base)


def training_examples(
    folder: str | None, pool: ExpertPool, *, chat: bool = False
) -> dict[str, list[Example]]:
    """The training examples of every expert, by name; none without a folder."""
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
    return {name: load_examples(path, chat=chat) for name, path in found.items()}


def tell_found(method: Method) -> None:
    """Say on stderr which weights were found, in the words of --weights."""
    if isinstance(method, LoraHub) and method.found:
        used = [f"{name}={weight:.4g}" for name, weight in method.found.items() if weight]
        words = f"--weights {','.join(used)}" if used else "no expert helps, so the base alone"
        print(f"phatgoose: {method.name}: {words}", file=sys.stderr)


def method_inputs(
    asked: MethodOptions,
    pool: ExpertPool,
    model: Any,
    tokenizer: Any,
    *,
    training: Mapping[str, Sequence[Example]],
    chat: bool = False,
    seed: int = 0,
    cache: Path | None = None,
    probe: int | None = None,
) -> Inputs:
    """What methods can be made of; `cache` is a folder to keep retrieval's index in."""
    index = partial(
        build_index,
        training,
        model,
        tokenizer,
        encoder=asked.encoder,
        seed=seed,
        cache=cache,
    )
    return Inputs(
        pool,
        index=index if training else None,
        multitask=asked.multitask,
        probe=probe,
        weights=asked.weights,
        examples=load_examples(asked.examples, chat=chat) if asked.examples else (),
        seed=seed,
    )
