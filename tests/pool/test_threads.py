"""Forwards in several threads, and changes of the pool beside them: each is what it would be alone.

`make stress` runs the tests of changes at full size: 8 threads of 500 forwards.
"""

import asyncio
import contextlib
import sys
import threading

import pytest
import torch
from transformers import TextIteratorStreamer

from phatgoose import ExpertPool, assign, record, restrict, route, unroute
from phatgoose.errors import RoutingError
from tests.models import make_batch, make_model, save_experts
from tests.routers.counting import CountingRouter
from tests.tolerances import TOLERANCE, assert_near

NEAR = TOLERANCE[torch.float32].model
ROUTERS = {"phatgoose": lambda: "phatgoose", "prior": CountingRouter, "arrow": lambda: "arrow"}
SIZES = [
    pytest.param(4, 25, id="small"),
    pytest.param(8, 500, id="full", marks=pytest.mark.stress),
]
SOON = 60.0  # seconds; what waits for ever fails rather than hangs


@pytest.fixture(autouse=True)
def eager_switches():
    """Have Python change threads often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*runs):
    """Run these functions each in a thread; raise what any of them raised."""
    failed, ready = [], threading.Barrier(len(runs))

    def guarded(run):
        try:
            ready.wait(SOON)
            run()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(run,), daemon=True) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON * 10)
        assert not thread.is_alive(), "a thread waits for ever"
    if failed:
        raise failed[0]


def gap(one, other):
    return float((one - other).detach().abs().max())


class Beside:
    """A model whose pool gains and loses its last expert, again and again, beside forwards."""

    def __init__(self, model, pool, router, threads):
        self.model, self.pool, self.last = model, pool, pool.experts[-1]
        route(model, pool, router)
        self.batches = [make_batch(model, [5 + i % 3], seed=i) for i in range(threads)]
        for batch in self.batches:
            batch.pop("position_ids", None)
        self.going = True

    def wanted(self, run):
        """What `run(batch)` gives for each batch with the last expert, and without it."""
        found = []
        for change in (lambda: self.pool.remove(self.last.name), lambda: self.pool.add(self.last)):
            found.append([run(batch) for batch in self.batches])
            change()
        for one, other in zip(*found, strict=True):
            assert gap(one, other) > 0.01
        return list(zip(*found, strict=True))

    def change(self):
        changes = 0
        while self.going:
            self.pool.remove(self.last.name)
            self.pool.add(self.last)
            changes += 2
        assert changes > 1

    def compare(self, run, times):
        """Run it in threads while the pool changes; how often with and without the last expert."""
        wanted, seen = self.wanted(run), [0, 0]
        working = [len(self.batches)]

        def work(batch, both):
            try:
                for _ in range(times):
                    found = run(batch)
                    gaps = [gap(found, each) for each in both]
                    which = gaps.index(min(gaps))
                    assert_near(found, both[which], NEAR)
                    seen[which] += 1
            finally:
                working[0] -= 1
                self.going = working[0] > 0

        runs = [
            lambda batch=batch, both=both: work(batch, both)
            for batch, both in zip(self.batches, wanted, strict=True)
        ]
        together(self.change, *runs)
        return seen


@pytest.mark.parametrize(("threads", "times"), SIZES)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_logit_is_of_the_pool_before_or_after_a_change(
    router, threads, times, model_and_pool
):
    both = Beside(*model_and_pool(), ROUTERS[router](), threads)

    @torch.no_grad()
    def run(batch):
        return both.model(**batch).logits

    seen = both.compare(run, times)
    assert min(seen) > 0, seen


@pytest.mark.parametrize(("threads", "times"), SIZES)
def test_every_logit_of_generate_is_of_one_pool(threads, times, model_and_pool):
    both = Beside(*model_and_pool(), CountingRouter(), threads)

    def run(batch):
        out = both.model.generate(
            **batch,
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits)

    seen = both.compare(run, max(times // 5, 5))
    assert sum(seen) == threads * max(times // 5, 5)


@pytest.mark.parametrize("family", ["llama", "t5-gated"])
@pytest.mark.parametrize("router", ROUTERS)
def test_threads_give_what_one_gives(router, family, model_and_pool):
    model, pool = model_and_pool(family)
    route(model, pool, ROUTERS[router]())
    batches = [make_batch(model, [3 + i, 9 - i], seed=i) for i in range(5)]
    with torch.no_grad():
        wanted = [model(**batch).logits for batch in batches]

    @torch.no_grad()
    def work(i):
        for _ in range(10):
            assert_near(model(**batches[i]).logits, wanted[i], NEAR)

    together(*(lambda i=i: work(i) for i in range(5)))


def test_blocks_of_one_thread_do_not_rule_another(model_and_pool):
    model, pool = model_and_pool()
    route(model, pool)
    batch = make_batch(model, [4, 6])
    blocks = {
        "none": contextlib.nullcontext,
        "one": lambda: restrict(model, ["e1"]),
        "two": lambda: restrict(model, ["e0", "e2"]),
        "base": lambda: restrict(model, []),
        "rows": lambda: assign(model, ["e3", "e0"]),
        "trace": lambda: record(model),
    }
    wanted, traces = {}, {}

    @torch.no_grad()
    def run(name):
        with blocks[name]() as trace:
            logits = model(**batch).logits
        traces[name] = trace
        return logits

    for name in blocks:
        wanted[name] = run(name)

    def work(name):
        for _ in range(20):
            assert_near(run(name), wanted[name], NEAR)
            if name == "trace":
                assert len(traces[name].tokens["decoder"].ids) == 10

    together(*(lambda name=name: work(name) for name in blocks))


def test_blocks_of_one_task_do_not_rule_another(model_and_pool):
    model, pool = model_and_pool()
    route(model, pool)
    batch = make_batch(model, [4])
    with restrict(model, ["e1"]), torch.no_grad():
        wanted = model(**batch).logits

    async def work(name):
        with restrict(model, [name]):
            for _ in range(5):
                await asyncio.sleep(0)
                with torch.no_grad():
                    found = model(**batch).logits
                assert (gap(found, wanted) < 1e-5) == (name == "e1")
                in_a_thread = await asyncio.to_thread(lambda: model(**batch).logits.detach())
                assert gap(in_a_thread, found) < 1e-5

    async def all_of_them():
        await asyncio.gather(*(work(f"e{i}") for i in range(3)))

    asyncio.run(all_of_them())


def test_a_trace_names_experts_that_join_meanwhile(model_and_pool):
    model, pool = model_and_pool()
    last = pool.experts[-1]
    pool.remove(last.name)
    route(model, pool, top_k="all")
    batch = make_batch(model, [4])
    with record(model) as trace, torch.no_grad():
        model(**batch)
        together(lambda: pool.add(last))
        together(lambda: pool.remove("e0"))
        model(**batch)
    assert trace.names == ["e0", "e1", "e2", "e3"]
    for experts in trace.experts.values():
        assert not (experts[:4] == 3).any()
        assert not (experts[4:] == 0).any()
    assert any((experts[4:] == 3).any() for experts in trace.experts.values())


def test_an_assigned_expert_that_another_thread_removes_is_missed(model_and_pool):
    model, pool = model_and_pool()
    route(model, pool)
    batch = make_batch(model, [4])
    with assign(model, ["e1"]):
        together(lambda: pool.remove("e1"))
        with pytest.raises(RoutingError, match="e1 is no longer in the pool"):
            model(**batch)


def test_a_change_waits_for_a_generate_and_its_streamer_ends(model_and_pool):
    model, pool = model_and_pool()
    last = pool.experts[-1]
    route(model, pool)
    batch = make_batch(model, [4])
    batch.pop("position_ids")
    wanted = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, 4:].tolist()

    class Words:
        def decode(self, ids, **_):
            return "".join(f"{int(i)} " for i in ids)

    streamer, texts = TextIteratorStreamer(Words(), skip_prompt=True), []
    thread = threading.Thread(
        target=model.generate,
        kwargs={**batch, "max_new_tokens": 12, "do_sample": False, "streamer": streamer},
        daemon=True,
    )
    thread.start()
    texts.append(next(streamer))  # it is under way
    pool.remove(last.name)
    texts += list(streamer)
    thread.join(SOON)
    assert [int(word) for word in "".join(texts).split()] == wanted


@pytest.mark.parametrize("where", ["layer", "generate"])
def test_a_change_from_inside_is_refused_and_leaves_nothing_held(where, model_and_pool):
    model, pool = model_and_pool()
    route(model, pool)
    batch = make_batch(model, [4])
    batch.pop("position_ids")
    with torch.no_grad():
        wanted = model(**batch).logits

    def change(*_):
        pool.remove("e3")

    with pytest.raises(RoutingError, match="pool.remove.e3.: called from inside a forward"):
        if where == "layer":
            handle = model.model.layers[1].register_forward_hook(change)
            try:
                model(**batch)
            finally:
                handle.remove()
        else:
            model.generate(**batch, max_new_tokens=2, logits_processor=[change])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, wanted)
    together(change)
    with pytest.raises(RoutingError, match="unroute: called from inside"):
        handle = model.register_forward_pre_hook(lambda *_: unroute(model))
        try:
            model(**batch)
        finally:
            handle.remove()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_was_interrupted_holds_nothing(error, model_and_pool):
    model, pool = model_and_pool()
    route(model, pool, CountingRouter())
    batch = make_batch(model, [4])
    with torch.no_grad():
        wanted = model(**batch).logits

    def stop(*_):
        raise error

    handle = model.model.layers[1].register_forward_hook(stop)
    with pytest.raises(error):
        model(**batch)
    handle.remove()
    together(lambda: pool.remove("e3"))
    with torch.no_grad():
        assert gap(model(**batch).logits, wanted) > 0
    pool.remove("e2")


def test_one_routed_model_inside_another(model_and_pool):
    """Both of one pool; the change waits for both, and neither waits for the other."""
    (model, pool), (inner, _) = model_and_pool(), model_and_pool()
    route(model, pool)
    route(inner, pool, "arrow")
    batch, heard = make_batch(model, [4]), []
    handle = model.model.layers[0].register_forward_hook(
        lambda *_: heard.append(inner(**batch).logits.detach())
    )
    last, done = pool.experts[-1], []

    @torch.no_grad()
    def work():
        for _ in range(20):
            model(**batch)
        done.append(True)

    def change():
        while len(done) < 3:
            pool.remove(last.name)
            pool.add(last)

    together(work, work, work, change)
    handle.remove()
    pool.remove(last.name)
    without = inner(**batch).logits
    pool.add(last)
    wanted = [inner(**batch).logits, without]
    assert all(min(gap(each, one) for one in wanted) < 1e-4 for each in heard)


def test_a_model_that_calls_itself(model_and_pool):
    model, pool = model_and_pool()
    route(model, pool, CountingRouter())
    batch, other = make_batch(model, [4]), make_batch(model, [7], seed=3)
    with torch.no_grad():
        wanted = [model(**each).logits for each in (batch, other)]
        heard, inside = [], []

        def again(*_):
            if not inside:
                inside.append(True)
                heard.append(model(**other).logits)

        handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(again)
        assert torch.equal(model(**batch).logits, wanted[0])
        handle.remove()
    assert torch.equal(heard[0], wanted[1])


# ---------------------------------------------------------------- gradients


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_follow_the_block_of_their_forward(reentrant, model_and_pool):
    model, pool = model_and_pool()
    batch = make_batch(model, [4, 7])
    route(model, pool).train()

    def gradients(backward):
        model.zero_grad()
        with restrict(model, ["e1"]):
            loss = model(**batch).logits.square().mean()
        backward(loss)
        return [parameter.grad.clone() for parameter in model.parameters()]

    wanted = gradients(lambda loss: loss.backward())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for found in (
        gradients(lambda loss: loss.backward()),
        gradients(lambda loss: together(loss.backward)),
    ):
        for one, other in zip(found, wanted, strict=True):
            assert_near(one, other, TOLERANCE[torch.float32].delta)
    with restrict(model, ["e1"]):
        loss = model(**batch).logits.square().mean()
    pool.remove("e0")
    with pytest.raises(RoutingError, match="gradient checkpointing runs a layer again"):
        loss.backward()


# ---------------------------------------------------------------- what cannot be, and says so


def test_a_layer_outside_any_forward_beside_a_change(model_and_pool):
    model, pool = model_and_pool()
    route(model, pool)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(1, 3, 24)
    handle = layer.register_forward_pre_hook(lambda *_: together(lambda: pool.remove("e3")))
    with pytest.raises(RoutingError, match="the pool changes while a routed layer runs outside"):
        layer(x)
    handle.remove()
    layer(x)


def test_another_thread_cannot_change_what_was_compiled(tmp_path):
    folders = save_experts(tmp_path, make_model("llama", layers=1), [("q_proj",)] * 3)
    model = route(make_model("llama", layers=1), ExpertPool.load(folders), capacity=4)
    pool = model._phatgoose.pool
    batch = make_batch(model, [4])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(**batch)
    for change in (
        lambda: pool.remove("e2"),
        lambda: restrict(model, ["e1"]).__enter__(),
        lambda: record(model).__enter__(),
    ):
        with pytest.raises(RoutingError, match="another thread compiled this model"):
            together(change)
    pool.remove("e2")
    with restrict(model, ["e1"]), torch.no_grad():
        assert gap(compiled(**batch).logits, model(**batch).logits) < 1e-4
    torch._dynamo.reset()
