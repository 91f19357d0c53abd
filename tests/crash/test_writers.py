"""Every writer, ended at every step of its way to the disk."""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from transformers import T5Config, T5ForConditionalGeneration

import phatgoose
from phatgoose import load_expert, save_expert, train_gates
from phatgoose.errors import PhatgooseError
from phatgoose.experts import (
    Expert,
    adapter_hash,
    hub,
)
from phatgoose.experts.kinds import GATES, KINDS
from phatgoose.experts.lora import read_adapter
from phatgoose.experts.released import import_released
from phatgoose.experts.signatures import vectors_hash
from phatgoose.files import write_bytes
from phatgoose.train import AdapterTraining, GateTraining, train_experts
from phatgoose.train.adapters import _save
from tests.cli.conftest import make_tokenizer
from tests.crash.conftest import write_signatures
from tests.crash.dying import FULL, INTERRUPT, KILL, MODES
from tests.crash.laws import State, Writer, check
from tests.evaluation.world import World, save_world
from tests.train import toys

EVERY_MODE = pytest.mark.parametrize("mode", MODES)
# Writers that take many steps end at some of them; with 1, as in `make crash`, at each.
STRIDE = int(os.environ.get("CRASH_STRIDE", "7"))


def content(folder: Path) -> Any:
    """What a reader makes of an expert's folder: its adapter and signatures, or why not."""
    try:
        expert = load_expert(folder)
    except PhatgooseError as error:
        return f"refused: {error}" if folder.exists() else None
    kinds = {kind: (vectors_hash(s.vectors), s.steps) for kind, s in expert.signatures.items()}
    card = folder / "README.md"
    return adapter_hash(expert.modules), kinds, card.read_text() if card.exists() else None


def read_experts(root: Path) -> State:
    """Of every folder that is no work of a writer."""
    return {
        path.name: content(path)
        for path in root.iterdir()
        if path.is_dir() and not path.name.startswith(".")
    }


def changed(expert: Expert, *, times: float) -> Expert:
    """The same with another adapter, and no signatures."""
    modules = {n: replace(lora, a=lora.a * times) for n, lora in expert.modules.items()}
    return replace(expert, modules=modules, signatures={})


@pytest.mark.parametrize(
    ("mode", "kind"), [*((KILL, kind) for kind in KINDS), (FULL, GATES), (INTERRUPT, GATES)]
)
def test_signatures_over_older_ones(mode, kind, expert, tmp_path):
    found = load_expert(expert / "e").signatures[kind]
    new = replace(found, vectors={name: v + 1 for name, v in found.vectors.items()}, steps=2)
    ends = check(
        Writer(lambda root: new.save(root / "e"), read_experts), expert, tmp_path, mode=mode
    )
    assert ends >= 5


@EVERY_MODE
@pytest.mark.parametrize("first", [True, False])
def test_gates_over_two_files_of_an_older_release(mode, first, expert, tmp_path):
    before = Path(shutil.copytree(expert, tmp_path / "before"))
    gates = load_expert(expert / "e").gates
    (before / "e" / KINDS[GATES].file).unlink()
    if not first:
        record = {"format_version": 1, **asdict(gates.record), "gates": vectors_hash(gates.vectors)}
        record["base"] = gates.record.base.to_json()
        save_file(dict(gates.vectors), before / "e" / KINDS[GATES].file, {"format": "pt"})
        (before / "e" / KINDS[GATES].older[0]).write_text(json.dumps(record))
    new = replace(gates, vectors={name: v + 1 for name, v in gates.vectors.items()}, steps=2)
    writer = Writer(lambda root: new.save(root / "e"), read_experts)
    assert check(writer, before, tmp_path, mode=mode) >= 5 + (not first) * (mode != FULL)


@EVERY_MODE
def test_a_new_expert(mode, expert, tmp_path):
    """Merged experts, and those without general knowledge, are written the same way."""
    found = load_expert(expert / "e")

    def write(root: Path) -> None:
        save_expert(found, root / "new", card="# new\n")

    writer = Writer(write, read_experts, again=False)
    assert check(writer, expert, tmp_path, mode=mode, stride=STRIDE) * STRIDE >= 20


@EVERY_MODE
@pytest.mark.parametrize("over", [True, False])
def test_an_adapter_that_is_trained_with_others(mode, over, expert, tmp_path):
    config, modules = read_adapter(expert / "e")
    twice = {name: replace(lora, a=2 * lora.a, scale=7.0) for name, lora in modules.items()}
    before = Path(shutil.copytree(expert, tmp_path / "before"))
    for kind in KINDS.values():
        (before / "e" / kind.file).unlink()
    (before / "e" / "note").write_text("mine")

    def write(root: Path) -> None:
        _save(root / ("e" if over else "new"), {**config, "lora_alpha": 21}, twice)
        assert (root / "e" / "note").read_text() == "mine"

    writer = Writer(write, read_experts)
    assert check(writer, before, tmp_path, mode=mode, stride=STRIDE) * STRIDE >= 10


@EVERY_MODE
@pytest.mark.parametrize("over", [True, False])
def test_pull(mode, over, expert, tmp_path, monkeypatch):
    there = tmp_path / "there"
    save_expert(changed(load_expert(expert / "e"), times=3), there)
    write_signatures(there, seed=3)

    def snapshot_download(*_: Any, local_dir: Path, **__: Any) -> str:
        Path(local_dir).mkdir()
        for path in there.iterdir():
            with open(Path(local_dir) / path.name, "wb") as file:
                file.write(path.read_bytes())
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    target = "e" if over else "new"
    writer = Writer(lambda root: hub.pull("owner/name", root / target), read_experts)
    assert check(writer, expert, tmp_path, mode=mode, stride=STRIDE) * STRIDE >= 15


@EVERY_MODE
def test_import_of_a_published_pool(mode, tmp_path):
    """Each expert is there whole or not at all, and the next import goes on."""
    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 12}
    model = T5ForConditionalGeneration(T5Config(**sizes, num_layers=1, num_heads=2))
    before = tmp_path / "before"
    (before / "pool").mkdir(parents=True)
    model.config.save_pretrained(before / "base")
    tensors = {}
    for index in range(2):
        key = "encoder.block.0.layer.0.SelfAttention.q._addons"
        tensors[f"{key}.expert_lora.layer1__{index}"] = torch.randn(8, 2)
        tensors[f"{key}.expert_lora.layer2__{index}"] = torch.randn(2, 8)
        tensors[f"{key}.router.expert_embeddings__{index}"] = torch.randn(8)
    torch.save(tensors, before / "best.pt")

    def write(root: Path) -> None:
        # The card and the config name the base by its path, which is another in each copy.
        os.chdir(root)
        import_released("best.pt", "base", "pool", progress=False)

    writer = Writer(write, lambda root: read_experts(root / "pool"))
    assert check(writer, before, tmp_path, mode=mode, stride=STRIDE) * STRIDE >= 20


@EVERY_MODE
def test_a_plain_file(mode, tmp_path):
    """Answers, results, tables, pictures and indexes are each written by this."""
    before = tmp_path / "before"
    before.mkdir()
    (before / "results.json").write_text("old")

    def write(root: Path) -> None:
        write_bytes(root / "results.json", b"new " * 1000)

    def read(root: Path) -> State:
        return {"results.json": (root / "results.json").read_bytes()}

    assert check(Writer(write, read), before, tmp_path, mode=mode) >= 5


@EVERY_MODE
def test_training_gates_with_a_checkpoint(mode, tmp_path):
    """What goes on from a checkpoint ends as if it had never stopped."""
    before = tmp_path / "before"
    model = toys.make()
    model.save_pretrained(before / "e")
    batches = toys.make_batches(12)

    def write(root: Path) -> None:
        checkpoint = root / "e" / "progress"
        gates = train_gates(model, batches, steps=12, checkpoint=checkpoint, progress=False)
        gates.save(root / "e")
        checkpoint.unlink()

    writer = Writer(write, read_experts, progress=("progress",))
    assert check(writer, before, tmp_path, mode=mode, stride=STRIDE) * STRIDE >= 12


@pytest.mark.slow
@EVERY_MODE
def test_training_a_collection(mode, tmp_path):
    before = tmp_path / "before"
    (before / "out").mkdir(parents=True)
    model, tokenizer = toys.llama(), toys.make_tokenizer()
    rows = [phatgoose.tasks.Encoded([3, 4, 5], [6, 1]), phatgoose.tasks.Encoded([5, 4], [7, 1])]
    tasks = {"one": rows, "two": rows[::-1]}

    def write(root: Path) -> None:
        train_experts(
            model,
            tokenizer,
            tasks,
            root / "out",
            adapter=AdapterTraining(steps=3, rank=2, batch_size=2, bf16=False),
            gates=GateTraining(steps=3),
            progress=False,
        )

    # All of .phatgoose-training is progress, which the last step takes away.
    writer = Writer(write, lambda root: read_experts(root / "out"), progress=("",))
    assert check(writer, before, tmp_path, mode=mode, stride=3 * STRIDE) * STRIDE >= 15


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(save_world(tmp_path_factory.mktemp("world"), make_tokenizer()))


@pytest.mark.slow
@EVERY_MODE
def test_an_evaluation(mode, world, tmp_path):
    """Answers that are whole are not asked for again, and the results are the same."""
    before = tmp_path / "before"
    (before / "out").mkdir(parents=True)
    tasks = world.tasks("heldout")

    def read(root: Path) -> State:
        files = ("results.json", "table.md", "answers/base", "answers/phatgoose")
        paths = [p for f in files for p in ((root / "out" / f), *(root / "out" / f).glob("part-*"))]
        return {p.name: p.read_bytes() for p in paths if p.is_file() and p.name[0] != "."}

    writer = Writer(
        lambda root: world.run(str(root / "out"), ("base", "phatgoose"), tasks=tasks),
        read,
        progress=("",),  # answers that are whole
    )
    assert check(writer, before, tmp_path, mode=mode, stride=3 * STRIDE) * STRIDE >= 7
