"""The recipe that makes a pool's table, on a tiny pool: its numbers, and stopping half-way."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import phatgoose
from phatgoose.evaluation import evaluate, mean_interval
from phatgoose.models import load_base
from phatgoose.tasks import read_examples
from tests.models import LINEARS, make_model, save_expert

RECIPES = Path(__file__).parents[2] / "recipes"
TASKS = {  # name: group, metric, lines
    "colour": (
        "tasks",
        "accuracy",
        [
            {"inputs": f"colour {i}?", "targets": c, "choices": ["red", "blue", "no"]}
            for i, c in enumerate(["red", "blue", "no", "red", "blue"])
        ],
    ),
    "copy": (
        "tasks",
        "squad_f1",
        [{"inputs": f"say: {w}", "targets": w, "choices": None} for w in "abcde"],
    ),
    "letter": (
        "heldout",
        "accuracy",
        [
            {"inputs": f"{x}?", "targets": x, "choices": [x, "q", "long \u2028 one"]}
            for x in "stuvw"
        ],
    ),
}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not RECIPES.is_dir():
        pytest.skip("the source archive has no recipes")
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("evaluate_pool")


@pytest.fixture
def start(recipe: Any, tokenizer: Any, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """start("out", ...more arguments): run the recipe, return results.json."""
    model = make_model("llama", layers=1)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("colour", "copy", "spare")):
        save_expert(tmp_path / "experts" / name, model, seed=seed, targets=LINEARS["llama"])
    index = []
    for name, (group, metric, lines) in TASKS.items():
        folder = tmp_path / "collection" / group / name
        folder.mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "test.jsonl").write_text(text, encoding="utf-8")
        index.append({"name": name, "split": group, "metric": metric})
    (tmp_path / "collection" / "INDEX.json").write_text(json.dumps(index))

    def run(out: str, *more: str) -> dict[str, Any]:
        folders = {"base": "base", "experts": "experts", "tasks": "collection", "out": out}
        given = [x for key, value in folders.items() for x in (f"--{key}", str(tmp_path / value))]
        usual = ["--device", "cpu", "--limit", "4", "--part", "5", "--diagnose", "2"]
        assert recipe.main([*given, *usual, *more]) == 0
        return json.loads((tmp_path / out / "results.json").read_text())

    return run


class Spy:
    """Stands for `predict`: keeps the prompts of every call, and fails after `allowed` calls."""

    def __init__(self, predict: Callable[..., list[str]]) -> None:
        self.predict = predict
        self.calls: list[list[str]] = []
        self.allowed: int | None = None

    def __call__(self, model: Any, tokenizer: Any, examples: Any, **settings: Any) -> list[str]:
        if len(self.calls) == self.allowed:
            raise KeyboardInterrupt
        self.calls.append([example.prompt for example in examples])
        return self.predict(model, tokenizer, examples, **settings)


@pytest.fixture
def spy(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy(recipe.predict)
    monkeypatch.setattr(recipe, "predict", spy)
    return spy


def test_numbers_are_those_of_evaluate(start: Callable[..., Any], tmp_path: Path) -> None:
    results = start("out")
    names = ["colour", "copy", "spare"]
    assert list(results["experts"]) == names
    assert set(results["tasks"]) == set(TASKS)
    pool = phatgoose.ExpertPool.load(tmp_path / "experts" / name for name in names)
    model, tokenizer = load_base(tmp_path / "base", device="cpu")
    answers = {path: path.read_text().split("\n")[:-1] for path in tmp_path.rglob("answers/*/*l")}
    given = [json.loads(line) for lines in answers.values() for line in lines]
    assert len(given) == 12 + 8 + 12  # base, own, routed
    phatgoose.route(model, pool)
    for name, (group, metric, _) in TASKS.items():
        everything = read_examples(tmp_path / "collection" / group / name / "test.jsonl")
        row = results["tasks"][name]
        assert (row["group"], row["metric"], row["n"]) == (group, metric, 4)
        lines = sorted({a["line"] for a in given if a["task"] == name})
        assert len(lines) == 4
        examples = [everything[line] for line in lines]
        for method, experts in {"base": [], "own": [name], "routed": names}.items():
            if method not in row:
                assert (group, method) == ("heldout", "own")
                continue
            with phatgoose.restrict(model, experts):
                found = evaluate(model, tokenizer, examples, metric, max_new_tokens=32)
            assert row[method]["value"] == mean_interval([a.score for a in found]).value
            assert row[method]["low"] <= row[method]["value"] <= row[method]["high"]
    shares = results["own_share"]
    assert set(shares) == {"colour", "copy"}
    assert all(0 <= share <= 1 for parts in shares.values() for share in parts.values())
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| colour | accuracy | 4 |" in text and "| letter | accuracy | 4 |" in text
    assert str(tmp_path) not in text + json.dumps(results)


def test_the_stream_is_mixed(start: Callable[..., Any], spy: Spy) -> None:
    start("out", "--methods", "routed")
    assert [len(prompts) for prompts in spy.calls] == [5, 5, 2]
    for prompts in spy.calls:  # they begin with "colour", "say:" or a letter: one for each task
        assert len({len(prompt.split()[0]) for prompt in prompts}) > 1


def test_an_interrupted_run_goes_on_where_it_stopped(
    start: Callable[..., Any], spy: Spy, tmp_path: Path
) -> None:
    wanted = start("whole")
    assert len(spy.calls) == 8  # 3 parts by base, 3 by the pool, 2 tasks by their experts
    spy.calls, spy.allowed = [], 4
    with pytest.raises(KeyboardInterrupt):
        start("cut")
    assert not (tmp_path / "cut" / "results.json").exists()
    assert len(list((tmp_path / "cut").rglob("*.jsonl"))) == 4
    spy.calls, spy.allowed = [], None
    assert start("cut") == wanted
    assert len(spy.calls) == 4
    for name in ("results.json", "table.md"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    spy.calls = []
    assert start("cut") == wanted
    assert not spy.calls
    other = start("cut", "--temperature", "0.5")  # the base's and the own experts' answers stay
    assert len(spy.calls) == 3
    assert other["tasks"]["colour"]["own"] == wanted["tasks"]["colour"]["own"]
    assert other["settings"]["temperature"] == 0.5


def test_what_it_cannot_do_is_said_at_once(
    start: Callable[..., Any], recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ["--base", str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    experts, tasks = ["--experts", str(tmp_path / "experts")], ["--tasks", str(tmp_path)]
    for more, words in (
        ([*experts, *tasks], "INDEX.json"),
        (["--experts", str(tmp_path), *tasks], "holds no expert folders"),
        ([*experts, *tasks, "--top-k", "9"], "top_k is 9"),
        ([*experts, *tasks, "--router", "none"], "no router is called"),
    ):
        assert recipe.main([*folders, *more]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
