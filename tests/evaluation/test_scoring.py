"""Rank classification against the same thing written out for one choice at a time."""

from collections.abc import Callable, Sequence
from functools import partial, update_wrapper
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import phatgoose
from phatgoose.errors import ConfigError
from phatgoose.evaluation import rank_choices, score_choices
from phatgoose.models import cache_argument, cache_of
from phatgoose.routers import PhatgooseRouter
from phatgoose.tasks import Example, encode
from phatgoose.types import TokenContext
from tests.evaluation.conftest import EOS
from tests.models import VOCABULARY, make_model
from tests.tolerances import TOLERANCE, assert_near

FAMILIES = ("llama", "gpt2", "phi3", "t5")


def naive_scores(model: nn.Module, tokenizer: Any, examples: Sequence[Example]) -> list[Tensor]:
    """No batches, no padding, no cache: the sum of log p over the answer's tokens, by count."""
    seq2seq = model.config.is_encoder_decoder
    scores = []
    for example in examples:
        row = []
        for choice in example.choices or ():
            ids = encode(tokenizer, example.prompt, choice, max_length=64, seq2seq=seq2seq)
            assert ids.target[-1] == EOS
            prompt, target = torch.tensor([ids.prompt]), torch.tensor([ids.target])
            with torch.no_grad():
                if seq2seq:
                    logits = model(input_ids=prompt, labels=target).logits
                else:
                    whole = torch.cat([prompt, target], dim=1)
                    logits = model(input_ids=whole).logits[:, prompt.shape[1] - 1 : -1]
            row.append(-nn.functional.cross_entropy(logits[0], target[0]))
        scores.append(torch.stack(row))
    return scores


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("routed", [False, True], ids=["plain", "routed"])
def test_scores_are_those_of_one_choice_at_a_time(
    family: str,
    routed: bool,
    make_routed: Callable[..., nn.Module],
    tokenizer: Any,
    choice_examples: list[Example],
) -> None:
    model = make_routed(family, routed)
    wanted = naive_scores(model, tokenizer, choice_examples)
    best = [e.choices[int(s.argmax())] for e, s in zip(choice_examples, wanted, strict=True)]
    bound = TOLERANCE[torch.float32].output
    for settings in (
        {"max_tokens_per_batch": 200},
        {"max_tokens_per_batch": 10_000},
        {"max_tokens_per_batch": 1, "share_prompts": True},
        {"max_tokens_per_batch": 10_000, "share_prompts": True},
    ):
        found = score_choices(model, tokenizer, choice_examples, **settings)
        for one, other in zip(found, wanted, strict=True):
            assert_near(torch.tensor(one), other, bound)
        assert rank_choices(model, tokenizer, choice_examples, **settings) == best


def new(input_ids: Tensor, cache: Any = None, **kwargs: Any) -> Any: ...
def old(input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any: ...
def odd(input_ids: Tensor, memory: Any = None, **kwargs: Any) -> Any: ...


def test_a_cache_goes_by_the_name_that_a_model_has_for_it(
    tokenizer: Any, choice_examples: list[Example]
) -> None:
    assert (cache_argument(new), cache_argument(old)) == ("cache", "past_key_values")
    model = make_model("llama")
    model.forward = update_wrapper(partial(type(model).forward, model), odd)  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"odd: .*KV cache.*, but input_ids, memory, kwargs"):
        score_choices(model, tokenizer, choice_examples, share_prompts=True)
    with pytest.raises(
        ConfigError, match="LlamaForCausalLM: its output has no KV cache, only logits"
    ):
        cache_of(make_model("llama"), {"logits": torch.zeros(1)})


def test_routing_changes_scores(
    make_routed: Callable[..., nn.Module], tokenizer: Any, choice_examples: list[Example]
) -> None:
    model = make_routed("llama")
    routed = score_choices(model, tokenizer, choice_examples)
    with phatgoose.restrict(model, []):
        base = score_choices(model, tokenizer, choice_examples)
    for one, other in zip(routed, base, strict=True):
        assert all(abs(a - b) > 1e-4 for a, b in zip(one, other, strict=True))


def test_score_of_a_known_distribution(tokenizer: Any) -> None:
    """All logits equal: every token has probability 1 / vocabulary, whatever the length."""
    model = make_model("llama")
    model.lm_head.weight.data.zero_()
    example = Example("abc", "a", ("a", "bcdefg"))
    (scores,) = score_choices(model, tokenizer, [example])
    assert scores == pytest.approx([-torch.tensor(VOCABULARY).log().item()] * 2)
    # Equal scores: the first wins, in any order of the choices.
    for choices in (("ab", "cd"), ("cd", "ab")):
        tied = Example("abc", "ab", choices)
        assert rank_choices(model, tokenizer, [tied]) == [choices[0]]


def test_a_shared_prompt_still_shows_the_router_every_token(
    make_routed: Callable[..., nn.Module], tokenizer: Any
) -> None:
    """A router's prior may depend on all ids so far, also on those already in the cache."""
    seen: set[str] = set()

    class Looking(PhatgooseRouter):  # type: ignore[misc]
        def prior(self, context: TokenContext, experts: Any) -> None:
            assert context.ids is not None
            for ids, real in zip(context.ids, context.real, strict=True):
                seen.add(tokenizer.decode(ids[real]))

    model = make_routed("llama", router=Looking())
    examples = [
        Example("one prompt", "a", ("abc", "d")),
        Example("b", "a", ("x", "yz")),
    ]
    score_choices(model, tokenizer, examples, share_prompts=True)
    assert seen == {"one promp", "one promptabc", "one promptd", "", "bx", "byz"}


def test_nothing_to_rank(make_routed: Callable[..., nn.Module], tokenizer: Any) -> None:
    model = make_routed("llama", False)
    assert rank_choices(model, tokenizer, []) == []
    with pytest.raises(ConfigError, match="wants choices"):
        rank_choices(model, tokenizer, [Example("a", "b")])
    with pytest.raises(ConfigError, match="nothing of the prompt"):
        rank_choices(model, tokenizer, [Example("", "b", ("b", "c"))])
    with pytest.raises(ConfigError, match="max_tokens_per_batch"):
        rank_choices(model, tokenizer, [Example("a", "b", ("b",))], max_tokens_per_batch=0)


def test_the_model_comes_back_as_it_was(
    make_routed: Callable[..., nn.Module], tokenizer: Any, choice_examples: list[Example]
) -> None:
    model = make_routed("gpt2", False)
    wanted = rank_choices(model, tokenizer, choice_examples)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert rank_choices(model, tokenizer, choice_examples) == wanted  # without dropout
    assert [module.training for module in model.modules()] == modes
