"""The own expert's share against the trace's own sums, one example at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import phatgoose
from phatgoose.evaluation import OwnShare, own_share
from phatgoose.tasks import Example, encode

EXAMPLES = [Example("a prompt: ", "abc"), Example("b", "its answer"), Example("cd ef", "g")]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_shares_of_all_experts_sum_to_one(
    family: str, make_routed: Callable[..., nn.Module], tokenizer: Any
) -> None:
    model = make_routed(family)
    shares = [own_share(model, tokenizer, EXAMPLES, name) for name in ("e0", "e1", "e2")]
    for part in ("prompt", "last", "answer"):
        assert sum(getattr(share, part) for share in shares) == pytest.approx(1, abs=1e-5)
    with phatgoose.restrict(model, ["e0"]):
        assert own_share(model, tokenizer, EXAMPLES, "e0") == OwnShare(1.0, 1.0, 1.0)


def test_share_of_one_expert(make_routed: Callable[..., nn.Module], tokenizer: Any) -> None:
    model = make_routed("llama")
    parts: dict[str, list[float]] = {"prompt": [], "last": [], "answer": []}
    for example in EXAMPLES:
        ids = encode(tokenizer, example.prompt, example.target, max_length=64)
        tokens = torch.tensor([ids.prompt + ids.target[:-1]])
        with torch.no_grad(), phatgoose.record(model) as trace:
            model(tokens)
        share = torch.stack(
            [(trace.weights[m] * (trace.experts[m] == 1)).sum(-1) for m in trace.experts]
        ).mean(0)
        end = len(ids.prompt)
        parts["prompt"] += share[:end].tolist()
        parts["last"] += share[end - 1 : end].tolist()
        parts["answer"] += share[end:].tolist()
    for budget in (1, 30, 1000):
        found = own_share(model, tokenizer, EXAMPLES, "e1", max_tokens_per_batch=budget)
        for part, values in parts.items():
            assert getattr(found, part) == pytest.approx(sum(values) / len(values), abs=1e-5)
