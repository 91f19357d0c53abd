"""Methods times tasks on a tiny pool: numbers, missing cells, stopping half-way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import phatgoose
from phatgoose import ExpertPool
from phatgoose.errors import ConfigError
from phatgoose.evaluation import Inputs, Routed, Single, evaluate, make_methods, methods
from phatgoose.pool.retrieval import build_index
from phatgoose.tasks import load_examples, read_examples
from tests.evaluation.world import EXPERTS, TASKS, World, save_task, save_world

PROJECT = Path(__file__).parents[2]
# Answers two parts, then begins to write a third and waits to be killed.
STOPS_IN_THE_THIRD_PART = """
import sys, time
from pathlib import Path
from phatgoose.evaluation import answers
from tests.evaluation.world import World
root, write = Path(sys.argv[1]), answers.write_bytes
def stop_in_third(path, data, done=[]):
    done.append(path)
    if len(done) == 3:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / f".{path.name}.half").write_bytes(data[: len(data) // 2])
        path.write_bytes(data[: len(data) // 2])
        (root / "now").touch()
        time.sleep(600)
    write(path, data)
answers.write_bytes = stop_in_third
World(root).run("killed")
"""


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


@pytest.fixture(scope="session")
def saved(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("evaluation"), tokenizer)


@pytest.fixture
def world(saved: Path, tmp_path: Path) -> World:
    for name in ("base", "experts", "tasks", "heldout", "INDEX.json"):
        (tmp_path / name).symlink_to(saved / name)
    return World(tmp_path)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy(methods.predict)
    monkeypatch.setattr(methods, "predict", spy)
    return spy


def answers(root: Path, out: str, method: str) -> list[dict[str, Any]]:
    files = sorted((root / out / "answers" / method).glob("*.jsonl"))
    return [json.loads(line) for f in files for line in f.read_text().split("\n") if line]


def test_numbers_are_those_of_evaluate(world: World) -> None:
    results = world.run("out")
    model, tokenizer = world.model, world.tokenizer
    phatgoose.route(model, world.pool)
    for name, (group, metric, _) in TASKS.items():
        everything = read_examples(world.root / group / name / "test.jsonl")
        role = {"tasks": "own", "heldout": "heldout"}[group]
        assert results["tasks"][name]["role"] == role
        assert results["tasks"][name]["metric"] == metric
        for method, experts in {"base": [], "own": [name], "phatgoose": EXPERTS}.items():
            cell = results["results"][name][method]
            if method == "own" and role == "heldout":
                assert (cell["score"], cell["n"]) == (None, 0)
                assert "own tasks only" in cell["reason"]
                continue
            rows = [row for row in answers(world.root, "out", method) if row["task"] == name]
            assert cell["n"] == len(rows) == 4
            rows.sort(key=lambda row: row["line"])
            examples = [everything[row["line"]] for row in rows]
            with phatgoose.restrict(model, experts):
                found = evaluate(model, tokenizer, examples, metric, max_new_tokens=32)
            assert [row["prediction"] for row in rows] == [answer.prediction for answer in found]
            mean = sum(answer.score for answer in found) / 4
            assert cell["score"] == pytest.approx(100 * mean)
            assert cell["low"] <= cell["score"] <= cell["high"]
    held_out = [results["results"][name]["base"]["score"] for name in ("letter", "vowel")]
    assert results["average"]["base"]["score"] == pytest.approx(sum(held_out) / 2)
    assert results["average_over"] == "heldout"
    phatgoose.unroute(model)


def test_what_is_written(world: World) -> None:
    results = world.run("out")
    out = world.root / "out"
    assert json.loads((out / "results.json").read_text()) == results
    assert set(results["answers"]) == {
        path.relative_to(out).as_posix() for path in out.rglob("*.jsonl")
    }
    for key in ("settings", "versions", "base", "experts", "tasks", "methods", "failed"):
        assert key in results
    assert results["settings"]["seed"] == 0 and results["versions"]["torch"]
    assert all(len(task["hash"]) == 64 for task in results["tasks"].values())
    assert results["methods"]["phatgoose"]["router"] == "phatgoose"
    text = (out / "table.md").read_text()
    assert "| letter | accuracy | 4 |" in text and "recovered gain" in text
    assert str(world.root) not in text + json.dumps(results)
    told = [cell["score"] is not None for cell in results["recovered_gain"].values()]
    for name, there in (("average.png", True), ("recovered-gain.png", any(told))):
        assert (out / name).exists() == there
        assert not there or (out / name).read_bytes().startswith(b"\x89PNG")


def test_the_stream_is_mixed_and_unlabelled(world: World, spy: Spy) -> None:
    world.run("out", ["phatgoose"])
    assert [len(prompts) for prompts in spy.calls] == [8, 8]
    for prompts in spy.calls:  # one first word for each task, letters apart
        assert len({prompt.split()[0][:3] for prompt in prompts}) > 1


def test_an_interrupted_run_goes_on_where_it_stopped(world: World, spy: Spy) -> None:
    wanted = world.run("whole")
    calls, spy.calls, spy.allowed = len(spy.calls), [], 3
    with pytest.raises(KeyboardInterrupt):
        world.run("cut")
    assert not (world.root / "cut" / "results.json").exists()
    spy.calls, spy.allowed = [], None
    assert world.run("cut") == wanted
    assert 0 < len(spy.calls) < calls
    for name in ("results.json", "table.md", "average.png"):
        assert (world.root / "cut" / name).read_bytes() == (
            world.root / "whole" / name
        ).read_bytes()
    spy.calls = []
    assert world.run("cut") == wanted
    assert not spy.calls
    world.run("cut", ["base", Routed("cold", options={"temperature": 0.5})])
    assert len(spy.calls) == 2  # the base's answers stay


@pytest.mark.parametrize("damage", ["cut", "empty", "score", "order"])
def test_damaged_answers_are_computed_again(world: World, spy: Spy, damage: str) -> None:
    wanted = world.run("out")
    path = sorted((world.root / "out" / "answers" / "phatgoose").iterdir())[1]
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text(
        {
            "cut": whole[: len(whole) // 2],
            "empty": "",
            "score": whole.replace('"score"', '"scores"'),
            "order": "".join(reversed(lines)),
        }[damage]
    )
    spy.calls = []
    assert world.run("out") == wanted
    assert len(spy.calls) == 1
    assert path.read_text() == whole


def test_killed_and_started_again_it_gives_the_same(world: World) -> None:
    wanted = world.run("whole")
    command = [sys.executable, "-c", STOPS_IN_THE_THIRD_PART, str(world.root)]
    paths = os.pathsep.join([str(PROJECT), str(PROJECT / "src")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not (world.root / "now").exists() and running.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    _, errors = running.communicate()
    assert running.returncode == -signal.SIGKILL, errors.decode()
    assert not (world.root / "killed" / "results.json").exists()
    assert len(list((world.root / "killed").rglob("part-*.jsonl"))) == 3
    assert world.run("killed") == wanted


def test_a_method_that_cannot_serve_the_pool_leaves_marked_cells(world: World) -> None:
    bare = ExpertPool([replace(world.pool["copy"], gates=None)])
    results = world.run("out", ["base", Routed("gateless", pool=bare)])
    reason = results["failed"]["gateless"]
    assert "has no gates" in reason
    for cells in results["results"].values():
        cell = cells["gateless"]
        assert (cell["score"], cell["n"], cell["reason"]) == (None, 0, reason)
    assert results["average"]["gateless"]["score"] is None
    text = (world.root / "out" / "table.md").read_text()
    assert "| gateless | — |" in text and f"- gateless: {reason}" in text
    with pytest.raises(ConfigError, match="none could answer.*has no gates"):
        world.run("out", [Routed("gateless", pool=bare)])


def test_a_task_no_model_can_answer_is_marked(world: World) -> None:
    long = {"inputs": "p", "targets": "a" * 70, "choices": ["a" * 70, "b"]}
    save_task(world.root / "more" / "long", [long, {**long, "inputs": "q"}])
    results = world.run("out", tasks=world.tasks("more", "heldout"))
    cell = results["results"]["long"]["base"]
    assert cell["score"] is None and "longer than the 64 tokens" in cell["reason"]
    alone = world.run("alone", tasks=world.tasks("heldout"))
    assert results["average"]["base"] == alone["average"]["base"]
    assert "| long | accuracy | 2 | — |" in (world.root / "out" / "table.md").read_text()
    with pytest.raises(ConfigError, match="none can be asked.*longer"):
        world.run("out", tasks=world.tasks("more"))


def test_oracle_and_best_individual_are_the_best_singles(world: World, spy: Spy) -> None:
    names = [f"single:{name}" for name in EXPERTS]
    held_out = world.tasks("heldout")
    results = world.run("out", ["oracle", "best_individual", *names], tasks=held_out)
    cells = results["results"]
    for task in cells.values():
        best = max(task[name]["score"] for name in names)
        assert task["oracle"]["score"] == best
    averages = {name: results["average"][name]["score"] for name in names}
    assert results["average"]["best_individual"]["score"] == max(averages.values())
    spy.calls = []
    few = world.run("few", ["oracle"], tasks=held_out, inputs=Inputs(world.pool, probe=2))
    asked = sum(map(len, spy.calls))
    assert (
        asked == 3 * 2 * 2 + 2 * 2
    )  # all singles on two of each task, then the chosen on the rest
    assert few["results"]["letter"]["oracle"]["n"] == 4
    assert few["methods"]["oracle"]["probe"] == 2
    assert set(few["results"]["letter"]) == {"oracle"}


def test_singles_are_answered_in_one_batch_and_as_they_are_alone(world: World, spy: Spy) -> None:
    held_out = world.tasks("heldout")
    world.run("out", ["oracle"], tasks=held_out, part=64)
    assert len(spy.calls[0]) == 3 * 8, "all singles on all examples at once"
    spy.calls = []
    alone = [f"single:{name}" for name in EXPERTS]
    world.run("alone", alone, tasks=held_out, part=64)
    assert [len(call) for call in spy.calls] == [8] * 3

    def rows(folder: str) -> dict[str, str]:
        found = (world.root / folder / "answers").glob("single*/*.jsonl")
        return {f"{path.parent.name}/{path.name}": path.read_text() for path in found}

    assert rows("out") == rows("alone")


def test_methods_that_choose_the_same_expert_share_its_answers(world: World, spy: Spy) -> None:
    """Whoever comes first computes them; what the others write is what they would have alone."""
    names = ["own", "single:colour", "single:copy"]
    shared = world.run("shared", names, part=64)
    own, colour, copy = spy.calls
    assert len(own) == 8, "four examples of two tasks"
    assert [len(colour), len(copy)] == [12, 12], "but those that own has answered by this expert"
    assert not set(own) & {p for p in colour if p.startswith("colour")}
    for name in names:
        spy.calls = []
        alone = world.run("alone", [name], part=64)
        cells = {task: row[name] for task, row in alone["results"].items()}
        assert cells == {task: row[name] for task, row in shared["results"].items()}
        assert len(spy.calls[0]) == (8 if name == "own" else 16)
        assert answers(world.root, "alone", name.replace(":", "-")) == answers(
            world.root, "shared", name.replace(":", "-")
        )


def test_singles_that_were_interrupted_go_on(world: World, spy: Spy) -> None:
    held_out = world.tasks("heldout")  # eight examples, an expert's part
    spy.allowed = 2
    with pytest.raises(KeyboardInterrupt):
        world.run("out", ["oracle"], tasks=held_out, part=8)
    spy.allowed, spy.calls = None, []
    world.run("out", ["oracle"], tasks=held_out, part=8)
    assert len(spy.calls[0]) == 8, "one expert was left"


def test_methods_of_several_pools_and_settings(world: World) -> None:
    some = ExpertPool([world.pool["copy"], world.pool["spare"]])
    ours = [
        Routed("k=1", options={"top_k": 1}),
        Routed("two experts", pool=some),
        Single("copy", expert="copy", pool=some),
    ]
    results = world.run("out", ["phatgoose", *ours])
    assert list(results["average"]) == ["phatgoose", "k=1", "two experts", "copy"]
    assert set(results["methods"]["two experts"]["experts"]) == {"copy", "spare"}
    assert results["methods"]["k=1"]["top_k"] == 1
    assert set(results["difference"]) == {"k=1", "two experts", "copy"}


def test_all_methods_that_the_inputs_allow(world: World) -> None:
    made, left_out = make_methods(["all"], Inputs(world.pool))
    assert {"base", "own", "phatgoose", "oracle"} <= {method.name for method in made}
    assert "--train-tasks" in left_out["retrieval"] and "--multitask" in left_out["multitask"]
    assert "--weights" in left_out["weights"] and "--examples" in left_out["lorahub"]
    training = {name: load_examples(world.root / "tasks" / name) for name in EXPERTS}
    inputs = Inputs(
        world.pool,
        index=lambda: build_index(training, world.model, world.tokenizer),
        multitask=world.root / "experts" / "spare",
        weights={"spare": 1.0},
        examples=training["copy"],
    )
    results = world.run("out", ["all", "single:spare"], inputs=inputs)
    assert set(results["left_out"]) == {"phatgoose_mixed"}
    # The stored prompts are the test prompts, so each finds the expert of its task.
    own = {name: results["results"][name]["own"] for name in ("colour", "copy")}
    assert {name: results["results"][name]["retrieval"] for name in own} == own
    assert all(
        results["results"][n]["multitask"] == results["results"][n]["single:spare"] for n in TASKS
    )
    for name in TASKS:
        assert results["results"][name]["weights"] == results["results"][name]["single:spare"]
    for name, words in (
        ("retrieval", "--train-tasks"),
        ("flight", "none is called 'flight'"),
        ("single:none", "none"),
    ):
        with pytest.raises(ConfigError, match=words):
            make_methods([name], Inputs(world.pool))
