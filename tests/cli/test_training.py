"""train and gate on a few examples: what they write verifies, routes, and loads in PEFT."""

import gzip
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from phatgoose.experts import load_expert, verify_expert
from phatgoose.experts.kinds import KINDS
from phatgoose.experts.lora import WEIGHTS_FILE

TEXTS = [{"text": word * 3} for word in ("goose ", "hat ", "rank ")]
INSTRUCTIONS = [
    {"inputs": "is it a goose?", "targets": "yes", "choices": ["yes", "no"]},
    {"inputs": "is it a hat?", "targets": "no"},
]


@pytest.fixture
def options(world):
    """The options of a short run."""
    return ("--base", world.base, "--data", world.data, "--device", "cpu", "--gate-steps", 5)


def test_train_makes_an_expert(run, world, options):
    argv = ("train", *options, "--out", world.new, "--steps", 5, "--rank", 2, "--json")
    result = run(*argv)
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record["folder"] == str(world.new)
    assert (record["steps"], record["examples"]) == (5, 30)
    model = AutoModelForCausalLM.from_pretrained(world.base)
    assert verify_expert(world.new, model) == []
    expert = load_expert(world.new)
    assert {module.rank for module in expert.modules.values()} == {2}
    assert record["adapter"] == expert.gates.record.adapter
    assert not (world.new / "phatgoose_gates.checkpoint").exists()

    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        plain = model(ids).logits
        adapted = PeftModel.from_pretrained(model, world.new).eval()
        assert not torch.equal(adapted(ids).logits, plain)

    routed = ("--base", world.base, "--experts", world.new, "--top-k", 1, "--max-new-tokens", 8)
    answered = run("generate", "goose", *routed)
    assert answered.code == 0, answered.err
    assert run("experts", "verify", world.new, "--base", world.base).code == 0


def test_train_in_bfloat16_verifies_too(run, world, options):
    argv = ("train", *options, "--out", world.new, "--steps", 3, "--save-dtype", "bfloat16")
    result = run(*argv)
    assert result.code == 0, result.err
    assert result.out.startswith(f"{world.new}: 14 gates after 5 steps on 30 examples, loss ")
    assert verify_expert(world.new) == []
    assert {module.a.dtype for module in load_expert(world.new).modules.values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("rows", [None, TEXTS, INSTRUCTIONS], ids=["prompt", "text", "inputs"])
def test_gate_on_every_kind_of_example(run, world, options, rows):
    if rows:
        world.write_data(*rows)
    folder = world.ungated("one")
    before = (folder / WEIGHTS_FILE).read_bytes()
    result = run("gate", folder, *options, "--json")
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record["steps"] == 5
    assert record["last_loss"] > 0
    assert (folder / WEIGHTS_FILE).read_bytes() == before
    assert run("experts", "verify", folder, "--base", world.base).code == 0


def test_gate_reads_keys_that_peft_leaves_out(run, world, options):
    """PEFT would train gates of an adapter of zeros."""
    plain = world.ungated("one")
    shutil.copytree(plain, world.root / "odd")
    path = world.root / "odd" / WEIGHTS_FILE
    tensors = {k.replace(".weight", ".default.weight"): v for k, v in load_file(path).items()}
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, {"format": "pt"})
    for folder in (plain, world.odd):
        assert run("gate", folder, *options).code == 0
    one, odd = (load_expert(folder).gates for folder in (plain, world.odd))
    assert odd.record.adapter == one.record.adapter
    assert odd.record.last_loss == pytest.approx(one.record.last_loss, rel=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gate_of_another_kind_of_adapter(run, world, options):
    """DoRA with a saved output head: its gates are trained on the base, without PEFT's layers."""
    model = AutoModelForCausalLM.from_pretrained(world.base)
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"])
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(world.new)
    result = run("gate", world.new, *options)
    assert result.code == 0, result.err
    base = AutoModelForCausalLM.from_pretrained(world.base)
    assert verify_expert(world.new, base) == []
    assert "lm_head" in load_expert(world.new).gates.vectors
    assert not list(world.new.glob("*checkpoint*"))


def test_gate_takes_the_base_from_the_adapter(run, world):
    path = world.one / "adapter_config.json"
    config = json.loads(path.read_text())
    argv = ("gate", world.one, "--data", world.data, "--device", "cpu", "--gate-steps", 1)
    path.write_text(json.dumps({**config, "base_model_name_or_path": str(world.base)}))
    assert run(*argv).code == 0
    path.write_text(json.dumps({**config, "base_model_name_or_path": None}))
    result = run(*argv)
    assert result.code == 1
    assert "Pass --base" in result.lines[0]


def test_gate_takes_task_folders_and_compressed_files(run, world, options):
    world.task.mkdir()
    with gzip.open(world.task / "train.jsonl.gz", "wt") as file:
        file.write(world.data.read_text())
    saved = []
    for data in (world.data, world.task):
        assert run("gate", world.one, *options, "--data", data).code == 0
        saved.append((world.one / KINDS["gates"].file).read_bytes())
    assert saved[0] == saved[1]  # and the same examples in the same order give the same gates


def test_gate_goes_on_where_it_was_stopped(run, world, options, monkeypatch):
    argv = ("gate", world.one, *options, "--gate-steps", 12)
    assert run(*argv).code == 0
    wanted = (world.one / KINDS["gates"].file).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("phatgoose.experts.Gates.save", _interrupted)
        assert run(*argv).code == 130
    assert (world.one / "phatgoose_gates.checkpoint").exists()
    assert run(*argv).code == 0
    assert wanted == (world.one / KINDS["gates"].file).read_bytes()


def _interrupted(*_):
    raise KeyboardInterrupt
