"""A pool that changes in place, and batches of requests that choose: the parts, without an engine.

`test_live.py` has them inside vLLM.
"""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from phatgoose.errors import ConfigError, RoutingError
from phatgoose.experts import GateRecord, Gates, adapter_hash, identify_base, load_expert
from phatgoose.experts.lora import WEIGHTS_FILE
from phatgoose.serve.ledger import Ledger, report
from phatgoose.serve.live import HANDLE, LiveWorker
from phatgoose.serve.steering import Steering
from tests.models import save_expert
from tests.serve.models import save_base

WORKER = "phatgoose.serve.worker.Worker"
ATTENTION = ("q_proj", "o_proj")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    base = save_base(folder / "base", "llama")
    for number in range(4):
        targets = ATTENTION if number != 1 else ("q_proj", "down_proj")
        save_expert(folder / f"e{number}", base, seed=number, targets=targets)
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
        worker.phatgoose_slots, worker.phatgoose_steering = getattr(model, HANDLE)
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


def test_added_is_as_if_from_the_start(world, start):
    folder, _ = world
    worker, wanted = start(2), start(3)
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
    with pytest.raises(ConfigError, match=message):
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


# ---------------------------------------------------------------- batches


class Params(SimpleNamespace):
    def clone(self):
        return Params(**vars(self))


def step(new=(), again=(), finished=(), scheduled=()):
    """As vLLM's scheduler describes a step; `new` are ids with settings, `again` with positions."""
    params = [
        Params(
            extra_args=None if wanted is None else {"phatgoose": wanted},
            all_stop_token_ids={7, 9},
            min_tokens=3,
        )
        for _, wanted in new
    ]
    return SimpleNamespace(
        finished_req_ids=set(finished),
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, sampling_params=given, num_computed_tokens=0)
            for (name, _), given in zip(new, params, strict=True)
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, _ in again], num_computed_tokens=[at for _, at in again]
        ),
        num_scheduled_tokens=dict(scheduled),
    )


@pytest.fixture
def steering():
    made = Steering(12, 3, CPU, routing=True)
    made.rename(["a", "b", None])
    return made


def is_open(steering):
    return (steering.prior == 0.0).int().tolist()


def test_rows_follow_the_batch(steering):
    assert is_open(steering) == [[1, 1, 1]] * 12
    steering.begin(step(new=[("x", '{"allow": ["b"]}'), ("y", None), ("z", '{"base": true}')]))
    steering.place(["y", "x", "z"], [2, 3, 1])
    assert is_open(steering) == [[1, 1, 1]] * 2 + [[0, 1, 0]] * 3 + [[0, 0, 0]] + [[1, 1, 1]] * 6
    steering.begin(step(again=[("x", 3), ("y", 2)], finished=["z"]))
    steering.place(["x", "y"], [1, 1])
    assert is_open(steering) == [[0, 1, 0]] + [[1, 1, 1]] * 11
    steering.begin(step(new=[("x", None)], finished=["x", "y"]))  # the same id again
    steering.place(["x"], [1])
    assert is_open(steering) == [[1, 1, 1]] * 12


def test_rows_follow_the_pool(steering):
    steering.begin(step(new=[("x", '{"deny": ["a"]}'), ("y", '{"allow": ["a"]}')]))
    steering.rename([None, "b", "c"])
    steering.place(["x", "y"], [1, 1])
    assert is_open(steering)[:2] == [[0, 0, 0], [0, 0, 0]]  # what they name is gone: no other
    steering.rename(["c", "b", "a"])
    steering.place(["x", "y"], [1, 1])
    assert is_open(steering)[:2] == [[1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    "wanted", ["{", '{"allow": ["nobody"]}', '{"routing": "all"}', '{"deny": ["a", "b"]}', 3]
)
def test_a_bad_request_is_answered_by_nothing(wanted, steering):
    asked = step(new=[("x", wanted)])
    given = asked.scheduled_new_reqs[0].sampling_params
    steering.begin(asked)
    params = asked.scheduled_new_reqs[0].sampling_params
    assert (params.allowed_token_ids, params.min_tokens) == ([7], 0)
    assert given.min_tokens == 3  # the scheduler's own is left as it was


def test_routing_that_is_not_recorded():
    steering = Steering(4, 1, CPU, routing=False)
    steering.rename(["a"])
    asked = step(new=[("x", '{"routing": "shares"}')])
    steering.begin(asked)
    assert asked.scheduled_new_reqs[0].sampling_params.allowed_token_ids == [7]


def test_a_runner_that_does_not_tell_the_batch(steering):
    asked = step(new=[("x", '{"base": true}')], scheduled=[("x", 2)])
    steering.begin(asked)
    with pytest.raises(RoutingError, match="do not reach"):
        steering.end(asked)
    other = step(again=[("y", 1)], scheduled=[("y", 1)])
    steering.begin(other)
    steering.end(other)


def test_shares(steering):
    ledger = steering.ledger
    asked = step(new=[("x", '{"routing": "tokens"}'), ("y", None)])
    steering.begin(asked)
    steering.place(["y", "x"], [1, 2])
    ledger.tally[:3] = torch.tensor([[0.0, 4.0, 0.0, 0.0], [0.0, 1.0, 3.0, 0.0], [0.0] * 4])
    steering.end(asked)
    asked = step(again=[("x", 4)])  # two tokens came from the prefix cache
    steering.begin(asked)
    steering.place(["x"], [1])
    assert not ledger.tally[0].any()
    ledger.tally[0] = torch.tensor([2.0, 6.0, 0.0, 0.0])
    steering.end(asked)
    found = report(ledger.take("x"))
    assert found["shares"] == pytest.approx({"": 1.25 / 3, "a": 1.0 / 3, "b": 0.75 / 3})
    assert found["tokens"] == [["b", "", None, None, "a"]]
    assert not ledger.take("x")

    steering.rename(["c", "b", None])
    totals = ledger.totals(steering.names)
    assert totals["tokens"] == pytest.approx({"a": 2.0, "b": 0.75, "c": 0.0})
    assert totals["base"] == pytest.approx(1.25)
    assert totals["count"] == 4
    two = -(0.25 * torch.tensor(0.25).log() + 0.75 * torch.tensor(0.75).log())
    assert totals["entropy"] == pytest.approx(float(2 * two / 4), rel=1e-6)
    json.dumps([found, totals])


def test_requests_go_by_several_names():
    ledger = Ledger(4, 1, CPU)
    ids = [f"{n}_cmpl-1-{p}-0123abcd" for n in (10, 2) for p in (0, 1)]
    for name in [*ids, "cmpl-11-0-0123abcd", "other"]:
        ledger.start(name, ["a"], with_tokens=False)
    ledger.finish(ids[0])
    assert [name for name, _ in ledger.take("cmpl-1")] == [ids[2], ids[0], ids[3], ids[1]]
    assert [name for name, _ in ledger.take("cmpl-11")] == ["cmpl-11-0-0123abcd"]
    assert not ledger.take("cmpl-1")
