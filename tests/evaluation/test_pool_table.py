"""The recovered gain of the pool's table, at values worked out by hand."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
LINES = range(40)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not RECIPES.is_dir():
        pytest.skip("the source archive has no recipes")
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("pool_table")


def right(count: int) -> dict[int, float]:
    """Scores of examples of which the first `count` are right."""
    return {line: float(line < count) for line in LINES}


def summarise(recipe: Any, scores: dict[str, Any]) -> Any:
    tasks = [
        SimpleNamespace(name=name, group="tasks", metric="accuracy", lines=list(LINES))
        for name in scores
    ]
    return recipe.summarise(tasks, scores)


def test_recovered_gain_of_a_task_and_of_the_average(recipe: Any) -> None:
    scores = {
        "a": {"base": right(10), "own": right(30), "routed": right(25)},
        "b": {"base": right(0), "own": right(20), "routed": right(5)},
    }
    found = summarise(recipe, scores)
    assert found["tasks"]["a"]["own"]["value"] == 0.75
    assert found["tasks"]["a"]["recovered"]["value"] == pytest.approx(15 / 20)
    assert found["tasks"]["b"]["recovered"]["value"] == pytest.approx(5 / 20)
    # Of the means: (0.375 - 0.125) / (0.625 - 0.125).
    average = found["averages"]["tasks"]["recovered"]
    assert average["value"] == pytest.approx(0.5)
    assert average["low"] < 0.5 < average["high"]


def test_routed_as_good_as_own_recovers_all_in_every_draw(recipe: Any) -> None:
    scores = {"a": {"base": right(10), "own": right(30), "routed": right(30)}}
    found = summarise(recipe, scores)["tasks"]["a"]["recovered"]
    assert (found["value"], found["low"], found["high"]) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize("own", [10, 5], ids=["no gain", "a loss"])
def test_without_a_gain_nothing_is_said_of_its_share(recipe: Any, own: int) -> None:
    scores = {"a": {"base": right(10), "own": right(own), "routed": right(12)}}
    assert summarise(recipe, scores)["tasks"]["a"]["recovered"] is None


def test_a_method_left_out_leaves_no_share(recipe: Any) -> None:
    found = summarise(recipe, {"a": {"base": right(10), "routed": right(12)}})
    assert "recovered" not in found["tasks"]["a"] and "own" not in found["tasks"]["a"]
