"""Names of bases: twins are told once, doubts are a warning, and adapters lead to their base."""

import logging
import warnings
from dataclasses import replace

import pytest

from phatgoose import ExpertPool, merge_experts, route
from phatgoose.errors import ConfigError, IncompatibleExpertError
from phatgoose.experts import BaseIdentity, Expert, load_expert, verify_expert
from phatgoose.experts.bases import (
    BaseWarning,
    base_in_config,
    one_base,
    refuse_other,
    same_name,
    tell_bases,
)

LLAMA, MISTRAL = "meta-llama/Meta-Llama-3-8B", "mistralai/Mistral-7B-v0.1"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (LLAMA, "unsloth/llama-3-8b-bnb-4bit", True),
        ("meta-llama/Llama-3.1-8B", "unsloth/Meta-Llama-3.1-8B-bnb-4bit", True),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", True),
        ("mistralai/Mistral-7B-v0.1", "TheBloke/Mistral-7B-v0.1-AWQ", True),
        ("meta-llama/Llama-2-7b-hf", "NousResearch/Llama-2-7b", True),
        (LLAMA, "/root/models/Meta-Llama-3-8B", True),
        ("a/Model", "a/model", True),
        (LLAMA, MISTRAL, False),
        (LLAMA, "meta-llama/Meta-Llama-3-8B-Instruct", False),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf", False),
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.3", False),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-14B", False),
        ("a/4bit", "a/8bit", False),
    ],
)
def test_which_names_are_of_one_base(one, other, same):
    assert same_name(one, other) is same_name(other, one) is same


def named(**bases):
    return [Expert(name, {}, base_name=base) for name, base in bases.items()]


def model(name, tokenizer=None):
    return BaseIdentity(name, None, "shape", tokenizer)


@pytest.mark.parametrize("known", [None, model(LLAMA)])
def test_another_base_is_a_warning_that_names_both(known):
    with pytest.warns(BaseWarning) as heard:
        tell_bases(named(a=LLAMA, b=MISTRAL, c=MISTRAL, d=None), known)
    (said,) = [str(warning.message) for warning in heard]
    assert said.startswith("2 experts (b, ...): made on the base " + MISTRAL) and LLAMA in said
    assert "--same-base" in said and "\n" not in said


@pytest.mark.parametrize(
    ("bases", "known", "told"),
    [
        ({"a": LLAMA}, model(LLAMA), None),
        ({"a": None}, model(LLAMA), None),
        ({"a": "base"}, model("base"), None),
        ({"a": "/somewhere/base"}, model("base"), None),
        ({"a": LLAMA, "b": LLAMA}, None, None),
        ({"a": "unsloth/llama-3-8b-bnb-4bit"}, model(LLAMA), "a: the base that they call unsloth"),
        ({"a": "/root/model"}, model(LLAMA), "call /root/model counts as " + LLAMA),
        ({"a": LLAMA}, model("my-copy"), f"call {LLAMA} counts as my-copy"),
        ({"a": LLAMA, "b": "/x/y"}, None, "b: the base that they call /x/y counts as " + LLAMA),
    ],
)
def test_what_counts_as_one_base_is_told_once(bases, known, told, caplog):
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        tell_bases(named(**bases), known)
    assert caplog.text.count("counts as") == (told is not None)
    assert told is None or told in caplog.text


def test_it_can_be_settled(caplog):
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        tell_bases(named(a=MISTRAL), model(LLAMA), same_base=True)
    assert f"{MISTRAL} counts as {LLAMA}" in caplog.text


def with_signatures(expert, **fields):
    gates = expert.gates
    return replace_gates(expert, replace(gates.record, base=replace(gates.base, **fields)))


def replace_gates(expert, record):
    return Expert(expert.name, expert.modules, type(expert.gates)(expert.gates.vectors, record))


def test_equal_tokenizers_make_two_names_one_base(expert, caplog):
    one = with_signatures(expert, name=LLAMA, tokenizer="same")
    other = with_signatures(expert, name=MISTRAL, tokenizer="same")
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        tell_bases([one, other])
    assert "counts as" in caplog.text
    with pytest.warns(BaseWarning):
        tell_bases([one, with_signatures(expert, name=MISTRAL, tokenizer=None)])


def test_a_pool_of_many_names(expert, make_base, caplog):
    """Names keep nobody out; a tokenizer does."""
    one = with_signatures(expert, name=LLAMA)
    other = replace(with_signatures(expert, name=MISTRAL), name="other")
    with pytest.warns(BaseWarning, match=MISTRAL):
        route(make_base("llama"), ExpertPool([one, other]))
    with pytest.warns(BaseWarning, match=MISTRAL):
        merge_experts([one, other])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        route(make_base("llama"), ExpertPool([one, other]), same_base=True)
        settled = ExpertPool([one, other], same_base=True)
        route(make_base("llama"), settled)
        merge_experts(settled)
    pair = [with_signatures(e, tokenizer=t) for e, t in ((one, "x"), (other, "y"))]
    pair[1] = replace(pair[1], name="other")
    with pytest.raises(IncompatibleExpertError, match="the tokenizers differ"):
        ExpertPool(pair, same_base=True)


def test_an_expert_that_joins_is_told_of(expert, make_base):
    base = make_base("llama")
    base.config._name_or_path = LLAMA
    pool = ExpertPool([with_signatures(expert, name=LLAMA)])
    route(base, pool)
    other = replace(with_signatures(expert, name=MISTRAL), name="other")
    with pytest.warns(BaseWarning, match="other: made on the base " + MISTRAL):
        pool.add(other)


def test_verify_warns(expert_dir, edit_json, make_base):
    edit_json(expert_dir / "adapter_config.json", base_model_name_or_path=MISTRAL)
    base = make_base("llama")
    base.config._name_or_path = LLAMA
    with pytest.warns(BaseWarning, match=MISTRAL):
        assert verify_expert(expert_dir, base) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verify_expert(expert_dir, base, same_base=True) == []


def test_what_trains_into_a_folder_is_strict(expert):
    """An expert that is there already counts as done only if its base is surely the same."""
    one = with_signatures(expert, name=LLAMA)
    shape = one.base.shape
    twin, other = (BaseIdentity(n, None, shape, None) for n in ("unsloth/llama-3-8b", MISTRAL))
    assert refuse_other(one, twin) is None
    assert refuse_other(one, other) == f"the base models are named {LLAMA} and {MISTRAL}"
    assert "differ in type" in refuse_other(one, replace(other, shape="x"))


def test_the_base_that_all_name():
    assert one_base({"a": LLAMA, "b": None, "c": "unsloth/llama-3-8b-bnb-4bit"}) == LLAMA
    assert one_base({"a": "/x/base", "b": "base"}) == "/x/base"
    with pytest.raises(ConfigError, match=r"2 experts \(a, \.\.\.\): .*Pass --base"):
        one_base({"a": None, "b": ""})
    with pytest.raises(ConfigError, match=f"b: its base is {MISTRAL}, that of a is {LLAMA}"):
        one_base({"a": LLAMA, "b": MISTRAL})


def test_the_base_in_a_config(expert_dir, edit_json):
    edit_json(expert_dir / "adapter_config.json", base_model_name_or_path=LLAMA)
    assert base_in_config(expert_dir) == base_in_config(f"x={expert_dir}") == LLAMA
    assert load_expert(expert_dir).base_name == LLAMA
