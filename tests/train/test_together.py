"""Gates trained together are the gates trained alone."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from phatgoose import (
    Expert,
    ExpertPool,
    load_expert,
    route,
    train_gates,
    train_gates_together,
)
from phatgoose.errors import (
    ConfigError,
    ExpertNotFoundError,
    IncompatibleExpertError,
    TrainingError,
    UntrainedAdapterError,
)
from phatgoose.experts import LoraModule
from phatgoose.train.loop import loop
from tests.tolerances import TOLERANCE, assert_near
from tests.train.test_gated_adapter import assert_unchanged, snapshot
from tests.train.toys import (
    BASES,
    Interrupted,
    PowerCut,
    gpt2,
    joined,
    llama,
    make,
    make_batch,
    make_batches,
    make_collection,
    make_rows,
    make_tokenizer,
    modules_of,
    same,
)

NEAR = TOLERANCE[torch.float32].delta  # after some steps of AdamW
LENGTHS = {"equal": [(6, 4, 5)] * 4, "unequal": [(6, 4, 5), (3,), (7, 7), (5, 2, 8, 8)]}


def together(model, adapters, batches, steps=6, **settings):
    return train_gates_together(model, adapters, batches, steps=steps, progress=False, **settings)


def assert_alone(found, models, batches, steps=6, **settings):
    """Each expert's gates and record are what it gets alone."""
    assert list(found) == list(models)
    for name, model in models.items():
        wanted = train_gates(model, batches[name], steps=steps, progress=False, **settings)
        got = found[name]
        assert got.vectors.keys() == wanted.vectors.keys()
        assert_near(joined(got.vectors), joined(wanted.vectors), NEAR)
        for field in ("base", "adapter", "training", "steps", "examples", "tokens"):
            assert getattr(got.record, field) == getattr(wanted.record, field), field
        assert got.record.first_loss == pytest.approx(wanted.record.first_loss, rel=1e-5)
        assert got.record.last_loss == pytest.approx(wanted.record.last_loss, rel=1e-4)


@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("kind", BASES)
def test_together_is_alone(kind, rows):
    """Other ranks, scales, modules, lengths and sides of padding; Conv1D and encoder-decoder."""
    base, models = make_collection(kind, 4)
    batches = {
        name: make_batches(4, kind, lengths=lengths, left=i == 1)
        for i, (name, lengths) in enumerate(zip(models, LENGTHS[rows], strict=True))
    }
    before = snapshot(base)
    found = together(base, modules_of(models), batches, warmup_ratio=0.5, seed=3)
    assert_unchanged(base, before)
    assert_alone(found, models, batches, warmup_ratio=0.5, seed=3)


@pytest.mark.parametrize("size", [1, 2, None])
def test_in_groups(size):
    """Micro-batches, a tokenizer, and batches without a mask; norms are clipped for each alone."""
    base, models = make_collection(count=3)
    batches = {name: make_batches(5, lengths=(4, 4)) for name in models}
    for batch in batches["e2"]:
        del batch["attention_mask"]
    settings = {
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.05,
        "tokenizer": make_tokenizer(),
        "base": "owner/base",
    }
    found = together(base, modules_of(models), batches, together=size, **settings)
    assert_alone(found, models, batches, **settings)


@pytest.mark.wrong_types
def test_shuffled_data_comes_in_the_order_it_has_alone():
    base, models = make_collection(count=3)
    batches = {name: DataLoader(make_rows(12), 2, shuffle=True) for name in models}
    outside = random.random, np.random.random, partial(torch.rand, 2)
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(0)
    wanted = [draw() for draw in outside]
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(0)
    found = together(base, modules_of(models), batches, seed=5)
    assert str([draw() for draw in outside]) == str(wanted), "global generators are left alone"
    assert_alone(found, models, batches, seed=5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_gradient_checkpointing(kind, reentrant):
    base, models = make_collection(kind)
    batches = {name: make_batches(3, kind) for name in models}
    wanted = together(base, modules_of(models), batches)
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = snapshot(base)
    found = together(base, modules_of(models), batches)
    assert_unchanged(base, before)
    for name in models:
        assert_near(joined(found[name].vectors), joined(wanted[name].vectors), NEAR)


@pytest.mark.parametrize("how", ["autocast", "base"])
def test_bfloat16(how):
    """Gates stay in fp32, and near those that are trained alone in bfloat16."""
    base, models = make_collection()
    batches = {name: make_batches(4) for name in models}
    autocast = torch.bfloat16 if how == "autocast" else None
    adapters = modules_of(models)
    if how == "base":
        base.to(torch.bfloat16)
        for model in models.values():
            for name, parameter in model.named_parameters():
                if "lora_" not in name:
                    parameter.data = parameter.data.bfloat16()
    found = together(base, adapters, batches, steps=10, autocast=autocast)
    for name, model in models.items():
        alone = train_gates(model, batches[name], steps=10, autocast=autocast, progress=False)
        vector = joined(found[name].vectors)
        assert vector.dtype == torch.float32
        assert torch.cosine_similarity(vector, joined(alone.vectors), dim=0) > 0.9


def test_adapters_from_folders_and_as_experts(tmp_path):
    base, models = make_collection(count=3)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    adapters = {
        "e0": tmp_path / "e0",
        "e1": str(tmp_path / "e1"),
        "e2": load_expert(tmp_path / "e2"),
    }
    batches = {name: make_batches(2) for name in adapters}
    found = together(base, adapters, batches, steps=2)
    wanted = together(base, modules_of(models), batches, steps=2)
    for name in adapters:
        assert same(found[name].vectors, wanted[name].vectors)
        found[name].save(tmp_path / name)
        assert same(load_expert(tmp_path / name).gates.vectors, found[name].vectors)


class TestInterrupts:
    def run(self, folder=None, after=None, steps=16, **settings):
        base, models = make_collection()
        batches = {name: make_batches(5) for name in models}
        if after is not None:
            batches["e1"] = Interrupted(batches["e1"] * 8, after)
        return together(
            base, modules_of(models), batches, steps=steps, checkpoint=folder, **settings
        )

    @pytest.mark.parametrize("size", [None, 1])
    def test_it_goes_on_where_it_was_stopped(self, tmp_path, size, monkeypatch):
        """Stopped at step 13, checkpoint of step 10; with groups of one, the first is done."""
        wanted = self.run(together=size)
        with pytest.raises(PowerCut):
            self.run(tmp_path, after=12, together=size)
        steps = []
        step = loop.Loop._step
        monkeypatch.setattr(
            loop.Loop, "_step", lambda loop, *rest: steps.append(1) or step(loop, *rest)
        )
        found = self.run(tmp_path, together=size)
        assert len(steps) == (6 if size is None else 6 + 16)
        for name, gates in wanted.items():
            assert same(gates.vectors, found[name].vectors)
            assert gates.record == found[name].record

    def test_another_run_s_checkpoint_is_refused(self, tmp_path):
        self.run(tmp_path, steps=2)
        with pytest.raises(ConfigError, match="another steps"):
            self.run(tmp_path, steps=3)


def refused(error, model, adapters, batches, **settings):
    with pytest.raises(error) as caught:
        together(model, adapters, batches, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestOneBadExpert:
    def test_it_is_named_and_nothing_is_updated(self, monkeypatch):
        base, models = make_collection()
        batches = {name: make_batches(4) for name in models}
        batches["e1"][1]["labels"].fill_(-100)
        updates, update = [], torch.optim.AdamW.step
        monkeypatch.setattr(
            torch.optim.AdamW, "step", lambda *args: updates.append(1) or update(*args)
        )
        message = refused(TrainingError, base, modules_of(models), batches)
        assert message.startswith("e1: the loss is nan at step 2.")
        assert len(updates) == 1

    def test_batches_that_end_early(self):
        base, models = make_collection()
        batches = {name: make_batches(4) for name in models}
        batches["e2"] = iter(batches["e2"])
        message = refused(TrainingError, base, modules_of(models), batches)
        assert message.startswith("e2: ") and "ended after 4" in message


class TestRefusals:
    @pytest.fixture
    def good(self):
        base, models = make_collection()
        return base, modules_of(models), {name: make_batches(2) for name in models}

    def test_names(self, good):
        base, adapters, batches = good
        assert "e1: has no batches" in refused(
            ConfigError, base, adapters, {k: v for k, v in batches.items() if k != "e1"}
        )
        assert "e9: has batches but no adapter" in refused(
            ConfigError, base, adapters, {**batches, "e9": batches["e0"]}
        )
        assert "none to train" in refused(ConfigError, base, {}, {})
        assert "together" in refused(ConfigError, base, adapters, batches, together=0)
        assert "steps" in refused(ConfigError, base, adapters, batches, steps=0)

    def test_adapters(self, good, tmp_path):
        base, adapters, batches = good
        other = modules_of({"e1": make("t5")})["e1"]
        message = refused(IncompatibleExpertError, base, {**adapters, "e1": other}, batches)
        assert message.startswith("e1: adapts ") and "another base" in message
        smaller = llama(hidden_size=16)
        message = refused(IncompatibleExpertError, smaller, adapters, batches)
        assert message.startswith("e0: its LoRA of ")
        site, module = next(iter(adapters["e2"].items()))
        spoilt = LoraModule(module.a * torch.nan, module.b, 1.0)
        message = refused(
            IncompatibleExpertError, base, {**adapters, "e2": {site: spoilt}}, batches
        )
        assert message.startswith("e2: lora_A of") and "NaN" in message
        blank = LoraModule(module.a, module.b * 0, 1.0)
        message = refused(UntrainedAdapterError, base, {**adapters, "e2": {site: blank}}, batches)
        assert message.startswith("e2: every lora_B is zero")
        refused(ExpertNotFoundError, base, {**adapters, "e2": tmp_path / "none"}, batches)

    def test_models(self, good):
        _, adapters, batches = good
        assert "unload()" in refused(ConfigError, make(), adapters, batches)
        _, adapters, batches = good
        base, found = llama(), together(*good, steps=1)
        expert = Expert("e0", adapters["e0"], found["e0"], base_name=None)
        route(base, ExpertPool([expert]), top_k=1)
        assert "unroute" in refused(ConfigError, base, adapters, batches)
        assert "transformers model" in refused(
            ConfigError, torch.nn.Linear(2, 2), adapters, batches
        )

    def test_batches(self, good):
        base, adapters, batches = good
        for change, says in (
            ({"labels": None}, "has no labels"),
            ({"position_ids": torch.arange(6).expand(3, 6)}, "those of others have"),
            ({"inputs_embeds": torch.zeros(3, 6, 32)}, "has inputs_embeds"),
            ({"labels": torch.zeros(3)}, r"labels of its batch is [3]"),
        ):
            batch = {k: v for k, v in {**make_batch(), **change}.items() if v is not None}
            message = refused(ConfigError, base, adapters, {**batches, "e1": [batch]})
            assert message.startswith("e") and says in message, message

    def test_a_layer_that_does_not_see_rows(self, good):
        """Like an expert of a mixture inside the base, which sees tokens from all over."""
        _, adapters, batches = good
        base = llama()
        inside = base.model.layers[0].mlp
        forward = inside.forward
        inside.forward = lambda x: torch.cat([forward(x[:1]), forward(x[1:])])
        message = refused(ConfigError, base, adapters, batches)
        assert message.startswith("model.layers.0.mlp.") and "alone" in message

    def test_another_loss(self, good):
        _, adapters, batches = good
        base = gpt2()
        base.loss_type = "ForMaskedLM"
        assert "ForMaskedLM" in refused(ConfigError, base, adapters, batches)
