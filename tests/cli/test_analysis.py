"""analyze: on the pool of the package, and on a tiny one."""

import json
import math

import pytest

from phatgoose.default import tiny as packaged

NAMES = [folder.name for folder in packaged.expert_folders()]
CPU = ("--device", "cpu")
ROWS = [
    {"inputs": "give the plural: goose", "targets": "geese"},
    {"inputs": "give the plural: hat", "targets": "hats"},
    {"inputs": "one or many: mice", "targets": "many", "choices": ["one", "many"]},
]


@pytest.fixture
def tasks(world):
    """A folder of tasks: snips, one, plurals."""
    for name in ("snips", "one", "plurals"):
        folder = world.tasks / name
        folder.mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in ROWS)
        (folder / "test.jsonl").write_text(lines)
    return world.tasks


@pytest.fixture
def tiny(world, tasks):
    """The command for the tiny base and its two experts, on all tasks."""
    pool = ("--base", world.base, "--experts", world.one, world.two)
    return ("analyze", "--tasks", tasks, *pool, *CPU, "--out", world.out)


def test_on_the_pool_of_the_package(run, world, tasks):
    argv = ("--tasks", tasks / "snips", tasks / "plurals", "--limit", 2, "--out", world.out)
    result = run("analyze", *argv, "--oracle", "plurals=proc_pluralise", "--base", "tiny", *CPU)
    assert result.code == 0, result.err
    head, *lines = result.out.splitlines()
    assert head.split()[:2] == ["task", "most"]
    assert [line.split()[0] for line in lines[:2]] == ["snips", "plurals"]
    assert "proc_pluralise" in lines[1]
    assert "analyse: 100%" in result.err and "draw: 100%" in result.err
    numbers = json.loads((world.out / "analysis.json").read_text())
    assert numbers["experts"] == NAMES
    assert numbers["settings"]["limit"] == 2 and numbers["settings"]["top_k"] == 2
    for name, oracle in (("snips", "snips"), ("plurals", "proc_pluralise")):
        task = numbers["tasks"][name]
        assert (task["examples"], task["oracle"]) == (2, oracle)
        assert sum(task["shares"]) == pytest.approx(1, abs=1e-4)
        assert task["oracle_share"] == task["shares"][NAMES.index(oracle)]
        assert len(task["modules"]) == 49 and len(task["layers"]) == 7
        assert task["most_entropy"] == pytest.approx(math.log2(len(NAMES)))
        for where in (*task["modules"], *task["layers"]):
            assert sum(where["shares"]) == pytest.approx(1, abs=1e-4)
            assert 0 <= where["entropy"] <= 4
        assert {"prompt", "answer", "all"} == set(task["layers"][0]["oracle"])
        assert sum(task["distinct"]["decoder"]) == sum(task["tokens"].values())
    pictures = {str(path.relative_to(world.out)) for path in world.out.rglob("*.png")}
    each = {f"tasks/{name}{kind}.png" for name in ("snips", "plurals") for kind in ("", "-tokens")}
    assert pictures == {"overview.png", "entropy.png", *each}
    assert all((world.out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_who_is_the_oracle(run, world, tiny, monkeypatch):
    monkeypatch.setattr("phatgoose.analysis.save_analyses", lambda *_, **__: [world.out] * 3)
    world.results.write_text(json.dumps({"oracle": {"one": "two", "plurals": "two", "far": "x"}}))
    file = world.results.rename(world.root / "results.json")

    def oracles(*values):
        result = run(*tiny, "--json", "--oracle", *values) if values else run(*tiny, "--json")
        assert result.code == 0, result.err
        return [json.loads(result.out)["tasks"][t]["oracle"] for t in ("one", "plurals", "snips")]

    assert oracles() == ["one", None, None]  # a task's own expert
    assert oracles(file) == ["one", "two", None]  # the file speaks for tasks without one
    assert oracles("two") == ["one", "two", "two"]
    assert oracles(file, "one=two", "snips=one") == ["two", "two", "one"]


def test_bad_input(refuses, world, tiny):
    refuses(*tiny, "--limit", 0, says=["--limit", "at least 1", "0"])
    refuses(*tiny, "--oracle", "ones=two", says=["ones=two", "no task is named ones", "plurals"])
    refuses(*tiny, "--oracle", "one=three", says=["one", "three", "not in the pool", "one, two"])
    refuses(*tiny, "--oracle", world.root / "no.json", says=["no.json", "Check the path"])
    refuses("analyze", "--tasks", world.one, says=[world.one, "no task here", "test.jsonl"])
    again = (world.tasks / "one", world.tasks / "one")
    refuses("analyze", "--tasks", *again, says=["has the name of", "Rename"])


@pytest.mark.parametrize("text", ["{", "[]", '{"oracle": ["one"]}', '{"oracle": {"one": 3}}', "{}"])
def test_results_without_an_oracle(refuses, world, tiny, text):
    (world.root / "bad.json").write_text(text)
    refuses(*tiny, "--oracle", world.root / "bad.json", says=["bad.json", "oracle", "TASK=EXPERT"])
