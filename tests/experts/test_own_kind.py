"""A kind of adapter of one's own is one file, this class, and one line in DELTAS.

PEFT's `lora_bias` stands for it: scale * (B A x + bias).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from phatgoose import (
    ExpertPool,
    assign,
    merge_experts,
    restrict,
    route,
    save_expert,
    subtract_general,
    unroute,
)
from phatgoose.errors import ExpertFormatError, UnsupportedAdapterError
from phatgoose.experts import Delta, LoraModule, adapter_hash, load_expert, verify_expert
from phatgoose.experts.delta import LORA_A, LORA_B
from tests.models import make_batch, make_model
from tests.tolerances import TOLERANCE, assert_near

BIAS = "lora_B.bias"

# PEFT warns of merging, which is not done here, and takes a bias for a shard of ZeRO-3.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@final
@dataclass(frozen=True)
class BiasedLora(Delta):
    """A LoRA with a bias behind lora_B."""

    bias: Tensor

    kind: ClassVar[str] = "a LoRA with a bias"
    keys: ClassVar[frozenset[str]] = frozenset({LORA_A, LORA_B, BIAS})
    fields: ClassVar[Mapping[str, object]] = {"lora_bias": True}

    @classmethod
    def read(cls, tensors, scale):
        return cls(tensors[LORA_A], tensors[LORA_B], scale, tensors[BIAS])

    @classmethod
    def merged(cls, low, rest):
        return cls(low.a, low.b, low.scale, rest["bias"] / low.scale)

    @property
    def others(self):
        return {BIAS: self.bias}

    @property
    def rest(self):
        return {"bias": self.scale * self.bias.float()}

    @staticmethod
    def add_rest(output, base, x, mixed, call):
        return output + mixed.shares().to(output.dtype) @ mixed.rest["bias"].to(output.dtype)


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr("phatgoose.experts.deltas.DELTAS", [LoraModule, BiasedLora])


@pytest.fixture
def folders(tmp_path):
    """Two adapters with biases and one without, of the same layers."""
    made = []
    for number, biased in enumerate([True, True, False]):
        torch.manual_seed(number)
        config = LoraConfig(
            r=2 + number, target_modules=["q_proj", "v_proj", "down_proj"], lora_bias=biased
        )
        model = get_peft_model(make_model("llama"), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / f"e{number}")
        made.append(tmp_path / f"e{number}")
    return made


def logits(model, names=None):
    batch = make_batch(model, [5, 3])
    with torch.no_grad():
        if names is None:
            return model(**batch).logits
        with assign(model, names):
            return model(**batch).logits


def peft_logits(folder):
    model = PeftModel.from_pretrained(make_model("llama"), folder).eval()
    return logits(model)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("capacity", [None, 7])
def test_each_row_is_peft_s_own_forward(folders, backend, capacity):
    model = make_model("llama")
    plain = logits(model)
    pool = ExpertPool.load(folders)
    route(model, pool, "uniform", backend=backend, capacity=capacity)
    for folder in folders:
        found = logits(model, [folder.name])
        assert_near(found, peft_logits(folder), TOLERANCE[torch.float32].model)
    both = logits(model, ["e1", None])
    assert_near(both[0], peft_logits(folders[1])[0], TOLERANCE[torch.float32].model)
    assert_near(both[1], plain[1], TOLERANCE[torch.float32].model)
    pool.remove("e0")  # slots move
    assert_near(logits(model, ["e1"]), peft_logits(folders[1]), TOLERANCE[torch.float32].model)
    pool.add(load_expert(folders[0]))
    assert_near(logits(model, ["e0"]), peft_logits(folders[0]), TOLERANCE[torch.float32].model)
    with restrict(model, []):
        assert torch.equal(logits(model), plain)
    unroute(model)
    assert torch.equal(logits(model), plain)


@pytest.mark.usefixtures("known")
def test_a_mixture_is_the_merged_expert_and_has_gradients(folders):
    pool = ExpertPool.load(folders)
    mixed = route(make_model("llama"), pool, "uniform", top_k="all")
    merged = merge_experts(pool)
    assert isinstance(next(iter(merged.modules.values())), BiasedLora)
    alone = route(make_model("llama"), ExpertPool([merged]), "uniform")
    assert_near(logits(mixed), logits(alone), TOLERANCE[torch.float32].model)
    batch = make_batch(mixed, [5, 3])
    inputs = mixed.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    learned = mixed(inputs_embeds=inputs, **batch).logits
    assert_near(learned, logits(mixed), TOLERANCE[torch.float32].model)
    (slope,) = torch.autograd.grad(learned.sum(), inputs)
    assert slope.abs().sum() > 0


@pytest.mark.usefixtures("known")
def test_saved_hashed_verified(folders, tmp_path):
    expert = load_expert(folders[0])
    copy = save_expert(expert, tmp_path / "copy")
    assert_near(peft_logits(copy), peft_logits(folders[0]), TOLERANCE[torch.float32].model)
    assert adapter_hash(load_expert(copy).modules) == adapter_hash(expert.modules)
    name = next(iter(expert.modules))
    module = expert.modules[name]
    changed = {**expert.modules, name: replace(module, bias=module.bias + 1)}
    without = {n: LoraModule(m.a, m.b, m.scale) for n, m in expert.modules.items()}
    hashes = {adapter_hash(modules) for modules in (expert.modules, changed, without)}
    assert len(hashes) == 3
    broken = {**expert.modules, name: replace(module, bias=module.bias * torch.nan)}
    save_expert(replace(expert, modules=broken), tmp_path / "broken")
    assert "lora_B.bias of" in verify_expert(tmp_path / "broken")[0]


@pytest.mark.usefixtures("known")
def test_what_takes_plain_lora_only_says_so(folders):
    pool = ExpertPool.load(folders)
    match = "takes plain LoRA only, and this is a LoRA with a bias"
    for router in ("arrow", "spectr", "seqr"):
        with pytest.raises(UnsupportedAdapterError, match=match):
            route(make_model("llama"), pool, router)
    with pytest.raises(UnsupportedAdapterError, match=match):
        merge_experts(pool, method="ties_svd")
    with pytest.raises(UnsupportedAdapterError, match=match):
        subtract_general([pool["e0"]], [replace(pool["e0"], name="general")], factors=True)


def test_without_its_line_it_is_refused(folders, monkeypatch):
    monkeypatch.setattr("phatgoose.experts.deltas.DELTAS", [LoraModule])
    with pytest.raises((UnsupportedAdapterError, ExpertFormatError), match="bias"):
        load_expert(folders[0])
