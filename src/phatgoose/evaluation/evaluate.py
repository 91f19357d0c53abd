"""Turns examples into scored answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phatgoose.errors import ConfigError
from phatgoose.evaluation.batches import Experts, Progress
from phatgoose.evaluation.generation import BATCH_SIZE, MAX_NEW_TOKENS, generate_answers
from phatgoose.evaluation.metrics import accuracy, metric_by_name
from phatgoose.evaluation.scoring import MAX_TOKENS, rank_choices
from phatgoose.tasks import Example


@dataclass(frozen=True)
class Answer:
    """A model's answer to one example."""

    prediction: str
    target: str
    score: float  # 0 to 1


def evaluate(
    model: Any, tokenizer: Any, examples: Sequence[Example], metric: str, **settings: Any
) -> list[Answer]:
    """Answer every example and score the answers; `settings` are those of `predict`.

    `metric` is for generated text; examples with choices are scored by accuracy. The model answers
    as it is: routed, restricted to some experts, or plain.

    Raises ConfigError for an unknown metric, or "accuracy" where an example has no choices.
    """
    _check_metric(examples, metric)
    return grade(predict(model, tokenizer, examples, **settings), examples, metric)


def predict(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int | Sequence[int] = MAX_NEW_TOKENS,
    max_tokens_per_batch: int = MAX_TOKENS,
    batch_size: int = BATCH_SIZE,
    share_prompts: bool = False,
    experts: Experts | None = None,
    progress: Progress = False,
) -> list[str]:
    """Answer each example by the likeliest of its choices, or in words if it has none.

    Examples of any tasks may be mixed. `max_tokens_per_batch` and `share_prompts` are for ranking
    (see `score_choices`), `max_new_tokens` and `batch_size` for generating (see
    `generate_answers`). `experts` has a routed model answer each example by one of them, by a
    mixture, or by the bare base if it is None. `progress` shows bars on stderr, or is told how
    many more examples are answered.
    """
    ranked = [i for i, example in enumerate(examples) if example.choices is not None]
    written = [i for i, example in enumerate(examples) if example.choices is None]
    chosen = rank_choices(
        model,
        tokenizer,
        [examples[i] for i in ranked],
        max_tokens_per_batch=max_tokens_per_batch,
        share_prompts=share_prompts,
        experts=experts and [experts[i] for i in ranked],
        progress=progress,
    )
    if not isinstance(max_new_tokens, int):
        max_new_tokens = [max_new_tokens[i] for i in written]
    generated = generate_answers(
        model,
        tokenizer,
        [examples[i] for i in written],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        experts=experts and [experts[i] for i in written],
        progress=progress,
    )
    answers = dict(zip([*ranked, *written], [*chosen, *generated], strict=True))
    return [answers[i] for i in range(len(examples))]


def grade(predictions: Sequence[str], examples: Sequence[Example], metric: str) -> list[Answer]:
    """Score predictions against their examples' targets; see `evaluate` for metric and errors."""
    _check_metric(examples, metric)
    score = metric_by_name(metric)
    answers = []
    for prediction, example in zip(predictions, examples, strict=True):
        value = (score if example.choices is None else accuracy)(prediction, example.target)
        answers.append(Answer(prediction, example.target, value))
    return answers


def _check_metric(examples: Sequence[Example], metric: str) -> None:
    metric_by_name(metric)
    if metric == "accuracy":
        for example in examples:
            if example.choices is None:
                raise ConfigError(
                    f"accuracy wants choices, {example.prompt[:40]!r} has none. Use exact_match."
                )
