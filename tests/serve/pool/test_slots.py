"""A pool that changes in place, on one rank and without an engine, which `test_live.py` has."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from phatgoose.errors import ConfigError, RoutingError
from phatgoose.experts import GateRecord, Gates, adapter_hash, identify_base, load_expert
from phatgoose.experts.lora import WEIGHTS_FILE
from phatgoose.serve.engine.runner import HANDLE, LiveWorker
from tests.models import save_expert
from tests.serve.models import save_base

WORKER = "phatgoose.serve.worker.Worker"
ATTENTION = ("q_proj", "o_proj")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    base = save_base(folder / "base", "llama")
    for number in range(4):
        targets = ATTENTION if number != 1 else ("q_proj", "down_proj")
        rank = 4 if number == 2 else 3  # the room there is, and less
        save_expert(folder / f"e{number}", base, seed=number, targets=targets, rank=rank)
    return folder, base


@pytest.fixture
def start(world, load):
    """start(count, ...): a worker that serves the first `count` experts."""
    folder, _ = world

    def run(count=2, **more):
        experts = [str(folder / f"e{number}") for number in range(count)]
        settings = {"experts": experts, "capacity": 3, "max_rank": 4, **more}
        model, _ = load(folder / "base", settings, worker_cls=WORKER)
        worker = LiveWorker()
        worker.phatgoose_slots, worker.phatgoose_batch = getattr(model, HANDLE)
        return worker

    return run


def everything(worker):
    """All that a change of the pool may write, and where it is."""
    return {
        (layer, name): (buffer.data_ptr(), buffer.clone())
        for layer, bank in worker.phatgoose_slots.banks.items()
        for name, buffer in bank.named_buffers()
    }


def served(worker):
    """By expert, what each layer has of it."""
    slots, found = worker.phatgoose_slots, {}
    for slot, name in enumerate(slots.names):
        for layer, bank in slots.banks.items():
            for part in range(bank.parts):
                if bank.open[part, slot]:
                    tensors = bank.signatures[part], bank.sums[part], bank.a[part], bank.b(part)
                    found[name, layer, part] = [tensor[slot].clone() for tensor in tensors]
    return found


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key, values in one.items():
        for left, right in zip(values, other[key], strict=True):
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def test_one_number_everywhere(start):
    slots = start().phatgoose_slots
    assert slots.names == ["e0", "e1", None]
    opened = {
        name.partition("layers.0.")[2]: bank.open.tolist()
        for name, bank in slots.banks.items()
        if "layers.0." in name
    }
    assert opened == {
        "self_attn.qkv_proj": [[True, True, False], [False] * 3, [False] * 3],
        "self_attn.o_proj": [[True, False, False]],
        "mlp.down_proj": [[False, True, False]],
    }


@pytest.mark.parametrize("router", ["phatgoose", "arrow", "spectr"])
def test_added_is_as_if_from_the_start(router, world, start):
    folder, _ = world
    worker, wanted = start(2, router=router, top_k=2), start(3, router=router, top_k=2)
    before, pool = everything(worker), worker.phatgoose_pool()
    assert worker.phatgoose_prepare("e2", str(folder / "e2"))["error"] is None
    assert_equal(everything(worker), before)
    assert worker.phatgoose_pool() == pool
    assert worker.phatgoose_commit() == {"error": None}
    assert_equal(served(worker), served(wanted))
    after = worker.phatgoose_pool()
    assert after["fingerprint"] == wanted.phatgoose_pool()["fingerprint"] != pool["fingerprint"]
    assert [expert["name"] for expert in after["experts"]] == ["e0", "e1", "e2"]
    assert after["generation"] == 1
    assert {k: v[0] for k, v in everything(worker).items()} == {k: v[0] for k, v in before.items()}


def test_removed_is_as_if_never_there(world, start):
    folder, _ = world
    worker, alone = start(2), start(1, top_k=1)
    assert worker.phatgoose_remove("e1") == {"error": None}
    mine = {key: value for key, value in served(worker).items() if key[0] == "e0"}
    assert_equal(mine, served(worker))
    assert_equal(mine, served(alone))
    worker.phatgoose_prepare("again", str(folder / "e1"))
    worker.phatgoose_commit()
    assert worker.phatgoose_slots.names == ["e0", "again", None]
    for name in ("again", "e0"):
        worker.phatgoose_remove(name)
    assert not served(worker)
    assert worker.phatgoose_pool()["experts"] == []


def test_a_pool_that_starts_empty(world, start):
    folder, _ = world
    worker = start(0, targets=["q_proj", "o_proj"])
    assert not served(worker)
    worker.phatgoose_prepare("e0", str(folder / "e0"))
    worker.phatgoose_commit()
    assert_equal(served(worker), served(start(1)))
    assert (
        "adapts model.layers.0.mlp.down_proj, which no"
        in (worker.phatgoose_prepare("e1", str(folder / "e1"))["error"])
    )


def spoil_weights(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file(change(tensors), folder / WEIGHTS_FILE)


def fill_with_nan(folder, base):
    """NaN that whoever wrote the gates knew of, so that the hashes agree."""
    spoil_weights(folder, lambda tensors: {k: v * torch.nan for k, v in tensors.items()})
    expert = load_expert(folder.parent / "e2")
    modules = {
        name: type(lora)(lora.a * torch.nan, lora.b * torch.nan, lora.scale)
        for name, lora in expert.modules.items()
    }
    record = GateRecord(base=identify_base(base), adapter=adapter_hash(modules))
    Gates(expert.gates.vectors, record).write(folder)


def make_gateless(folder, base):
    shutil.rmtree(folder)
    save_expert(folder, base, seed=2, targets=ATTENTION, gates=False)


def make_long(folder, base):
    shutil.rmtree(folder)
    save_expert(folder, base, seed=2, targets=ATTENTION, rank=5)


def make_strange(folder, _):
    other = save_base(folder.parent / "other", "llama", kv_heads=4)
    shutil.rmtree(folder)
    save_expert(folder, other, seed=2, targets=ATTENTION)


def cut_short(folder, _):
    weights = folder / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-100])


def make_pickle(folder, _):
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (fill_with_nan, "NaN"),
        (make_gateless, "has no gates"),
        (make_long, "rank 5 .* room for 4"),
        (make_strange, "another base"),
        (cut_short, "adapter_model.safetensors"),
        (make_pickle, "adapter_model"),
        (lambda folder, base: shutil.rmtree(folder), "not a folder"),
    ],
)
def test_a_refused_expert_changes_nothing(spoil, message, world, start, tmp_path):
    folder, base = world
    worker = start()
    for number in (2, 3):
        shutil.copytree(folder / f"e{number}", tmp_path / f"e{number}")
    shutil.copytree(tmp_path / "e2", tmp_path / "bad")
    spoil(tmp_path / "bad", base)
    before, pool = everything(worker), worker.phatgoose_pool()
    answer = worker.phatgoose_prepare("bad", str(tmp_path / "bad"))
    assert re.search(message, answer["error"])
    assert "no expert is prepared" in worker.phatgoose_commit()["error"]
    assert_equal(everything(worker), before)
    assert worker.phatgoose_pool() == pool


def test_what_does_not_fit_the_pool(world, start):
    folder, _ = world
    worker = start(2)
    source = str(folder / "e2")
    assert "has an expert of this name" in worker.phatgoose_prepare("e1", source)["error"]
    assert "no expert of this name" in worker.phatgoose_remove("e2")["error"]
    worker.phatgoose_prepare("e2", source)
    assert worker.phatgoose_abort() == {"error": None}
    assert "no expert is prepared" in worker.phatgoose_commit()["error"]
    worker.phatgoose_prepare("e2", source)
    worker.phatgoose_commit()
    assert "all 3 slots are taken" in worker.phatgoose_prepare("e3", source)["error"]


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        ({"capacity": 1}, {"worker_cls": WORKER}, "capacity is 1, the pool needs 2"),
        ({"targets": ["query"]}, {"worker_cls": WORKER}, "targets has 'query'"),
        ({"routing": True}, {}, '"routing" wants worker_cls'),
        (
            {"experts": [], "targets": ["q_proj"], "capacity": 2, "max_rank": 2},
            {},
            "only worker_cls=",
        ),
    ],
)
def test_refused_at_the_start(settings, more, message, world, load):
    folder, _ = world
    experts = [str(folder / "e0"), str(folder / "e1")]
    with pytest.raises((ConfigError, RoutingError), match=message):
        load(folder / "base", {"experts": experts, **settings}, **more)


def test_the_compile_cache_tells_whether_requests_may_choose(world, load):
    folder, _ = world
    experts = [str(folder / "e0"), str(folder / "e1")]
    hashes = set()
    for routing, more in (
        (False, {}),
        (False, {"worker_cls": WORKER}),
        (True, {"worker_cls": WORKER}),
    ):
        _, config = load(folder / "base", {"experts": experts, "routing": routing}, **more)
        hashes.add(config.additional_config["phatgoose_layout"])
    assert len(hashes) == 3
