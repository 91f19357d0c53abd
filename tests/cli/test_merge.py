"""experts merge."""

import json

from peft import PeftModel
from transformers import AutoModelForCausalLM

from phatgoose import load_expert, merge_experts
from phatgoose.experts import adapter_hash
from tests.models import save_expert


def test_merges_into_a_folder_that_peft_loads(run, world):
    out = world.root / "both"
    result = run("experts", "merge", world.one, world.two, "--out", out, "--base", world.base)
    assert result.code == 0, result
    assert result.out == f"{out}: average of 2 experts, rank 6, 4 modules, no gates\n"
    wanted = merge_experts([load_expert(world.one), load_expert(world.two)])
    assert adapter_hash(load_expert(out).modules) == adapter_hash(wanted.modules)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(world.base)
    assert config["task_type"] == "CAUSAL_LM"
    assert "one, two" in (out / "README.md").read_text()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base), out)


def test_every_option_reaches_the_merge(run, world):
    out = world.root / "both"
    options = "--method dare_ties_svd --rank 2 --density 0.5 --seed 4 --weights 1 -0.5 --json"
    result = run("experts", "merge", world.one, world.two, "--out", out, *options.split())
    assert result.code == 0, result
    row = json.loads(result.out)
    assert (row["folder"], row["rank"], row["gates"]) == (str(out), 2, False)
    assert row["merged"] == ["one", "two"]
    wanted = merge_experts(
        [load_expert(world.one), load_expert(world.two)],
        method="dare_ties_svd",
        rank=2,
        density=0.5,
        seed=4,
        weights=[1.0, -0.5],
    )
    assert adapter_hash(load_expert(out).modules) == adapter_hash(wanted.modules)


def test_refuses_in_one_line(refuses, world, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(world.base)
    wide = save_expert(tmp_path / "wide", model, seed=5, targets=["q_proj"], rank=5)
    merge = ("experts", "merge", world.one)
    out = ("--out", world.root / "new")
    refuses(*merge, world.two, "--out", world.two, says=[world.two, "no empty folder"])
    refuses(*merge, wide, "--method", "linear", *out, says=["rank 3 (one), rank 5 (wide)"])
    refuses(*merge, world.two, "--method", "mean", *out, says=["mean", "average, linear"])
    refuses(*merge, world.foreign(), *out, says=["foreign", "another base"])
    refuses(*merge, *out, "--base", world.other, says=["one", "the base maps"])
