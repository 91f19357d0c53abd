import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

import phatgoose
from phatgoose.analysis import summarise
from phatgoose.analysis.summary import layers, sequence_numbers
from phatgoose.errors import RoutingError
from phatgoose.nn import TokenTable, Trace


def test_the_numbers_of_a_hand_made_trace(hand_made: Trace) -> None:
    summary = summarise(hand_made)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["shares"] == pytest.approx(
        {"red": 2 / 6, "blue": 1.75 / 6, "green": 1.5 / 6}  # the largest first
    )
    assert list(summary["shares"]) == ["red", "blue", "green"]
    assert summary["no_expert"] == pytest.approx(0.75 / 6)
    parts = [2 / 6, 1.75 / 6, 1.5 / 6, 0.75 / 6]
    assert summary["entropy"] == pytest.approx(-sum(p * math.log2(p) for p in parts))
    assert summary["largest_weight"] == pytest.approx((0.75 + 0.5 + 1 + 0.5 + 0.75 + 0.75) / 6)
    assert summary["experts_per_token"] == pytest.approx((3 + 3 + 2) / 3)
    first, second = summary["layers"]
    assert (first["name"], first["modules"], second["name"]) == ("0", 1, "1")
    assert first["shares"] == pytest.approx({"red": 1.25 / 3, "blue": 1 / 3, "green": 0.75 / 3})
    assert second["no_expert"] == pytest.approx(0.25)
    assert [(t["sequence"], t["position"]) for t in summary["tokens"]] == [(0, 0), (0, 1), (1, 0)]
    assert [t["expert"] for t in summary["tokens"]] == ["red", "green", "blue"]
    assert [t["share"] for t in summary["tokens"]] == pytest.approx([0.625, 0.625, 0.5])
    assert [t["experts"] for t in summary["tokens"]] == [3, 3, 2]


def test_shares_are_the_mean_weights_of_the_trace(
    routed: Callable[..., nn.Module], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = routed("llama", ["a", "b", "c"], null_score=0.0)
    with phatgoose.record(model) as trace:
        model(**byte_tokenizer(["a cat", "two dogs"], padding=True, return_tensors="pt"))
    summary = summarise(trace)
    assert [summary["shares"][name] for name in "abc"] == pytest.approx(trace.shares().tolist())
    assert summary["no_expert"] == pytest.approx(1 - float(trace.shares().sum()))
    assert 0 < summary["no_expert"] < 1
    assert len(summary["tokens"]) == len(byte_tokenizer("a cattwo dogs").input_ids)


def test_one_expert_takes_all(hand_made: Trace) -> None:
    for module in hand_made.experts:
        hand_made.experts[module] = torch.tensor([[1, -1]] * 3)
        hand_made.weights[module] = torch.tensor([[2.0, 0.0]] * 3)  # unit weights may exceed 1
    summary = summarise(hand_made)
    assert summary["shares"] == {"green": 1, "red": 0, "blue": 0}
    assert (summary["entropy"], summary["largest_weight"]) == (0, 1)
    assert summary["experts_per_token"] == 1


def test_layers_go_by_stack_and_depth() -> None:
    modules = [
        "lm_head",
        "decoder.block.1.layer.1.EncDecAttention.k",
        "model.layers.10.mlp.experts.3.up_proj",
        "model.layers.9.q_proj",
        "transformer.h.1.attn.c_attn",
        "encoder.block.2.layer.0.SelfAttention.q",
        "encoder.block.2.layer.0.SelfAttention.v",
    ]
    trace = Trace(["a"], 1, experts={name: torch.zeros(0, 1) for name in modules})
    found = layers(trace)
    assert list(found) == ["1", "encoder 2", "9", "10", "decoder 1", "lm_head"]
    assert len(found["encoder 2"]) == 2


def test_a_row_that_starts_over_is_a_new_sequence() -> None:
    table = TokenTable(
        ids=torch.zeros(7),
        sequence=torch.tensor([0, 0, 1, 0, 1, 0, 0]),
        position=torch.tensor([0, 1, 0, 2, 1, 0, 1]),
    )
    assert sequence_numbers(table) == [0, 0, 1, 0, 1, 2, 2]


def test_what_cannot_be_read_raises(hand_made: Trace) -> None:
    with pytest.raises(RoutingError, match="empty"):
        summarise(Trace(names=["a"], top_k=1))
    module = next(iter(hand_made.experts))
    uneven = replace(hand_made, experts={**hand_made.experts, module: torch.zeros(2, 2).long()})
    uneven.weights[module] = torch.ones(2, 2)
    with pytest.raises(RoutingError, match="saw 2 tokens, other layers 3"):
        summarise(uneven)
