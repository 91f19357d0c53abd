"""Two processes that write the same: one wins whole, and the other is told."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from phatgoose import load_expert, save_expert, train_gates
from phatgoose.errors import ConfigError
from phatgoose.evaluation.report import table
from phatgoose.experts import adapter_hash
from phatgoose.experts.signatures import vectors_hash
from phatgoose.locks import claimed
from phatgoose.tasks import Encoded
from phatgoose.train import train_experts
from phatgoose.train.collection import LOCK, WORK
from tests.cli.conftest import make_tokenizer
from tests.evaluation.world import World, save_world
from tests.train import toys

WON, TOLD, OTHER = 0, 1, 2


def race(*acts: Callable[[], Any]) -> list[int]:
    """Run all at once, each in a process of its own; how each ended."""
    children = []
    start = time.monotonic() + 0.02
    for act in acts:
        child = os.fork()
        if not child:
            code = OTHER
            try:
                while time.monotonic() < start:
                    pass
                torch.set_num_threads(1)  # a forked child has no threads to share work with
                act()
                code = WON
            except ConfigError:
                code = TOLD
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_a_new_expert_is_the_first_ones(expert, tmp_path):
    one = load_expert(expert / "e")
    modules = {n: replace(lora, a=2 * lora.a) for n, lora in one.modules.items()}
    two = replace(one, modules=modules, signatures={})
    known = {adapter_hash(one.modules): "one", adapter_hash(two.modules): "two"}
    for turn in range(20):
        folder = tmp_path / str(turn) / "e"
        folder.parent.mkdir()
        ends = race(
            lambda folder=folder: save_expert(one, folder, card="one"),
            lambda folder=folder: save_expert(two, folder, card="two"),
        )
        assert sorted(ends) == [WON, TOLD]
        found = known[adapter_hash(load_expert(folder).modules)]
        assert found == ("one", "two")[ends.index(WON)]
        assert (folder / "README.md").read_text() == found
        assert [path.name for path in folder.parent.iterdir()] == ["e"]


def test_signatures_are_the_last_ones(expert, tmp_path):
    found = load_expert(expert / "e")
    folder = save_expert(found, tmp_path / "e")
    gates = [
        replace(found.gates, vectors={n: v + k for n, v in found.gates.vectors.items()}, steps=k)
        for k in (1, 2)
    ]
    for _ in range(20):
        assert race(*(lambda g=g: g.save(folder) for g in gates)) == [WON, WON]
        now = load_expert(folder).gates
        assert vectors_hash(now.vectors) == vectors_hash(gates[now.steps - 1].vectors)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_second_training_with_the_same_checkpoint_is_told(tmp_path):
    checkpoint = tmp_path / "progress"
    model = toys.make()

    def second() -> None:
        train_gates(model, toys.make_batches(2), steps=2, checkpoint=checkpoint, progress=False)

    with (
        claimed(tmp_path / ".progress.lock", "x"),
        pytest.raises(ConfigError, match="another proc"),
    ):
        second()
    assert not checkpoint.exists()
    second()
    assert [path.name for path in tmp_path.iterdir()] == ["progress"]


def test_a_second_collection_into_the_same_folder_is_told(tmp_path):
    tasks = {"one": [Encoded([3, 4], [5, 1])]}
    model, tokenizer = toys.llama(), toys.make_tokenizer()
    lock = tmp_path / WORK / LOCK
    with claimed(lock, "x"), pytest.raises(ConfigError, match=f"{tmp_path}: another process"):
        train_experts(model, tokenizer, tasks, tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [WORK]


def test_evaluations_share_a_folder(tmp_path):
    """Methods side by side, and one that both ask for; the results are one process's, whole."""
    world = World(save_world(tmp_path, make_tokenizer()))
    tasks = world.tasks("heldout")
    methods = (("base",), ("phatgoose",), ("base", "phatgoose"))
    ends = race(*(lambda m=m: world.run("out", m, tasks=tasks) for m in methods))
    assert ends == [WON] * 3
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert tuple(results["methods"]) in methods
    assert (out / "table.md").read_text() == table(results)
    alone = world.run("alone", methods[2], tasks=tasks)
    assert world.run("out", methods[2], tasks=tasks) == alone
    answers = [sorted((d / "answers").rglob("part-*")) for d in (out, tmp_path / "alone")]
    assert [p.name for p in answers[0]] == [p.name for p in answers[1]]
    assert [p.read_bytes() for p in answers[0]] == [p.read_bytes() for p in answers[1]]
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
