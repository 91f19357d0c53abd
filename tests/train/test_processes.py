"""`accelerate launch` over two processes gives the gates of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import phatgoose
from tests.tolerances import assert_near
from tests.train import launched
from tests.train.toys import joined, make, make_batches, same

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left behind."""
    return launch(launched, tmp_path_factory.mktemp("launched"))


def launch(module, folder, *arguments):
    """Run a module in two processes; it gets a folder, which is returned."""
    source = str(Path(phatgoose.__file__).parents[1])
    subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
            *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
            *("--dynamo_backend", "no", "--main_process_port", str(free_port())),
            *("--module", module.__name__, str(folder), *arguments),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join((source, str(ROOT), os.environ.get("PYTHONPATH", "."))),
            "HF_HOME": str(folder / "no settings here"),
        },
        check=True,
        timeout=180,
    )
    return folder


@pytest.fixture(scope="module")
def told(folder):
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    return dict(launched.runs(1))


def test_there_were_two_processes(told):
    assert [each["processes"] for each in told] == [2, 2]


TOGETHER = [f"together-e{i}" for i in range(3)]


@pytest.mark.parametrize("name", ["list", "shuffled", "prepared", "interrupted", *TOGETHER])
def test_two_processes_train_the_gates_of_one(name, folder, told, alone):
    first, second = (load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert same(first, second)
    wanted = alone[name]
    assert first.keys() == wanted.vectors.keys()
    assert_near(joined(first), joined(wanted.vectors), 1e-3)
    for each in told:
        assert each["examples"][name] == wanted.record.examples
        assert each["last_loss"][name] == pytest.approx(wanted.record.last_loss, rel=1e-4)


def test_only_one_process_writes(told):
    assert [each["checkpoints"] for each in told] == [1 + 1 + 1 + 2, 0]
    assert [each["gates"] for each in told] == [1, 0]


def test_a_trainer_s_gates_are_the_same_everywhere_and_on_disk(folder):
    first, second = (load_file(folder / f"trainer-{rank}.safetensors") for rank in (0, 1))
    assert same(first, second)
    expert = phatgoose.load_expert(folder / "expert")
    assert same(dict(expert.gates.vectors), first)
    assert all(torch.any(vector) for vector in first.values())


def test_a_checkpoint_of_two_processes_is_not_gone_on_with_by_one(folder):
    with pytest.raises(phatgoose.PhatgooseError, match="number of processes"):
        phatgoose.train_gates(
            make(),
            make_batches(13),
            steps=10,
            gradient_accumulation_steps=2,
            checkpoint=folder / "gates.checkpoint",
            progress=False,
        )
