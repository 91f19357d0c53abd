"""Requests that choose their experts, and a pool that changes while it serves, inside vLLM.

What is right is what `phatgoose.route` says on transformers, with a pool of those experts.
"""

import shutil

import pytest

from tests.serve.models import save_base, save_pool
from tests.serve.test_offline import assert_differ, assert_same, random_prompts

pytestmark = pytest.mark.slow

WORKER = "phatgoose.serve.worker.Worker"
COUNT, CAPACITY, TOKENS = 5, 6, 16
CHOICES = {
    "all": None,
    "base": {"base": True},
    "one": {"allow": ["e3"]},
    "some": {"deny": ["e0", "e4"]},
}
POOLS = {"all": range(COUNT), "base": (), "one": (3,), "some": (1, 2, 3)}


@pytest.fixture(scope="module")
def world(tmp_path_factory, reference):
    """Folders of a base and experts, prompts, and a function that gives the right answers."""
    folder = tmp_path_factory.mktemp("world")
    base = save_base(folder / "base", "qwen3")
    experts = save_pool(folder, base, COUNT + 1)
    late = folder / "late" / "e5"
    shutil.move(experts.pop(), late)
    prompts = random_prompts((7, 150, 33))  # vLLM's blocks on a CPU: 128 tokens
    answers = {}

    def right(numbers):
        key = tuple(numbers)
        if key not in answers:
            pool = [late if number == COUNT else experts[number] for number in key]
            answers[key] = reference(base, pool, prompts, tokens=TOKENS, top_k=min(2, len(pool)))
        return answers[key]

    return folder, experts, late, prompts, right


def settings(experts, **more):
    return {"experts": [str(path) for path in experts], "capacity": CAPACITY, "max_rank": 4, **more}


def ask(prompts, *names, **more):
    """Every prompt under every choice, neighbours under different ones."""
    return {"ask": [[p, merged(CHOICES[name], more)] for p in prompts for name in names]}


def merged(choice, more):
    return {**(choice or {}), **more} if choice or more else None


def assert_right(found, names, right):
    for place, name in enumerate(names):
        assert_same([found[place :: len(names)]], right(POOLS.get(name, name)))


TWO_RANKS = {
    "tensor": {"tensor_parallel_size": 2, "enforce_eager": True},
    "pipeline": {"pipeline_parallel_size": 2},
}


@pytest.mark.parametrize("way", ["tensor", pytest.param("pipeline", marks=pytest.mark.thorough)])
def test_offline_on_two_ranks(way, world, engine):
    folder, experts, late, prompts, right = world
    one_disk = folder / "e6-on-one-disk"
    shutil.copytree(late, one_disk, dirs_exist_ok=True)
    names = tuple(CHOICES)
    script = {
        "before": ask(prompts, *names),
        "alone": ask(prompts[1:2], "some"),
        "pool": {"rpc": ["phatgoose_pool"]},
        "half": {"add": str(one_disk)},
        "pool after half": {"rpc": ["phatgoose_pool"]},
        "after half": ask(prompts, "all"),
        # Without a new salt or a reset, what the old pool put into the prefix cache stays.
        "prepare": {"rpc": ["phatgoose_prepare", "e5", str(late)]},
        "commit": {"rpc": ["phatgoose_commit"]},
        "stale": ask(prompts, "all"),
        "out": {"remove": "e5"},
        "restored": ask(prompts, "all"),
        "bad": {"unchecked": True, "ask": [[p, {"allow": ["nobody"]}] for p in prompts]},
        "add": {"add": str(late)},
        "added": ask(prompts, "all", "one"),
        "full": {"add": str(one_disk)},
        "twice": {"add": str(late)},
        "unknown": {"remove": "nobody"},
        **{f"remove {n}": {"remove": f"e{n}"} for n in (0, 2, 4, 5)},
        "less": ask(prompts, "all"),
        **{f"remove {n}": {"remove": f"e{n}"} for n in (1, 3)},
        "none": ask(prompts, "all"),
    }
    found = engine(
        folder / "base",
        settings(experts),
        list(script.values()),
        runs="tests.serve.run_live",
        tokens=TOKENS,
        worker_cls="tests.serve.run_worker.HalfBlind",
        max_num_batched_tokens=64,
        **TWO_RANKS[way],
    )
    found = dict(zip(script, found, strict=True))
    assert_right(found["before"], names, right)
    assert_differ(right(POOLS["all"]), right(POOLS["some"]))
    [alone] = found["alone"]
    assert alone["cached"] > 0  # the same salt: what it asked in the batch is its own
    assert alone["tokens"] == found["before"][len(names) + names.index("some")]["tokens"]

    assert found["pool"][0] == found["pool"][1]
    assert "not a folder" in found["half"]
    assert found["pool after half"] == found["pool"]
    assert_right(found["after half"], ["all"], right)

    with_late = range(COUNT + 1)
    assert_differ(right(with_late), right(POOLS["all"]))
    assert found["stale"][1]["cached"] > 0
    with pytest.raises(AssertionError):
        assert_right(found["stale"], [with_late], right)
    assert found["out"] is None
    assert_right(found["restored"], ["all"], right)
    assert [answer["tokens"] for answer in found["bad"]] == [[0] * TOKENS] * len(prompts)
    assert found["add"] is None
    assert_right(found["added"], [with_late, "one"], right)

    assert "all 6 slots are taken" in found["full"]
    assert "has an expert of this name" in found["twice"]
    assert "nobody: no expert of this name" in found["unknown"]
    assert_right(found["less"], [(1, 3)], right)
    assert_right(found["none"], ["base"], right)


def test_a_server_that_is_compiled(world, engine):
    folder, experts, late, prompts, right = world
    names = tuple(CHOICES)
    script = {
        "before": ask(prompts, *names, routing="tokens"),
        "again": ask(prompts, "one", routing="tokens"),
        "totals": {"rpc": ["phatgoose_totals"]},
        "add": {"while": ask(prompts[1:], "all"), "then": {"add": str(late)}},
        "added": ask(prompts, "all"),
        "remove": {"while": ask(prompts, "all"), "then": {"remove": "e5"}},
        "removed": ask(prompts, "all"),
    }
    found = engine(
        folder / "base",
        settings(experts, routing=True),
        [{"stream": True}, *script.values()],
        runs="tests.serve.run_live",
        tokens=TOKENS,
        worker_cls=WORKER,
        max_num_batched_tokens=64,
    )
    found = dict(zip(script, found, strict=True))
    assert_right(found["before"], names, right)

    length = [len(prompt) for prompt in prompts for _ in names]
    for answer, name, tokens in zip(found["before"], names * len(prompts), length, strict=True):
        routing, allowed = answer["routing"], {f"e{number}" for number in POOLS[name]} or {""}
        assert sum(routing["shares"].values()) == pytest.approx(1.0)
        assert set(routing["shares"]) <= allowed
        [best] = routing["tokens"]
        assert len(best) == tokens + len(answer["tokens"]) - 1  # the last is read by nobody
        assert set(best) <= allowed
    [again] = found["again"][1:2]
    [best] = again["routing"]["tokens"]
    assert best.index("e3") == best.count(None) == again["cached"] > 0

    [totals] = found["totals"]
    ran = (
        sum(length)
        + len(length) * (TOKENS - 1)
        + sum(
            len(prompt) - answer["cached"] + TOKENS - 1
            for prompt, answer in zip(prompts, found["again"], strict=True)
        )
    )
    assert totals["count"] == ran
    assert totals["base"] + sum(totals["tokens"].values()) == pytest.approx(ran)
    assert totals["base"] >= sum(length) / len(names)

    with_late = range(COUNT + 1)
    done, old = found["add"]
    assert done is None
    assert_same([old], right(POOLS["all"])[1:])
    assert_right(found["added"], [with_late], right)
    done, old = found["remove"]
    assert done is None
    assert_right(old, [with_late], right)
    assert_right(found["removed"], ["all"], right)
