"""Base identities: equal where routing would be exact, different where it would not."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from phatgoose.experts import BaseIdentity, identify_base, linear_modules
from phatgoose.experts.base import base_name, is_hub_name, linear_sizes

KINDS = ["llama", "gpt2", "t5"]
GOOD = {"name": "owner/base", "revision": None, "shape": "0" * 64, "tokenizer": None}


class Tokenizer:
    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_model_is_its_base(kind, make_base, peft_model):
    bare, wrapped = make_base(kind), peft_model(kind)
    assert linear_modules(wrapped) == linear_modules(bare)
    assert identify_base(wrapped) == identify_base(bare)
    assert linear_modules(wrapped.get_base_model()) == linear_modules(bare)
    assert identify_base(wrapped.get_base_model()) == identify_base(bare)


def test_any_adapter_setting_is_looked_through(make_base, peft_model):
    bare = identify_base(make_base("llama"))
    for options in ({"lora_dropout": 0.1}, {"use_dora": True}, {"target_modules": "all-linear"}):
        assert identify_base(peft_model("llama", **options)) == bare


@pytest.mark.parametrize("kind", KINDS)
def test_linear_modules_are_the_linear_layers(kind, make_base):
    model = make_base(kind)
    weights = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    found = linear_modules(model)
    assert set(found) == set(weights)
    for name, (rows, columns) in weights.items():
        sizes = (rows, columns) if kind == "gpt2" and name != "lm_head" else (columns, rows)
        assert found[name] == sizes


def test_weights_do_not_matter(make_base):
    first = identify_base(make_base("llama"))
    torch.manual_seed(1)
    assert identify_base(make_base("llama").to(torch.bfloat16)) == first


def test_the_meta_device_will_do(make_base):
    with torch.device("meta"):
        empty = make_base("t5")
    assert identify_base(empty) == identify_base(make_base("t5"))


def test_other_sizes_differ(make_base):
    small, large = identify_base(make_base("llama")), identify_base(make_base("llama", hidden=16))
    assert small.shape != large.shape
    assert "sizes of their linear layers" in small.difference(large)
    gated, plain = identify_base(make_base("t5")), identify_base(make_base("t5", gated=False))
    assert gated.difference(plain)


def test_the_model_type_matters(make_base):
    one, other = make_base("llama"), make_base("llama")
    other.config.model_type = "mistral"
    assert "differ in type" in identify_base(one).difference(identify_base(other))


def test_the_head_does_not_matter(make_base):
    model = make_base("llama")
    identity = identify_base(model)
    model.resize_token_embeddings(24)
    assert identify_base(model).shape == identity.shape


def test_tokenizers(make_base):
    model = make_base("llama")
    none = identify_base(model)
    one, same = (identify_base(model, Tokenizer("a", "b")) for _ in range(2))
    swapped = identify_base(model, Tokenizer("b", "a"))
    assert one == same and none.tokenizer is None
    assert one.difference(swapped) == swapped.difference(one) == "the tokenizers differ"
    assert none.difference(one) is None and one.difference(none) is None


def test_names_do_not_tell_apart(make_base):
    model = make_base("llama")
    one, two = (identify_base(model, name=name) for name in ("owner/one", "owner/two"))
    local = identify_base(model, name="one")
    assert one.difference(two) is None
    assert one.difference(local) is None and local.difference(two) is None


def test_a_local_path_is_cut_to_its_last_part(make_base, tmp_path, monkeypatch):
    model = make_base("llama")
    folder = tmp_path / "owner" / "base"
    folder.mkdir(parents=True)
    assert identify_base(model, name=str(folder)).name == "base"
    monkeypatch.chdir(tmp_path)
    assert identify_base(model, name="owner/base").name == "base"
    monkeypatch.chdir(folder)
    assert identify_base(model, name=".").name == "base"


def test_a_folder_of_the_hubs_cache_has_the_repositorys_name(make_base, tmp_path):
    folder = tmp_path / "models--owner--base-1" / "snapshots" / "c0ffee"
    folder.mkdir(parents=True)
    assert identify_base(make_base("llama"), name=str(folder)).name == "owner/base-1"


def test_name_and_revision_come_from_the_config(make_base):
    model = make_base("llama")
    assert identify_base(model).name is None and identify_base(model).revision is None
    model.config._name_or_path, model.config._commit_hash = "owner/base", "c0ffee"
    found = identify_base(model)
    assert (found.name, found.revision) == ("owner/base", "c0ffee")
    explicit = identify_base(model, name="owner/other", revision="main")
    assert (explicit.name, explicit.revision) == ("owner/other", "main")


def test_revisions_do_not_tell_apart(make_base):
    one, two = (identify_base(make_base("llama"), revision=r) for r in ("a", "b"))
    assert one != two and one.difference(two) is None


def test_other_weights_of_one_base_are_worth_a_remark(make_base):
    model = make_base("llama")
    one, two = (identify_base(model, name="owner/base", revision=r) for r in ("c0ffee", "Q4_1"))
    remark = "made on owner/base at c0ffee, running at Q4_1: the same layers with other weights"
    assert one.remark(two).startswith(remark)
    assert one.remark(one) is None
    for other in ("owner/other", "local"):
        assert one.remark(identify_base(model, name=other, revision="Q4_1")) is None
    assert one.remark(identify_base(model, name="owner/base")) is None


identities = st.builds(
    BaseIdentity,
    name=st.sampled_from([None, "base", "a/base", "b/base"]),
    revision=st.none(),
    shape=st.sampled_from("xy"),
    tokenizer=st.sampled_from([None, "p", "q"]),
)


@given(identities, identities)
def test_difference_is_reflexive_and_symmetric(one, other):
    assert one.difference(one) is None
    assert (one.difference(other) is None) == (other.difference(one) is None)


@given(identities)
def test_json_round_trip(identity):
    assert BaseIdentity(**identity.to_json()) == identity


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("google/t5-xl-lm-adapt", True),
        ("t5-small", False),
        ("./t5/small", False),
        ("/models/t5", False),
        ("~/t5", False),
        ("../t5", False),
        ("a/b/c", False),
        ("", False),
        (None, False),
    ],
)
def test_hub_names(name, wanted):
    assert is_hub_name(name) is wanted


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("base_model.model.model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("base_model.model.model.layers.0.q_proj.base_layer", "model.layers.0.q_proj"),
        ("model.layers.0.q_proj.base_layer", "model.layers.0.q_proj"),
    ],
)
def test_base_names(path, wanted):
    assert base_name(path) == wanted


def test_only_linear_layers_have_sizes():
    assert linear_sizes(nn.Linear(3, 5)) == (3, 5)
    assert linear_sizes(Conv1D(5, 3)) == (3, 5)
    assert linear_sizes(nn.Embedding(3, 5)) is None
    assert linear_sizes(nn.LayerNorm(3)) is None


def test_a_module_without_config_is_identified():
    model = nn.Sequential(nn.Linear(3, 5))
    assert identify_base(model).name is None
    assert identify_base(model).shape != identify_base(nn.Sequential(nn.Linear(5, 3))).shape
    assert identify_base(model, name=str(Path("no/such/folder/here"))).name


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {**GOOD, "more": 1},
        {**GOOD, "shape": None},
        {**GOOD, "shape": 5},
        {**GOOD, "name": 5},
        {**GOOD, "name": "a\x1bb"},
        {**GOOD, "tokenizer": ["x"]},
    ],
)
def test_what_is_no_identity_is_refused(value):
    assert BaseIdentity.from_json(GOOD).to_json() == GOOD
    with pytest.raises(ValueError, match="base"):
        BaseIdentity.from_json(value)
