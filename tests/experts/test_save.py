"""An expert written as a PEFT LoRA folder: PEFT and we read back what it was."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from phatgoose import load_expert, save_expert
from phatgoose.errors import ConfigError
from phatgoose.experts import Expert, LoraModule, adapter_hash, linear_modules
from phatgoose.experts.signatures import KINDS
from tests.tolerances import TOLERANCE, assert_near

BOUND = TOLERANCE[torch.float32]


def mixed(model, **changes):
    """A random adapter of every linear layer, of several ranks and scales."""
    modules = {}
    for i, (name, (n, m)) in enumerate(linear_modules(model).items()):
        if name != "lm_head":
            rank, scale = ((1, 0.5), (2, 2 / 3), (3, 1.7))[i % 3]
            modules[name] = LoraModule(torch.randn(rank, n), torch.randn(m, rank), scale)
    return replace(Expert("mixed", modules, gates=None, base_name="owner/base"), **changes)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@torch.no_grad()
def test_peft_computes_the_same(kind, make_base, tmp_path):
    """More than twenty modules: PEFT then shortens their names for itself."""
    model = make_base(kind).eval()
    expert = mixed(model)
    assert kind != "t5" or len(expert.modules) > 20
    peft_model = PeftModel.from_pretrained(model, save_expert(expert, tmp_path / "saved")).eval()
    layers = {n: m for n, m in peft_model.named_modules() if hasattr(m, "lora_A")}
    assert {name.removeprefix("base_model.model.") for name in layers} == set(expert.modules)
    for name, layer in layers.items():
        lora = expert.modules[name.removeprefix("base_model.model.")]
        x = torch.randn(2, 5, lora.in_features)
        wanted = layer.base_layer(x) + lora.scale * x @ lora.a.T @ lora.b.T
        assert_near(layer(x), wanted, BOUND.output)


def test_loads_as_it_was(make_base, tmp_path):
    expert = mixed(make_base("llama"))
    loaded = load_expert(save_expert(expert, tmp_path / "saved", task_type="CAUSAL_LM"))
    assert adapter_hash(loaded.modules) == adapter_hash(expert.modules)
    assert {n: m.scale for n, m in loaded.modules.items()} == {
        n: m.scale for n, m in expert.modules.items()
    }
    assert (loaded.base_name, loaded.gates, loaded.name) == ("owner/base", None, "saved")


def test_gates_go_along(expert, tmp_path):
    loaded = load_expert(save_expert(expert, tmp_path / "saved", card="# mine\n"))
    assert loaded.gates.record == expert.gates.record
    for name, vector in expert.gates.vectors.items():
        assert torch.equal(loaded.gates.vectors[name], vector)
    assert (tmp_path / "saved" / "README.md").read_text() == "# mine\n"


def test_every_kind_of_signature_goes_along(complete_dir, tmp_path):
    complete = load_expert(complete_dir)
    loaded = load_expert(save_expert(complete, tmp_path / "saved"))
    assert set(loaded.signatures) == set(complete.signatures) >= set(KINDS) - {"gates"}
    for kind, signatures in complete.signatures.items():
        found = loaded.signatures[kind]
        assert (found.base, found.adapter) == (signatures.base, signatures.adapter)
        assert (found.examples, found.tokens) == (signatures.examples, signatures.tokens)
        assert found.vectors.keys() == signatures.vectors.keys()
        for name, vector in signatures.vectors.items():
            assert torch.equal(found.vectors[name], vector)


def test_patterns_name_one_module_alone(tmp_path):
    """One module's name may be the end of another's, and hold what means something in a pattern."""
    ranks = {"q": 1, "up.q": 2, "up-q": 3, "u.q": 2, "upxq": 2}
    modules = {n: LoraModule(torch.ones(r, 4), torch.ones(4, r), r) for n, r in ranks.items()}
    save_expert(Expert("x", modules, gates=None, base_name=None), tmp_path / "x")
    loaded = load_expert(tmp_path / "x").modules
    assert {name: (lora.rank, lora.scale) for name, lora in loaded.items()} == {
        name: (rank, rank) for name, rank in ranks.items()
    }


def test_nothing_is_overwritten_and_nothing_left_half_done(expert, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    with pytest.raises(ConfigError, match="full: is no empty folder"):
        save_expert(expert, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["note"]

    def fail(*_):
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(type(expert.gates), "write", fail)
    with pytest.raises(KeyboardInterrupt):
        save_expert(expert, tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == before
