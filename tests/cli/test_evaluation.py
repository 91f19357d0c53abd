"""phatgoose eval: the default pool from start to end, and what it refuses."""

import json
import shutil

import pytest
import torch

from phatgoose.default import tiny
from phatgoose.evaluation import method_names
from phatgoose.routers import evidence, zscore

KINDS = ["play music", "rate a book", "get the weather"]
TASKS = {
    "snips": [
        {"inputs": f"A user says: {said}.\nThe user wants to:", "targets": want, "choices": KINDS}
        for said, want in [
            ("put on some jazz", "play music"),
            ("is it going to rain in Rome", "get the weather"),
        ]
    ],
    "subjectivity": [
        {
            "inputs": f"Is this a fact or an opinion? {x}",
            "targets": y,
            "choices": ["fact", "opinion"],
        }
        for x, y in [("He drives to Rome .", "fact"), ("a dull , lifeless film .", "opinion")]
    ],
    "wants": [
        {"inputs": f"{said}. This is about", "targets": about, "choices": ["music", "weather"]}
        for said, about in [("play a song", "music"), ("will it snow", "weather")]
    ],
}
NEEDS_SIGNATURES = {"average_activation", "evidence", "phatgoose+evidence"}


@pytest.fixture
def tasks(tmp_path):
    for name, lines in TASKS.items():
        (tmp_path / "tasks" / name).mkdir(parents=True)
        for split in ("test", "train"):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (tmp_path / "tasks" / name / f"{split}.jsonl").write_text(text)
    return tmp_path / "tasks"


def test_all_methods_on_experts_of_the_default_pool(run, tasks, tmp_path, monkeypatch):
    # Routers that look at background text would have the base write it, for seconds.
    text = torch.randint(2, 8000, (4, 32), generator=torch.Generator().manual_seed(0))
    for module in (evidence, zscore):
        monkeypatch.setattr(module, "written_by", lambda model: text)
    out = tmp_path / "out"
    common = ["--tasks", tasks, "--out", out, "--base", "tiny", "--device", "cpu"]
    experts = [tiny.EXPERTS / name for name in ("snips", "subjectivity", "banking77", "ud_pos")]
    common += ["--experts", *experts]  # of all of them merging alone takes seconds
    result = run("eval", *common, "--methods", "all", "--oracle-limit", 1)
    assert result.code == 0, result.err
    found = json.loads((out / "results.json").read_text())
    left_out = {"retrieval", "multitask", "phatgoose_mixed", "lorahub", "weights"}
    assert left_out == set(found["left_out"])
    methods = set(method_names()) - set(found["left_out"])
    assert set(found["average"]) == methods
    for name, cells in found["results"].items():
        assert set(cells) == methods
        for method, cell in cells.items():
            if cell["score"] is None:
                assert cell["n"] == 0 and cell["reason"]
            else:
                assert 0 <= cell["low"] <= cell["score"] <= cell["high"] <= 100
                assert cell["n"] == len(TASKS[name])
            if method in found["failed"]:
                assert cell["reason"] == found["failed"][method]
    # What the package's experts have no signatures for is said, not left out in silence.
    assert set(found["failed"]) <= NEEDS_SIGNATURES
    assert all("phatgoose experts derive" in reason for reason in found["failed"].values())
    # An average of products is the same merged before, or added up token by token.
    assert found["results"]["wants"]["merged"] == found["results"]["wants"]["uniform"]
    assert found["tasks"]["wants"]["role"] == "heldout" and found["tasks"]["snips"]["role"] == "own"
    table = (out / "table.md").read_text()
    assert result.out.strip() == table.strip()
    for method in methods:
        assert f"| {method} |" in table
    for name in ("average.png", "recovered-gain.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_retrieval_and_a_multitask_adapter(run, tasks, tmp_path):
    experts = [tiny.EXPERTS / name for name in ("snips", "subjectivity")]
    result = run(
        "eval", "--experts", *experts, "--tasks", tasks, "--train-tasks", tasks, "--multitask",
        tiny.EXPERTS / "snips", "--methods", "base,retrieval", "multitask", "own",
        "--out", tmp_path / "out", "--limit", 1, "--base", "tiny", "--device", "cpu", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert list(found["average"]) == ["base", "retrieval", "multitask", "own"]
    own = {task: found["results"][task]["own"] for task in ("snips", "subjectivity")}
    assert {task: found["results"][task]["retrieval"] for task in own} == own
    assert found["results"]["snips"]["multitask"] == own["snips"]
    assert found["settings"]["limit"] == 1
    assert len(list((tmp_path / "out").glob("retrieval-*.safetensors"))) == 1


def test_bad_input(refuses, world, tasks):
    given = ["eval", "--base", world.base, "--experts", world.one, world.two, "--out"]
    given += [world.root / "out", "--device", "cpu", "--tasks"]
    refuses(*given, tasks, "--methods", "base,flight", says=["flight", "phatgoose", "single:NAME"])
    refuses(*given, tasks, "--methods", "retrieval", says=["retrieval", "--train-tasks"])
    refuses(*given, tasks, "--methods", "single:three", says=["three", "one, two"])
    refuses(*given, world.root, says=[world.root, "no task here"])
    refuses(*given, tasks, "--limit", 0, says=["limit must be at least 1"])
    refuses(*given, tasks, "--rows", 0, says=["rows must be at least 1"])
    refuses(*given, tasks, "--train-tasks", tasks, says=["one/train.jsonl", "2 of 2"])
    refuses(*given, tasks, "--oracle-limit", 0, says=["--oracle-limit"])
    shutil.rmtree(tasks / "wants")
    (tasks / "snips" / "test.jsonl").write_text("")
    refuses(*given, tasks, says=["snips", "holds no examples"])
    bad = {"inputs": "x", "targets": "c", "choices": ["a", "b"]}
    (tasks / "snips" / "test.jsonl").write_text(json.dumps(bad))
    refuses(*given, tasks, says=["snips", "line 1", "'c', which is not in choices"])
