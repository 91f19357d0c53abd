"""What of the study needs no GPU: its page from the committed results, its steps, its methods."""

import json
import shutil
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from phatgoose import ExpertPool
from phatgoose.default import tiny
from phatgoose.evaluation import Inputs, make_methods

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "study"))


@pytest.fixture(scope="module")
def pool():
    return ExpertPool.load(tiny.expert_folders())


def test_the_page_is_made_of_the_committed_results(tmp_path):
    from write import write

    shutil.copytree(ROOT / "docs" / "study", tmp_path / "study")
    write(tmp_path / "nothing", tmp_path)
    found = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert found == (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert (tmp_path / "study" / "methods.png").stat().st_size > 10_000


def test_new_results_are_kept_without_the_answers(tmp_path):
    from write import collect

    folder = tmp_path / "out" / "results" / "small-contexts"
    folder.mkdir(parents=True)
    results = {"answers": ["answers/base/part-000.jsonl"], "average": {"base": None}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "places.json").write_text(json.dumps({"first": {}}))
    (folder / "half.json").write_text("{")
    memory = tmp_path / "out" / "memory"
    memory.mkdir()
    (memory / "small-1-part-0.json").write_text(json.dumps({"seconds": 3}))
    found = collect(tmp_path / "out", tmp_path / "docs")
    assert found == {
        "small-contexts": {"average": {"base": None}},
        "small-places": {"first": {}},
        "training": {"small-1": [{"seconds": 3}]},
    }
    assert collect(tmp_path / "gone", tmp_path / "docs") == found


def test_no_results_at_all(tmp_path):
    from write import write

    with pytest.raises(SystemExit, match="holds no results"):
        write(tmp_path, tmp_path)


def collection(root: Path, names: list[str]) -> Path:
    """A task collection of few and short examples."""
    for name in names:
        for split, count in (("train", 30), ("validation", 9), ("test", 40)):
            lines = [{"inputs": f"{name} {split} {n}", "targets": "x"} for n in range(count)]
            path = root / "tasks" / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("bbh_snarks", "copa"):
        path = root / "heldout" / name / "test.jsonl"
        path.parent.mkdir(parents=True)
        lines = [{"inputs": f"{name} {n}", "targets": "x"} for n in range(40)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = [{"name": name, "split": "tasks", "metric": "exact_match"} for name in names]
    (root / "INDEX.json").write_text(json.dumps(records))
    return root


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_few_samples_are_not_asked_and_contexts_hold_the_same_examples(tmp_path):
    from data import CONTEXTS, FEW, PLACES, prepare
    from plan import SHIPPED

    source, data = collection(tmp_path / "all", [*SHIPPED, "more"]), tmp_path / "data"
    prepare(source, data)
    few = read(data / "few" / "tasks" / "copa" / "train.jsonl")
    asked = read(data / "heldout" / "heldout" / "copa" / "test.jsonl")
    assert len(few) == FEW and len(few) + len(asked) == 40
    assert not {row["inputs"] for row in few} & {row["inputs"] for row in asked}
    assert len(read(data / "bbh" / "heldout" / "bbh_snarks" / "test.jsonl")) == 40
    assert [p.name for p in (data / "heldout" / "heldout").iterdir()] == ["copa"]
    first, second, third = (
        read(data / "contexts" / "heldout" / f"snips_{place}" / "test.jsonl") for place in PLACES
    )
    tests = {row["inputs"] for row in read(source / "tasks" / "snips" / "test.jsonl")}
    assert len(first) == CONTEXTS and {row["inputs"] for row in first} <= tests
    for one, two, three in zip(first, second, third, strict=True):
        assert two["inputs"].endswith("\n\n" + one["inputs"]) and "snips" not in two["inputs"][:5]
        assert three["inputs"].endswith("\n\n" + one["inputs"])
        assert three["inputs"].startswith(two["inputs"].partition("\n\n")[0])
        assert three["inputs"].count("\n\n") == 2
    before = (data / "done.txt").stat().st_mtime_ns
    prepare(source, data)
    assert (data / "done.txt").stat().st_mtime_ns == before


def test_tasks_are_in_parts_of_like_lengths(tmp_path):
    from run import alike

    for name, length in (("a", 10), ("b", 400), ("c", 20), ("d", 15), ("e", 380)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(("x" * length + "\n") * 3)
    found = alike(sorted(tmp_path.iterdir()), 2)
    assert [[Path(folder).name for folder in part] for part in found] == [
        ["b"],
        ["e", "c", "d", "a"],
    ]


def test_every_step_has_what_it_needs(tmp_path):
    from run import answering, training

    for kind in ("train", "few"):
        for name in ("a", "b"):
            (tmp_path / "data" / kind / "tasks" / name).mkdir(parents=True)
            (tmp_path / "data" / kind / "tasks" / name / "train.jsonl").write_text("x\n")
    import plan

    for name in plan.SHIPPED:
        folder = tmp_path / "data" / "train" / "tasks" / name
        folder.mkdir()
        (folder / "train.jsonl").write_text("x\n")
    args = Namespace(out=tmp_path, base="tiny", device=None, training="")
    steps = [*training(args), *answering(args)]
    names = {step.name for step in steps}
    assert len(names) == len(steps) and len({step.makes for step in steps}) == len(steps)
    for step in steps:
        assert step.needs <= names
        assert all(other.rank <= step.rank for other in steps if other.name in step.needs)


def test_every_method_and_variant_can_be_made(pool):
    from plan import CONTROLS, GATES, phases
    from run import variant_ranks
    from settings import PARTS, of_size, variants

    made = {method.name for method in variants()}
    assert len(made) == len(variants())
    own = {*CONTROLS, "few", *GATES, *PARTS}
    for phase in phases(*variant_ranks()):
        for name in phase.methods:
            if name in own:
                continue
            if phase.tasks == "validation":
                assert name in made
            else:
                make_methods([name], Inputs(pool, index=lambda: None))
    assert {len(of_size(name, pool).pool) for name in PARTS} == {2, 4, 8}
    names = [set(of_size(f"phatgoose, {n} experts", pool).pool.names) for n in (2, 4, 8)]
    assert names[0] < names[1] < names[2]


def test_random_adapters_are_as_large_as_the_trained(pool):
    from controls import random_pool

    control = random_pool(pool)
    assert control.names == pool.names
    for expert in pool:
        other = control[expert.name]
        assert other.gates is expert.gates
        for site, module in expert.modules.items():
            wanted = (module.b.double() @ module.a.double()).norm()
            found = (other.modules[site].b.double() @ other.modules[site].a.double()).norm()
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
            assert other.modules[site].scale == module.scale
            assert not torch.equal(other.modules[site].a, module.a.float())


def steps_of(tmp_path: Path, *rows):
    from work import Step

    return [
        Step(
            name,
            rank,
            frozenset(needs),
            commands=((sys.executable, "-c", code),),
            makes=tmp_path / f"{name}.txt",
        )
        for name, rank, needs, code in rows
    ]


def test_steps_are_done_in_order_once_and_failures_are_told(tmp_path, capsys):
    from work import Setting, Workers

    setting = Setting(tmp_path, "tiny", "cpu", None, None, None)
    steps = steps_of(
        tmp_path,
        ("late", 5, (), "pass"),
        ("first", 0, (), "pass"),
        ("second", 1, ("first",), "pass"),
        ("bad", 2, (), "raise ValueError('no such thing')"),
        ("never", 3, ("bad",), "pass"),
    )
    workers = Workers(setting, each=1)
    try:
        assert [*workers.run(steps, setting, time.monotonic() + 120)] == ["first", "second", "late"]
        assert "no such thing" in capsys.readouterr().err
        assert [*workers.run(steps[:3], setting, time.monotonic() + 60)] == []
    finally:
        workers.stop()
    told = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in told if row["wrong"]] == ["bad"]
    assert not (tmp_path / "bad.txt").exists()


def test_what_is_running_ends_with_the_time(tmp_path):
    from work import Setting, Workers

    setting, started = Setting(tmp_path, "tiny", "cpu", None, None, None), time.monotonic()
    beat = (
        f"import time\nwhile True: open({str(tmp_path / 'beat')!r}, 'a').write('x'); time.sleep(.1)"
    )
    workers = Workers(setting, each=1)
    try:
        steps = steps_of(tmp_path, ("slow", 0, (), beat))
        assert [*workers.run(steps, setting, started + 25)] == []
    finally:
        workers.stop()
    time.sleep(0.5)
    size = (tmp_path / "beat").stat().st_size
    time.sleep(0.5)
    assert (tmp_path / "beat").stat().st_size == size > 0, "it goes on"
