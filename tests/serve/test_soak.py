"""The soak finds answers of a wrong pool, and memory that grows."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
NONE, ALL = frozenset(), frozenset({"snips"})
ASKED = ("pool", 0)


@pytest.fixture
def script(monkeypatch):
    pytest.importorskip("openai", reason="vLLM brings it")
    if not FOLDER.exists():
        pytest.skip("the source archive has no benchmarks")
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("soak_server")


@pytest.fixture
def soak(script):
    found = script.Soak(SimpleNamespace(url="http://nowhere"), seed=0)
    found.pools = {0: NONE, 1: ALL}
    found.right = {NONE: {ASKED: "old"}, ALL: {ASKED: "new"}}
    return found


@pytest.mark.parametrize(
    ("text", "generation", "shares", "is_right"),
    [
        ("old", 0, ["ud_pos"], True),
        ("new", 1, ["ud_pos", "snips"], True),
        ("new", 0, ["ud_pos"], False),
        ("old", 1, ["ud_pos"], False),
        ("odd", 1, ["ud_pos"], False),
        ("old", 0, ["snips"], False),  # by an expert that was not there
        ("old", 2, ["ud_pos"], False),  # by a pool that never was
    ],
)
def test_answers_of_a_wrong_pool(soak, text, generation, shares, is_right):
    soak.check(ASKED, text, {"generation": generation, "shares": dict.fromkeys(shares, 0.5)})
    assert (not soak.tally.wrong) == is_right


def test_an_answer_that_does_not_tell_its_routing(soak):
    soak.check(ASKED, "old", None)
    assert soak.tally.wrong


def test_growth(script):
    flat = [{"minutes": m, "server": 100.0, "worker": 900.0 + 50 * (m == 0)} for m in range(9)]
    assert script.growth(flat) == 0.0
    leak = [{"minutes": m, "server": 100.0, "worker": 900.0 + 100 * m} for m in range(9)]
    assert script.growth(leak) > script.GROWTH


def test_seconds_before_and_after_the_drain(script):
    told = [{"event": "expert_added", "drain_seconds": d, "change_seconds": 0.25} for d in (3, 1)]
    lines = [f"INFO x [phatgoose] {json.dumps(event)}" for event in told]
    found = script.of_changes([3.5, 4.0], "\n".join(["a line", *lines]))
    assert found == ([0.25, 2.75], [0.25, 0.25])
    with pytest.raises(RuntimeError, match="1 changes, and 2"):
        script.of_changes([3.5], "\n".join(lines))
