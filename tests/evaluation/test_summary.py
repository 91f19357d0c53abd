"""The numbers of a table, at values worked out by hand and by another computation."""

import random
from typing import Any

import numpy as np
import pytest

from phatgoose.evaluation.eval_tasks import EvalTask
from phatgoose.evaluation.summary import summarise

LINES = range(40)


def task(name: str, role: Any = "own", count: int = 40) -> EvalTask:
    return EvalTask(name, role, "accuracy", range(count), [], 32)


def right(count: int) -> list[float]:
    """Scores of examples of which the first `count` are right."""
    return [float(line < count) for line in LINES]


def test_recovered_gain_of_a_task_and_of_the_average() -> None:
    scores = {
        "a": {"base": right(10), "own": right(30), "phatgoose": right(25)},
        "b": {"base": right(0), "own": right(20), "phatgoose": right(5)},
    }
    methods = ["base", "own", "phatgoose"]
    found = summarise([task("a"), task("b")], methods, scores, {})
    assert found["results"]["a"]["own"]["score"] == 75
    assert found["recovered_gains"]["a"]["phatgoose"]["score"] == pytest.approx(75)
    assert found["recovered_gains"]["b"]["phatgoose"]["score"] == pytest.approx(25)
    # Of the means: (37.5 - 12.5) / (62.5 - 12.5).
    gain = found["recovered_gain"]["phatgoose"]
    assert gain["score"] == pytest.approx(50)
    assert gain["low"] < 50 < gain["high"]
    assert found["average_over"] == "own"
    assert found["average"]["phatgoose"]["score"] == pytest.approx(37.5)


def test_routed_as_good_as_own_recovers_all_in_every_draw() -> None:
    scores = {"a": {"base": right(10), "own": right(30), "phatgoose": right(30)}}
    found = summarise([task("a")], ["base", "own", "phatgoose"], scores, {})
    gain = found["recovered_gain"]["phatgoose"]
    assert (gain["score"], gain["low"], gain["high"]) == pytest.approx((100, 100, 100))


@pytest.mark.parametrize("own", [10, 5], ids=["no gain", "a loss"])
def test_without_a_gain_nothing_is_said_of_its_share(own: int) -> None:
    scores = {"a": {"base": right(10), "own": right(own), "phatgoose": right(12)}}
    found = summarise([task("a")], ["base", "own", "phatgoose"], scores, {})
    gain = found["recovered_gain"]["phatgoose"]
    assert gain["score"] is None and "gain less than 2 points" in gain["reason"]


def test_a_method_left_out_leaves_no_share() -> None:
    found = summarise(
        [task("a")], ["base", "arrow"], {"a": {"base": right(1), "arrow": right(2)}}, {}
    )
    assert "score of own" in found["recovered_gain"]["arrow"]["reason"]


def test_paired_differences_are_those_of_resampled_pairs() -> None:
    source = random.Random(0)
    tasks = [task("a", "heldout", 60), task("b", "heldout", 90)]
    scores: dict[str, dict[str, list[float]]] = {}
    for each in tasks:
        ours = [float(source.random() < 0.6) for _ in each.lines]
        # Mostly the same answers, so that paired intervals are much narrower than others.
        other = [s if source.random() < 0.9 else 1 - s for s in ours]
        scores[each.name] = {"phatgoose": ours, "arrow": other}
    found = summarise(tasks, ["phatgoose", "arrow"], scores, {}, resamples=4000)
    generator, draws = np.random.default_rng(5), []
    pairs = {n: np.array(s["arrow"]) - np.array(s["phatgoose"]) for n, s in scores.items()}
    for _ in range(4000):
        draws.append(np.mean([generator.choice(d, len(d)).mean() for d in pairs.values()]))
    wanted = 100 * np.mean([d.mean() for d in pairs.values()])
    low, high = 100 * np.percentile(draws, [2.5, 97.5])
    difference = found["difference"]["arrow"]
    assert difference["score"] == pytest.approx(wanted)
    assert difference["low"] == pytest.approx(low, abs=0.8)
    assert difference["high"] == pytest.approx(high, abs=0.8)
    apart = found["average"]["arrow"]
    assert difference["high"] - difference["low"] < 0.7 * (apart["high"] - apart["low"])
    assert found["differences"]["a"]["arrow"]["score"] == pytest.approx(100 * pairs["a"].mean())


def test_an_average_over_fewer_tasks_is_none_at_all() -> None:
    tasks = [task("a", "heldout"), task("b", "heldout")]
    scores = {"a": {"base": right(10), "arrow": right(40)}, "b": {"base": right(10)}}
    found = summarise(tasks, ["base", "arrow"], scores, {("b", "arrow"): "too long"})
    assert found["average"]["arrow"] == {
        "score": None,
        "low": None,
        "high": None,
        "n": 0,
        "reason": "too long",
    }
    assert found["average"]["base"]["score"] == 25


def test_intervals_of_a_task_depend_on_no_other_task() -> None:
    scores = {"a": {"base": right(10)}, "b": {"base": right(20)}}
    both = summarise([task("a"), task("b")], ["base"], scores, {})
    alone = summarise([task("b")], ["base"], {"b": scores["b"]}, {})
    assert both["results"]["b"] == alone["results"]["b"]
