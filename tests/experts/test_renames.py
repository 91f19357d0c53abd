"""Module names of an older transformers: PEFT's conversion says what they are now."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from phatgoose import ExpertPool, route, unroute, verify_expert
from phatgoose.errors import IncompatibleExpertError
from phatgoose.experts import GateRecord, Gates, adapter_hash, identify_base, load_expert
from phatgoose.experts.lora import WEIGHTS_FILE
from phatgoose.experts.renames import renamed_for
from phatgoose.train.gates import check_adapter

NEW, OLD = "model.language_model.layers", "language_model.model.layers"
IDS = torch.tensor([[1, 5, 9, 13, 20, 33, 41, 7]])


@pytest.fixture
def gemma():
    """A vision-language model, whose parts have other names since transformers 5."""
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "sliding_window": 64,
        "max_position_embeddings": 128,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4,
        image_token_index=62, boi_token_index=60, eoi_token_index=61,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def old_dir(gemma, tmp_path, edit_tensors):
    """An expert of it by the older names, gates too, as both had them when it was made."""
    config = LoraConfig(r=3, target_modules=r".*language_model.*[.](q_proj|v_proj)")
    tuned = get_peft_model(copy.deepcopy(gemma), config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    tuned.save_pretrained(tmp_path / "old")
    rename = lambda tensors: {k.replace(NEW, OLD): v for k, v in tensors.items()}  # noqa: E731
    edit_tensors(tmp_path / "old" / WEIGHTS_FILE, rename)
    modules = load_expert(tmp_path / "old").modules
    assert all(name.startswith(OLD) for name in modules)
    vectors = {name: torch.randn(32) for name in modules}
    Gates(vectors, GateRecord(identify_base(gemma), adapter_hash(modules))).save(tmp_path / "old")
    return tmp_path / "old"


@torch.no_grad()
def test_an_older_expert_routes_as_peft_computes(gemma, old_dir):
    wanted = PeftModel.from_pretrained(copy.deepcopy(gemma), old_dir).eval()(IDS).logits
    before = gemma(IDS).logits
    assert float((wanted - before).abs().max()) > 0.01  # else PEFT did not read it either
    pool = ExpertPool.load([old_dir])
    route(gemma, pool, top_k=1)
    torch.testing.assert_close(gemma(IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    assert all(name.startswith(NEW) for name in pool["old"].modules)
    twin = load_expert(old_dir, name="twin")
    assert pool.add(twin).modules.keys() == pool["old"].modules.keys()
    pool.remove("old")
    torch.testing.assert_close(gemma(IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    unroute(gemma)
    assert torch.equal(gemma(IDS).logits, before)
    assert verify_expert(old_dir, gemma) == []


def test_signatures_follow_the_names(gemma, old_dir):
    old = load_expert(old_dir)
    new = renamed_for(old, gemma)
    new.gates.check(new.modules, adapter_hash(new.modules), "new")
    for name, vector in old.gates.vectors.items():
        assert new.gates.vectors[name.replace(OLD, NEW)] is vector


def test_names_that_fit_stay(expert, make_base):
    assert renamed_for(expert, make_base("llama")) is expert


def test_names_that_nothing_converts_stay(expert, make_base):
    assert renamed_for(expert, make_base("gpt2")) is expert
    with pytest.raises(IncompatibleExpertError, match="no linear layer of the base"):
        route(make_base("gpt2"), ExpertPool([replace(expert, gates=None)]), "arrow")


def test_gates_are_not_trained_by_names_that_a_folder_has_not(gemma, old_dir, one_line):
    with pytest.raises(IncompatibleExpertError, match="experts convert old --out") as info:
        check_adapter("old", load_expert(old_dir).modules, gemma)
    one_line(info)
