"""The gate phase: its schedule, its seeds, what it leaves alone and what stops it."""

import json
import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

from phatgoose import tasks, train_gates
from phatgoose.errors import ConfigError, TrainingError
from phatgoose.experts import adapter_hash, identify_base
from phatgoose.train.gated_adapter import GatedAdapter
from tests.tolerances import assert_near
from tests.train.test_gated_adapter import assert_unchanged, reference_and, snapshot, untidy
from tests.train.toys import (
    joined,
    llama,
    make,
    make_batch,
    make_batches,
    make_rows,
    make_tokenizer,
    same,
)


def train(model, batches, steps=3, **settings):
    return train_gates(model, batches, steps=steps, progress=False, **settings)


def loss_times_scale(model, batch):
    """The model's loss, times a number that comes with the batch."""
    scale = batch.pop("scale")
    return model(**batch).loss * scale


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_steps_are_adamw_s_with_warm_up_and_clipping(kind):
    """Batches whose gradients are a hundredth or a hundredfold show whether the norm is clipped."""
    peft_model, reference = reference_and(kind)
    batches = make_batches(12, kind)
    for number, batch in enumerate(batches):
        batch["scale"] = torch.tensor(100.0 if number % 3 == 0 else 0.01)
    gates = train(peft_model, batches, steps=12, warmup_ratio=0.25, seed=3, loss=loss_times_scale)
    reference.train(
        batches,
        lambda batch: reference.loss(batch) * float(batch["scale"]),
        learning_rate=5e-3,
        warmup=3,
        clip=1.0,
    )
    assert gates.vectors.keys() == reference.gates.keys()
    assert_near(joined(gates.vectors), joined(reference.gates), 1e-4)


def test_the_first_step():
    """Adam divides by the gradient's own size, so every entry moves by the rate, downhill."""
    peft_model, reference = reference_and("llama")
    batch = make_batch()
    gates = train(peft_model, [batch], steps=1, learning_rate=0.02)
    reference.loss(batch).backward()
    gradient = joined({name: gate.grad for name, gate in reference.gates.items()})
    clear = gradient.abs() > 1e-5
    assert clear.float().mean() > 0.8
    moved = joined(gates.vectors).double()
    torch.testing.assert_close(moved[clear], -0.02 * gradient.sign()[clear], rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("steps", "warmup", "rates"),
    [
        (100, {}, sum(range(1, 7)) / 6 + 94),  # 6% as published, then constant
        (20, {"warmup_ratio": 0.5}, sum(range(1, 11)) / 10 + 10),
        (5, {"warmup_ratio": 1.0}, 3.0),
        (10, {"warmup_ratio": 0.0}, 10.0),
    ],
)
def test_the_learning_rate_rises_then_stays(steps, warmup, rates):
    """With a gradient that does not change, each step moves every entry by that step's rate."""
    peft_model, reference = reference_and("llama")
    batch = make_batch()
    gates = train(peft_model, [batch], steps=steps, learning_rate=1e-7, **warmup)
    reference.loss(batch).backward()
    gradient = joined({name: gate.grad for name, gate in reference.gates.items()})
    clear = gradient.abs() > 1e-4
    moved = joined(gates.vectors).double()[clear]
    torch.testing.assert_close(moved, -1e-7 * rates * gradient.sign()[clear], rtol=2e-3, atol=0)


def test_the_default_settings_are_the_published_ones():
    gates = train_gates(make(), make_batches(2), progress=False)
    assert dict(gates.record.training) == {
        "steps": 100,
        "learning_rate": 5e-3,
        "warmup_ratio": 0.06,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "gradient_accumulation_steps": 1,
        "seed": 0,
    }
    assert gates.record.last_loss < gates.record.first_loss
    assert all(vector.abs().max() > 0.05 for vector in gates.vectors.values())


def test_the_record_says_what_was_done():
    peft_model, reference = reference_and("llama")
    batches, tokenizer = make_batches(3), make_tokenizer()
    gates = train(
        peft_model,
        batches,
        steps=2,
        gradient_accumulation_steps=2,
        tokenizer=tokenizer,
        base="owner/base",
    )
    record = gates.record
    assert (record.steps, record.examples) == (2, 12)
    seen = [*batches, batches[0]]
    assert record.tokens == sum(int(batch["attention_mask"].sum()) for batch in seen)
    first = sum(float(reference.loss(batch).detach()) for batch in batches[:2]) / 2
    assert record.first_loss == pytest.approx(first, rel=1e-5)
    assert record.base == identify_base(llama(), tokenizer, name="owner/base")
    assert record.adapter == adapter_hash(GatedAdapter(peft_model).modules())
    json.dumps(dict(record.training))


def test_the_model_comes_back_as_it_was():
    peft_model, batch = untidy("llama"), make_batch()
    before = snapshot(peft_model)
    train(peft_model, [batch])
    assert_unchanged(peft_model, before)


def test_the_model_comes_back_as_it_was_after_an_error():
    peft_model = untidy("llama")
    before, state = snapshot(peft_model), torch.get_rng_state()

    def batches():
        yield make_batch()
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train(peft_model, batches())
    assert_unchanged(peft_model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_are_not_changed():
    batches = make_batches(2)
    before = deepcopy(batches)
    train(make(), batches)
    for batch, copy in zip(batches, before, strict=True):
        assert batch.keys() == copy.keys()
        assert all(torch.equal(batch[key], copy[key]) for key in copy)


def test_lora_dropout_is_off():
    plain, dropping = (
        train(make(lora_dropout=rate).train(), make_batches(3)) for rate in (0.0, 0.5)
    )
    assert same(plain.vectors, dropping.vectors)
    assert plain.record.last_loss == dropping.record.last_loss


def loaders(seed):
    """Two shuffled ways through the same rows: by torch's global generator, and by its own."""
    rows = make_rows(16)
    encoded = [tasks.Encoded([3, 4], row["input_ids"].tolist()) for row in rows]
    yield DataLoader(rows, batch_size=2, shuffle=True)
    yield tasks.batches(encoded, 2, pad=0, seed=seed)


@pytest.mark.parametrize("which", [0, 1], ids=["DataLoader", "tasks.batches"])
def test_the_seed_decides_everything(which):
    results = []
    for seed, noise in ((5, 0), (5, 1), (6, 0)):
        torch.manual_seed(noise)  # what happened before is of no consequence
        order = []

        def loss(model, batch, order=order):
            order.append(batch["input_ids"][:, 2:4].flatten().tolist())
            return model(**batch).loss

        batches = list(loaders(seed))[which]
        gates = train(make(lora_dropout=0.3), batches, steps=10, seed=seed, loss=loss)
        results.append((order, gates))
    (order, gates), (again_order, again), (other_order, other) = results
    assert order == again_order and same(gates.vectors, again.vectors)
    assert gates.record == again.record
    assert order != other_order and not same(gates.vectors, other.vectors)


def test_global_random_generators_are_left_alone():
    def draw():
        return random.random(), np.random.random(), torch.rand(2).tolist()

    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(0)
    wanted = draw()
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(0)

    def loss(model, batch):
        draw()
        return model(**batch).loss

    train(make(), DataLoader(make_rows(8), batch_size=2, shuffle=True), loss=loss)
    assert draw() == wanted
    with pytest.raises(TrainingError):
        train(make(), iter([]))
    assert torch.initial_seed() == 0


def test_micro_batches_add_up_to_one_batch():
    """Equal numbers of targets: the mean of the micro-batches' losses is the batch's."""
    rows = make_rows(32)
    one = train(make(), DataLoader(rows, batch_size=8), steps=4)
    four = train(make(), DataLoader(rows, batch_size=2), steps=4, gradient_accumulation_steps=4)
    assert_near(joined(four.vectors), joined(one.vectors), 1e-4)
    assert four.record.last_loss == pytest.approx(one.record.last_loss, rel=1e-5)
    assert (four.record.examples, four.record.tokens) == (one.record.examples, one.record.tokens)
    first_of_each = DataLoader([row for i, row in enumerate(rows) if i % 8 < 2], batch_size=2)
    wrong = train(make(), first_of_each, steps=4)
    assert (joined(wrong.vectors) - joined(one.vectors)).norm() > 0.1 * joined(one.vectors).norm()


def test_a_list_is_gone_through_again_in_its_order():
    """Three batches for five steps: the fourth step has the first batch."""
    batches = make_batches(3)
    short, long = (train(make(), given, steps=5) for given in (batches, [*batches, *batches[:2]]))
    assert same(short.vectors, long.vectors)


def test_an_adapter_of_one_of_many_modules_trains():
    """A gate whose module no batch uses stays at zero, and does not stop the others."""

    def loss(model, batch):
        return model.get_encoder()(batch["input_ids"])[0].pow(2).mean()

    gates = train(make("t5"), [make_batch("t5")], loss=loss)
    for name, vector in gates.vectors.items():
        assert bool(vector.any()) == name.startswith("encoder"), name


@pytest.mark.parametrize("how", ["autocast", "base", "base and adapter"])
def test_bfloat16(how):
    """The gates stay in fp32, and near those trained all in fp32."""
    wanted = joined(train(make(), make_batches(4), steps=10).vectors)
    peft_model, autocast = make(), torch.bfloat16 if how == "autocast" else None
    if how != "autocast":
        for name, parameter in peft_model.named_parameters():
            if "lora_" not in name or how == "base and adapter":
                parameter.data = parameter.data.bfloat16()
    dtypes = []

    def loss(model, batch):
        logits = model(**batch).logits
        dtypes.append(logits.dtype)
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten()
        )

    gates = train(peft_model, make_batches(4), steps=10, loss=loss, autocast=autocast)
    assert set(dtypes) == {torch.bfloat16}
    assert {vector.dtype for vector in gates.vectors.values()} == {torch.float32}
    found = joined(gates.vectors)
    assert not torch.equal(found.bfloat16().float(), found)
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.9


def test_autocast_is_the_callers_or_the_launchers_only(monkeypatch):
    """A Trainer in bf16 earlier in the process says nothing about these gates."""
    dtypes = []

    def loss(model, batch):
        dtypes.append(model(**batch).logits.dtype)
        return model(**batch).loss

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"
        train(make(), [make_batch()], steps=1, loss=loss)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        train(make(), [make_batch()], steps=1, loss=loss)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
        train(make(), [make_batch()], steps=1, loss=loss, autocast=torch.bfloat16)
        error, message = stopped(make(), [make_batch()])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert error is ConfigError and "fp16" in message


def stopped(model, batches, **settings):
    with pytest.raises((ConfigError, TrainingError)) as caught:
        train(model, batches, **settings)
    assert "\n" not in str(caught.value)
    return caught.type, str(caught.value)


def test_batches_that_end_early():
    error, message = stopped(make(), iter(make_batches(2)))
    assert error is TrainingError and "ended after 2" in message
    assert stopped(make(), [])[0] is TrainingError
    # As many as needed are enough.
    assert train(make(), iter(make_batches(3))).record.steps == 3


def test_a_loss_that_is_not_a_number():
    batches = make_batches(3)
    batches[1]["labels"] = torch.full_like(batches[1]["labels"], -100)
    error, message = stopped(make(), batches)
    assert error is TrainingError and "nan" in message and "step 2" in message


def test_a_gradient_that_is_not_a_number():
    """The square root's slope at zero is infinite though its value is not."""

    def loss(model, batch):
        return torch.sqrt(model(**batch).loss * 0)

    error, message = stopped(make(), [make_batch()], loss=loss)
    assert error is TrainingError and "gradient" in message and "step 1" in message


def test_no_loss():
    batch = make_batch()
    del batch["labels"]
    error, message = stopped(make(), [batch])
    assert error is TrainingError and "labels" in message


def test_a_loss_that_does_not_hear_of_the_gates():
    def loss(model, batch):
        with model.disable_adapter():
            return model(**batch).loss

    error, message = stopped(make(), [make_batch()], loss=loss)
    assert error is TrainingError and "adapter on" in message


def test_reentrant_checkpointing_of_embeddings_without_a_gradient():
    """What it computes would have none either."""
    wanted = train(make(), [make_batch()]).vectors
    peft_model = make()
    peft_model.gradient_checkpointing_enable({"use_reentrant": True})
    peft_model.get_base_model().disable_input_require_grads()
    for name, gate in train(peft_model, [make_batch()]).vectors.items():
        torch.testing.assert_close(gate, wanted[name], rtol=1e-4, atol=1e-6)
    assert not peft_model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("warmup_ratio", -0.1),
        ("warmup_ratio", 1.5),
        ("max_grad_norm", 0.0),
        ("gradient_accumulation_steps", 0),
        ("seed", -1),
        ("autocast", torch.float16),
    ],
)
def test_settings_out_of_range(name, value):
    error, message = stopped(make(), [make_batch()], **{name: value})
    assert error is ConfigError and name in message and str(value) in message
