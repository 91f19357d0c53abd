"""experts train and experts gate: as if one by one, resumable, and clear about what is wrong."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from phatgoose.experts import load_expert
from phatgoose.experts.kinds import KINDS
from phatgoose.experts.lora import CONFIG_FILE, WEIGHTS_FILE
from phatgoose.train.collection import GROUP, WORK
from phatgoose.train.loop import loop
from tests.tolerances import TOLERANCE, assert_near

NEAR = TOLERANCE[torch.float32].delta  # after some steps of AdamW
TASKS = {
    "reverse": [
        {"prompt": f"{w} becomes ", "completion": w[::-1]} for w in ("goose", "hat", "rank")
    ],
    "yes": [{"inputs": f"is it a {w}?", "targets": "yes"} for w in ("goose", "cat")],
    "long": [{"text": "goose hat rank " * n} for n in (1, 2, 3, 2)],
}
SHORT = ("--device", "cpu", "--batch-size", 3, "--gate-steps", 12)


@pytest.fixture
def tasks(world):
    """Three task folders, of which each has other data."""
    for name, rows in TASKS.items():
        folder = world.root / "tasks" / name
        folder.mkdir(parents=True)
        lines = "\n".join(json.dumps(row) for row in rows)
        (folder / "train.jsonl").write_text(lines)
    return world.root / "tasks"


@pytest.fixture
def adapters(world, tasks):
    """Two adapters without gates, named like two tasks."""
    for before, name in (("one", "yes"), ("two", "long")):
        shutil.copytree(world.ungated(before), world.root / "adapters" / name)
    return world.root / "adapters"


def near(found, wanted, *files):
    """Whether two folders hold nearly the same numbers, and the same record."""
    for file in files:
        one, other = load_file(found / file), load_file(wanted / file)
        assert one.keys() == other.keys()
        for name in one:
            assert_near(one[name], other[name], NEAR)


def record(folder):
    found = asdict(load_expert(folder).gates.record)
    return {key: found[key] for key in ("base", "training", "steps", "examples", "tokens")}


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def train(world, tasks):
    """The command, for a pool."""
    return lambda pool, *more: (
        *("experts", "train", "--tasks", tasks, "--base", world.base, "--out", pool),
        *(*SHORT, "--steps", 12, "--rank", 2, *more),
    )


def test_train_makes_the_experts_that_train_makes_one_by_one(run, world, tasks, train):
    pool = world.root / "pool"
    result = run(*train(pool, "--json"))
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert sorted(row["folder"] for row in told["trained"]) == sorted(
        str(pool / name) for name in TASKS
    )
    assert told["there"] == []
    assert sorted(path.name for path in pool.iterdir()) == sorted(TASKS)
    for name in TASKS:
        alone = world.root / "alone" / name
        argv = ("train", "--data", tasks / name, "--base", world.base, "--out", alone)
        assert run(*argv, *SHORT, "--steps", 12, "--rank", 2).code == 0
        near(pool / name, alone, WEIGHTS_FILE, KINDS["gates"].file)
        assert record(pool / name) == record(alone)
        assert load_expert(pool / name).gates is not None
        assert f"# {name}\n" in (pool / name / "README.md").read_text()
    assert run("experts", "verify", pool, "--base", world.base).code == 0


def test_what_is_there_is_left_alone(run, world, tasks, train):
    pool = world.root / "pool"
    shutil.move(tasks / "yes", world.root / "later")
    assert run(*train(pool)).code == 0
    before = files(pool)
    shutil.move(world.root / "later", tasks / "yes")
    result = run(*train(pool))
    assert result.code == 0
    lines = sorted(result.out.splitlines())
    assert lines[0] == f"{pool / 'long'}: there already"
    assert lines[2].startswith(f"{pool / 'yes'}: gates after 12 steps on 24 examples, loss ")
    after = files(pool)
    assert before.items() <= after.items() and len(after) == len(before) * 3 // 2


@pytest.mark.parametrize("phase", ["adapters", "gates"])
def test_train_goes_on_where_it_was_stopped(run, world, train, monkeypatch, phase):
    """Stopped in the second of two groups, two steps after a checkpoint."""
    wanted, pool = world.root / "wanted", world.root / "pool"
    result = run(*train(wanted, "--together", 2))
    assert result.code == 0
    assert "1/2: " in result.err and "2/2: long" in result.err  # by length
    step, steps = loop.Loop._step, []

    def stopping(self, stream, forward, done):
        if len(self.names) == 1 and self.what.startswith(phase) and done.step == 11:
            raise KeyboardInterrupt
        return step(self, stream, forward, done)

    def counting(self, *rest):
        steps.append(self.what)
        return step(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_step", stopping)
        assert run(*train(pool, "--together", 2)).code == 130
    visible = [path.name for path in pool.iterdir() if not path.name.startswith(".")]
    assert len(visible) == 2 and all(load_expert(pool / name).gates for name in visible)
    monkeypatch.setattr(loop.Loop, "_step", counting)
    assert run(*train(pool)).code == 0  # the group that was begun is gone on with
    assert steps == ["adapters"] * 2 + ["gates"] * 12 if phase == "adapters" else ["gates"] * 2
    assert files(pool) == files(wanted)


def test_an_interrupt_while_experts_are_put_in_place(run, world, train, monkeypatch):
    wanted, pool = world.root / "wanted", world.root / "pool"
    assert run(*train(wanted)).code == 0
    from phatgoose.experts import Gates

    save, saved = Gates.save, []

    def second_fails(self, folder):
        saved.append(folder)
        if len(saved) == 2:
            raise KeyboardInterrupt
        return save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Gates, "save", second_fails)
        assert run(*train(pool)).code == 130
    assert len([path for path in pool.iterdir() if not path.name.startswith(".")]) == 1
    assert run(*train(pool)).code == 0
    assert files(pool) == files(wanted)


def test_gate_trains_what_gate_trains_one_by_one(run, world, tasks, adapters):
    argv = ("experts", "gate", adapters, "--tasks", tasks, "--base", world.base, *SHORT)
    result = run(*argv)
    assert result.code == 0, result.err
    assert [line.split(": ")[0] for line in result.out.splitlines()] == [
        str(adapters / name) for name in ("long", "yes")
    ]
    for name, expert in (("yes", "one"), ("long", "two")):
        alone = world.root / expert
        assert run("gate", alone, "--data", tasks / name, "--base", world.base, *SHORT).code == 0
        near(adapters / name, alone, KINDS["gates"].file)
        assert record(adapters / name) == record(alone)
    assert sorted(path.name for path in adapters.iterdir()) == ["long", "yes"]
    before = files(adapters)
    result = run(*argv, "--json")
    assert json.loads(result.out) == {
        "trained": [],
        "there": [str(adapters / name) for name in ("long", "yes")],
    }
    assert files(adapters) == before


def test_gates_of_another_adapter_are_as_good_as_none(run, world, tasks, adapters):
    argv = ("experts", "gate", adapters, "--tasks", tasks, "--base", world.base, *SHORT, "--json")
    assert run(*argv).code == 0
    wanted = shutil.copytree(adapters / "long", world.root / "wanted")
    shutil.copy(adapters / "yes" / KINDS["gates"].file, adapters / "long")
    assert json.loads(run(*argv).out)["there"] == [str(adapters / "yes")]
    near(adapters / "long", wanted, KINDS["gates"].file)


def test_gate_goes_on_where_it_was_stopped(run, world, tasks, adapters, monkeypatch):
    argv = ("experts", "gate", adapters, "--tasks", tasks, "--base", world.base, *SHORT)
    with monkeypatch.context() as patch:
        patch.setattr("phatgoose.experts.Gates.save", _interrupted)
        assert run(*argv).code == 130
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_step", _interrupted)
        assert run(*argv).code == 0  # no step was left to take
    assert run("experts", "verify", adapters, "--base", world.base).code == 0
    assert sorted(path.name for path in adapters.iterdir()) == ["long", "yes"]


def _interrupted(*_):
    raise KeyboardInterrupt


class TestTrainRefuses:
    def test_bad_tasks(self, refuses, world, tasks, train):
        pool = world.root / "pool"
        (tasks / "yes" / "train.jsonl").write_text("{")
        refuses(*train(pool), says=[tasks / "yes", "line 1", "not JSON"])
        shutil.rmtree(tasks)
        tasks.mkdir()
        refuses(*train(pool), says=[tasks, "no task here", "train.jsonl"])

    def test_two_tasks_of_one_name(self, refuses, world, tasks, train):
        more = shutil.copytree(tasks / "yes", world.root / "more" / "yes")
        argv = list(train(world.root / "pool"))
        argv.insert(argv.index(tasks), more)
        refuses(*argv, says=["yes", "has the name of", "Rename"])

    @pytest.mark.parametrize(
        ("option", "value"),
        [("--together", 0), ("--rank", 0), ("--gate-steps", 0), ("--batch-size", 0)],
    )
    def test_settings_out_of_range(self, refuses, world, train, option, value):
        says = [f"{option} must be", value]
        refuses(*train(world.root / "pool", option, value), says=says)

    def test_what_is_no_expert(self, refuses, world, train):
        pool = world.root / "pool"
        shutil.copytree(world.ungated("one"), pool / "yes")
        refuses(*train(pool), says=[pool / "yes", "has no gates", "phatgoose gate"])

    def test_experts_of_another_base(self, refuses, world, train):
        pool = world.root / "pool"
        shutil.copytree(world.foreign(), pool / "yes")
        refuses(*train(pool), says=[pool / "yes", "another base", "Move it away"])

    def test_a_loss_that_is_not_a_number(self, run, world, tasks, train):
        (tasks / "yes" / "train.jsonl").write_text(json.dumps({"text": ""}))
        result = run(*train(world.root / "pool"))
        assert result.code == 1
        (line,) = result.lines
        assert line.startswith("phatgoose: yes: the loss is nan at step 1.")
        assert [p.name for p in (world.root / "pool").iterdir() if p.name[0] != "."] == []


class TestGateRefuses:
    def test_an_adapter_without_task(self, refuses, world, tasks):
        argv = ("experts", "gate", world.one, "--tasks", tasks, "--base", world.base)
        refuses(*argv, says=[world.one, "no task is named one", "phatgoose gate"])

    def test_two_adapters_of_one_name(self, refuses, world, tasks, adapters):
        other = shutil.copytree(adapters / "yes", world.root / "more" / "yes")
        argv = ("experts", "gate", adapters, other, "--tasks", tasks, "--base", world.base)
        refuses(*argv, says=[other, "has the name of", "Rename"])

    def test_adapters_of_the_hub(self, refuses, world, tasks):
        argv = ("experts", "gate", "owner/expert", "--tasks", tasks, "--base", world.base)
        refuses(*argv, says=["owner/expert", "not a folder", "phatgoose experts pull"])

    def test_adapters_of_two_bases(self, refuses, world, tasks, adapters):
        for name, base in (("long", None), ("long", world.base), ("yes", world.other)):
            path = adapters / name / CONFIG_FILE
            config = json.loads(path.read_text())
            path.write_text(json.dumps({**config, "base_model_name_or_path": base and str(base)}))
            if base is None:
                says = [adapters / "long", "names no base", "--base"]
                refuses("experts", "gate", adapters, "--tasks", tasks, says=says)
        argv = ("experts", "gate", adapters, "--tasks", tasks)
        refuses(*argv, says=[adapters / "yes", world.base, world.other, "one base at a time"])

    def test_an_adapter_of_another_base(self, refuses, world, tasks, adapters):
        argv = ("experts", "gate", adapters, "--tasks", tasks, "--base", world.other)
        refuses(*argv, says=["its LoRA of model.layers.0", "another base"])


@pytest.fixture
def on_two(train):
    """The command over two processes; --device and --devices exclude each other."""

    def words(pool, *more):
        given = list(train(pool, *more))
        at = given.index("--device")
        return (*given[:at], *given[at + 2 :], "--devices", "cpu", "cpu")

    return words


def test_two_devices_train_what_one_does(run, world, train, on_two):
    wanted, pool = world.root / "wanted", world.root / "pool"
    assert run(*train(wanted, "--together", 2)).code == 0
    result = run(*on_two(pool, "--json"))
    assert result.code == 0, result.err
    assert len(json.loads(result.out)["trained"]) == 3
    assert "1/2: " in result.err and "2/2: " in result.err  # two and one, without --together
    assert files(pool).keys() == files(wanted).keys()
    for name in TASKS:
        near(pool / name, wanted / name, WEIGHTS_FILE, KINDS["gates"].file)
        assert record(pool / name) == record(wanted / name)
    again = run(*on_two(pool))
    assert again.code == 0 and again.out.count(": there already") == 3


def test_two_devices_go_on_where_one_was_stopped(run, world, train, on_two, monkeypatch):
    wanted, pool = world.root / "wanted", world.root / "pool"
    assert run(*train(wanted, "--together", 2)).code == 0
    step = loop.Loop._step

    def stopping(self, stream, forward, done):
        if self.what == "gates" and done.step == 11:
            raise KeyboardInterrupt
        return step(self, stream, forward, done)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_step", stopping)
        assert run(*train(pool, "--together", 2)).code == 130
    (begun,) = (pool / WORK).glob(f"*/{GROUP}")
    checkpoints = {path.name for path in begun.parent.glob("*.safetensors")}
    assert any(name.startswith("adapters-") for name in checkpoints)
    result = run(*on_two(pool))
    assert result.code == 0, result.err
    assert {path.name for path in pool.iterdir()} == set(TASKS)  # nothing of the progress is left
    for name in TASKS:
        near(pool / name, wanted / name, WEIGHTS_FILE, KINDS["gates"].file)


def test_what_goes_wrong_on_one_of_two_devices_is_told(run, world, tasks, on_two):
    pool = world.root / "pool"
    result = run(*on_two(pool, "--target-modules", "nowhere"))
    assert result.code == 1
    assert "nowhere" in result.err and "Traceback" not in result.err
    assert [path.name for path in pool.iterdir()] == [WORK]  # to go on with


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--device", "cpu", "--devices", "cpu", "cpu"), "in place of --device"),
        (("--devices", "all"), "no GPU"),
        (("--devices", "abacus"), "abacus: no device"),
    ],
)
def test_devices_that_cannot_be(run, world, tasks, words, told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    argv = ("experts", "train", "--tasks", tasks, "--base", world.base, "--out", world.root / "p")
    result = run(*argv, *words)
    assert result.code == 1
    assert told in result.err


def test_processes_that_were_launched_together_take_no_devices(run, world, on_two, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run(*on_two(world.root / "pool"))
    assert result.code == 1
    assert "accelerate launch" in result.err
