"""What a batch of requests that choose makes of the prior, and which experts it says served them.

Steps of vLLM's scheduler and its model runners are imitated here; `test_live.py` has real ones.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from phatgoose.errors import RoutingError
from phatgoose.nn import RoutingSettings
from phatgoose.serve.engine.runner import RoutedRunner
from phatgoose.serve.pool import usage as module
from phatgoose.serve.pool.batch import Batch
from phatgoose.serve.pool.rows import RowTable
from phatgoose.serve.pool.usage import Usage, report

CPU = torch.device("cpu")


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
def batch():
    made = Batch(12, 3, CPU, routing=True)
    made.rename(["a", "b", None])
    return made


def is_open(batch):
    return (batch.prior == 0.0).int().tolist()


def test_rows_follow_the_batch(batch):
    assert is_open(batch) == [[1, 1, 1]] * 12
    batch.begin(step(new=[("x", '{"allow": ["b"]}'), ("y", None), ("z", '{"base": true}')]))
    batch.place(["y", "x", "z"], [2, 3, 1])
    assert is_open(batch) == [[1, 1, 1]] * 2 + [[0, 1, 0]] * 3 + [[0, 0, 0]] + [[1, 1, 1]] * 6
    batch.begin(step(again=[("x", 3), ("y", 2)], finished=["z"]))
    batch.place(["x", "y"], [1, 1])
    assert is_open(batch) == [[0, 1, 0]] + [[1, 1, 1]] * 11
    batch.begin(step(new=[("x", None)], finished=["x", "y"]))  # the same id again
    batch.place(["x"], [1])
    assert is_open(batch) == [[1, 1, 1]] * 12


def test_rows_follow_the_pool(batch):
    batch.begin(step(new=[("x", '{"deny": ["a"]}'), ("y", '{"allow": ["a"]}')]))
    batch.rename([None, "b", "c"])
    batch.place(["x", "y"], [1, 1])
    assert is_open(batch)[:2] == [[0, 0, 0], [0, 0, 0]]  # what they name is gone: no other
    batch.rename(["c", "b", "a"])
    batch.place(["x", "y"], [1, 1])
    assert is_open(batch)[:2] == [[1, 1, 0], [0, 0, 1]]


def kept(batch, tokens):
    """What the rows of a forward ask: a mixture by slot, or top_k, temperature and scale."""
    found = []
    for token in range(tokens):
        slots, weights, top_k, temperature, scale = (t[token].tolist() for t in batch.own.rows)
        pairs = zip(slots, weights, strict=True)
        mixture = {slot: weight for slot, weight in pairs if slot >= 0}
        found.append((scale, mixture) if top_k == 0 else (scale, top_k, temperature))
    return found


def test_mixtures_follow_the_batch_and_the_pool(batch):
    batch.own = RowTable(12, 3, routing=RoutingSettings(temperature=0.5), device=CPU)
    places = [table.data_ptr() for table in batch.own.rows]
    usual = (1.0, 2, 0.5)
    assert kept(batch, 12) == [usual] * 12
    mixed = '{"weights": {"b": 0.25, "a": 2}, "scale": 3}'
    batch.begin(
        step(new=[("x", mixed), ("y", None), ("z", '{"top_k": 1, "deny": ["a"]}'), ("w", "{}")])
    )
    batch.place(["y", "x", "z", "w"], [2, 3, 1, 1])
    mixture = (3.0, {0: 2.0, 1: 0.25})
    assert kept(batch, 12) == [usual] * 2 + [mixture] * 3 + [(1.0, 1, 0.5)] + [usual] * 6
    assert is_open(batch)[5] == [0, 1, 0]
    batch.begin(step(again=[("x", 3)], finished=["z", "w"]))
    batch.place(["x"], [1])
    assert kept(batch, 12) == [mixture] + [usual] * 11
    batch.rename(["b", None, "a"])
    batch.place(["y", "x"], [1, 1])
    assert kept(batch, 3) == [usual, (3.0, {0: 0.25, 2: 2.0}), usual]
    batch.rename(["b", None, None])  # not the rest of the mixture: the base alone
    batch.place(["x"], [1])
    assert kept(batch, 3) == [usual] * 3 and is_open(batch)[0] == [0, 0, 0]
    batch.rename(["b", "a", None])
    batch.place(["x"], [1])
    assert kept(batch, 1) == [(3.0, {0: 0.25, 1: 2.0})]
    assert [table.data_ptr() for table in batch.own.rows] == places


@pytest.mark.parametrize(
    "wanted", ['{"weights": {"a": 1}}', '{"scale": 2}', '{"top_k": 1}', '{"temperature": 2}']
)
def test_a_server_without_mixtures_answers_by_nothing(wanted, batch):
    asked = step(new=[("x", wanted)])
    batch.begin(asked)
    assert asked.scheduled_new_reqs[0].sampling_params.allowed_token_ids == [7]


@pytest.mark.parametrize(
    "wanted", ["{", '{"allow": ["nobody"]}', '{"routing": "all"}', '{"deny": ["a", "b"]}', 3]
)
def test_a_bad_request_is_answered_by_nothing(wanted, batch):
    asked = step(new=[("x", wanted)])
    given = asked.scheduled_new_reqs[0].sampling_params
    batch.begin(asked)
    params = asked.scheduled_new_reqs[0].sampling_params
    assert (params.allowed_token_ids, params.min_tokens) == ([7], 0)
    assert given.min_tokens == 3  # the scheduler's own is left as it was


def test_routing_that_is_not_recorded():
    batch = Batch(4, 1, CPU, routing=False)
    batch.rename(["a"])
    asked = step(new=[("x", '{"routing": "shares"}')])
    batch.begin(asked)
    assert asked.scheduled_new_reqs[0].sampling_params.allowed_token_ids == [7]


def test_a_runner_that_does_not_tell_the_batch(batch):
    asked = step(new=[("x", '{"base": true}')], scheduled=[("x", 2)])
    batch.begin(asked)
    with pytest.raises(RoutingError, match="nor the settings"):
        batch.end(asked)
    other = step(again=[("y", 1)], scheduled=[("y", 1)])
    batch.begin(other)
    batch.end(other)


def test_shares(batch):
    usage = batch.usage
    asked = step(new=[("x", '{"routing": "tokens"}'), ("y", None)])
    batch.begin(asked)
    batch.place(["y", "x"], [1, 2])
    usage.tally[:3] = torch.tensor([[0.0, 4.0, 0.0, 0.0], [0.0, 1.0, 3.0, 0.0], [0.0] * 4])
    batch.end(asked)
    asked = step(again=[("x", 4)])  # two tokens came from the prefix cache
    batch.begin(asked)
    batch.place(["x"], [1])
    assert not usage.tally[0].any()
    usage.tally[0] = torch.tensor([2.0, 6.0, 0.0, 0.0])
    batch.end(asked)
    found = report(usage.take("x"))
    assert found["shares"] == pytest.approx({"": 1.25 / 3, "a": 1.0 / 3, "b": 0.75 / 3})
    assert found["tokens"] == [["b", "", None, None, "a"]]
    assert not usage.take("x")

    batch.rename(["c", "b", None])
    totals = usage.totals(batch.names)
    assert totals["tokens"] == pytest.approx({"b": 0.75, "c": 0.0})  # the counter of a has ended
    assert totals["base"] == pytest.approx(1.25)
    assert totals["count"] == 4
    two = -(0.25 * torch.tensor(0.25).log() + 0.75 * torch.tensor(0.75).log())
    assert totals["entropy"] == pytest.approx(float(2 * two / 4), rel=1e-6)
    json.dumps([found, totals])


def test_requests_go_by_several_names():
    usage = Usage(4, 1, CPU)
    ids = [f"{n}_cmpl-1-{p}-0123abcd" for n in (10, 2) for p in (0, 1)]
    for name in [*ids, "cmpl-11-0-0123abcd", "other"]:
        usage.start(name, ["a"], with_tokens=False)
    usage.finish(ids[0])
    assert [name for name, _ in usage.take("cmpl-1")] == [ids[2], ids[0], ids[3], ids[1]]
    assert [name for name, _ in usage.take("cmpl-11")] == ["cmpl-11-0-0123abcd"]
    assert not usage.take("cmpl-1")


def served(usage, request, steps, *, tokens=1):
    """A request in so many forwards, beside another one with seven tokens."""
    for number in range(steps):
        usage.clear(tokens + 7)
        usage.tally[: tokens + 7, 1] = 1.0
        usage.add([request, "other"], [tokens, 7], {request: number * tokens, "other": 0})


def test_what_nobody_asks_for_is_bounded_by_tokens(monkeypatch):
    """Clients that go away midway leave their tokens behind."""
    monkeypatch.setattr(module, "KEPT_TOKENS", 100)
    usage = Usage(40, 1, CPU)
    for number in range(5):
        usage.start(f"r{number}", ["a"], with_tokens=True)
        served(usage, f"r{number}", 10, tokens=4)
        usage.finish(f"r{number}")
    assert [bool(usage.take(f"r{number}")) for number in range(5)] == [False] * 3 + [True] * 2
    # One that is longer than all that is kept is there until the next one.
    usage.start("long", ["a"], with_tokens=True)
    served(usage, "long", 200)
    usage.finish("long")
    assert report(usage.take("long"))["tokens"] == [["a"] * 200]


def test_tokens_are_kept_as_a_few_tensors_of_their_own(monkeypatch):
    """A view of a batch's tensor would keep all of it; a tensor a token costs hundreds of bytes."""
    monkeypatch.setattr(module, "PIECES", 16)
    usage = Usage(8, 1, CPU)
    usage.start("r", ["a"], with_tokens=True)
    served(usage, "r", 100)
    usage.clear(8)
    usage.add(["r"], [1], {"r": 105})  # five came from the prefix cache
    usage.finish("r")
    [(_, record)] = usage.take("r")
    assert [(first, len(columns)) for first, columns in record.best] == [(0, 100), (105, 1)]
    assert all(c.untyped_storage().nbytes() == 4 * len(c) for _, c in record.best)
    assert report([("r", record)])["tokens"] == [["a"] * 100 + [None] * 5 + [""]]


def test_counters_of_experts_that_are_gone_end(batch):
    usage = batch.usage
    for number in range(50):
        batch.rename([f"expert {number}", "b", None])
        batch.begin(step(new=[(f"r{number}", None)]))
        batch.place([f"r{number}"], [1])
        usage.tally[0, 1] = 1.0
        batch.end(step(new=[(f"r{number}", None)]))
    assert usage.totals(batch.names)["tokens"] == {"expert 49": 1.0, "b": 0.0}
    batch.rename([None, "b", None])
    batch.rename(["expert 49", "b", None])
    assert usage.totals(batch.names)["tokens"]["expert 49"] == 0.0  # it is another one


class FirstRunner:
    """As vLLM's V1: the batch is in order once `_model_forward` is called."""

    def execute_model(self, scheduler_output, intermediate_tensors=None):
        self.input_batch = SimpleNamespace(req_ids=["y", "x"])
        return self._model_forward(input_ids=torch.arange(3))

    def _model_forward(self, input_ids):
        return len(input_ids), is_open(self.phatgoose_batch)


class SecondRunner:
    """As vLLM's V2: `prepare_inputs` gives the batch, and not to dummy runs."""

    def execute_model(self, scheduler_output, intermediate_tensors=None, dummy_run=False):
        if not dummy_run:
            self.prepare_inputs(scheduler_output)
        return 3, is_open(self.phatgoose_batch)

    def prepare_inputs(self, scheduler_output):
        ends = np.array([0, 2, 3, 3])  # padded to three requests
        return SimpleNamespace(
            req_ids=["y", "x"], num_reqs=2, query_start_loc_np=ends, input_ids=torch.arange(3)
        )


@pytest.mark.parametrize("kind", [FirstRunner, SecondRunner])
def test_runners(kind, batch):
    runner = kind()
    runner.__class__ = type("Routed", (RoutedRunner, kind), {})
    runner.phatgoose_batch = batch
    asked = step(new=[("x", '{"base": true}'), ("y", None)], scheduled=[("x", 1), ("y", 2)])
    result, opened = runner.execute_model(asked)
    assert result == 3
    assert opened[:3] == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert batch.usage.totals(batch.names)["count"] == 3
    if kind is SecondRunner:
        runner.execute_model(step(), dummy_run=True)
        assert batch.usage.totals(batch.names)["count"] == 3
