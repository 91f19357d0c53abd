"""Mixed examples, answered and scored in their own order."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import phatgoose
from phatgoose.errors import ConfigError
from phatgoose.evaluation import (
    Answer,
    evaluate,
    generate_answers,
    grade,
    predict,
    rank_choices,
)
from phatgoose.tasks import Example


def test_mixed_examples_keep_their_order(
    make_routed: Callable[..., nn.Module],
    tokenizer: Any,
    choice_examples: list[Example],
    text_examples: list[Example],
) -> None:
    model = make_routed("llama")
    bounds = [3, 9, 5, 5, 4, 9]
    mixed = [e for pair in zip(choice_examples[:6], text_examples, strict=True) for e in pair]
    mixed_bounds = [b for bound in bounds for b in (1, bound)]
    found = predict(model, tokenizer, mixed, max_new_tokens=mixed_bounds)
    assert found[::2] == rank_choices(model, tokenizer, choice_examples[:6])
    assert found[1::2] == generate_answers(model, tokenizer, text_examples, max_new_tokens=bounds)


def test_evaluate_scores_what_predict_says(
    make_routed: Callable[..., nn.Module], tokenizer: Any, choice_examples: list[Example]
) -> None:
    model = make_routed("llama")
    examples = [*choice_examples, Example("some words", "other words")]
    answers = evaluate(model, tokenizer, examples, "squad_f1", max_new_tokens=4)
    predictions = predict(model, tokenizer, examples, max_new_tokens=4)
    assert [a.prediction for a in answers] == predictions
    assert [a.score for a in answers[:-1]] == [
        float(p == e.target) for p, e in zip(predictions[:-1], choice_examples, strict=True)
    ]


def test_choices_are_scored_by_accuracy_and_text_by_the_metric() -> None:
    examples = [Example("p", "The cat", ("The cat", "cat")), Example("p", "The cat")]
    assert grade(["cat", "cat"], examples, "squad_f1") == [
        Answer("cat", "The cat", 0.0),
        Answer("cat", "The cat", 1.0),
    ]


def test_metrics_that_do_not_fit(make_routed: Callable[..., nn.Module], tokenizer: Any) -> None:
    model = make_routed("llama", False)
    with pytest.raises(ConfigError, match="accuracy wants choices"):
        evaluate(model, tokenizer, [Example("a", "b")], "accuracy")
    with pytest.raises(ConfigError, match="none is called 'bleu'"):
        evaluate(model, tokenizer, [Example("a", "b")], "bleu")


@pytest.mark.parametrize("share", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_each_example_by_an_expert_of_its_own(
    make_routed: Callable[..., nn.Module],
    tokenizer: Any,
    choice_examples: list[Example],
    text_examples: list[Example],
    family: str,
    share: bool,
) -> None:
    model = make_routed(family)
    mixed = [*choice_examples, *text_examples]
    pool = model.__dict__["_phatgoose"].pool.names
    names = [[*pool, None][place % 4] for place in range(len(mixed))]
    found = predict(model, tokenizer, mixed, max_new_tokens=4, share_prompts=share, experts=names)
    for name in {*names}:
        with phatgoose.restrict(model, [] if name is None else [name]):
            alone = predict(model, tokenizer, mixed, max_new_tokens=4)
        places = [place for place, each in enumerate(names) if each == name]
        assert [found[place] for place in places] == [alone[place] for place in places]
    assert len({*found[:3]}) > 1
