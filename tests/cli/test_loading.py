"""How the base is loaded, by every command that loads one."""

import pytest
import torch

from phatgoose.cli import loading

HOW = ("--dtype", "bfloat16", "--trust-remote-code", "--device-map", '{"": "cpu"}')


class Asked(Exception):
    pass


@pytest.fixture
def asked(monkeypatch):
    """What `load_base` is given; it goes no further."""
    found = []

    def load_base(base, **how):
        found.append(how)
        raise Asked

    monkeypatch.setattr(loading, "load_base", load_base)
    return found


@pytest.fixture
def commands(world):
    (world.tasks / "one").mkdir(parents=True)
    for split in ("train", "test"):
        (world.tasks / "one" / f"{split}.jsonl").write_text(world.data.read_text())
    base = ("--base", world.base)
    pool = (*base, "--experts", world.one)
    return {
        "generate": ("generate", "goose", *pool),
        "trace": ("trace", "goose", *pool),
        "demo": ("demo", *pool),
        "analyze": ("analyze", *pool, "--tasks", world.tasks),
        "eval": ("eval", *pool, "--tasks", world.tasks, "--out", world.out),
        "gate": ("gate", world.one, *base, "--data", world.data),
        "train": ("train", *base, "--data", world.data, "--out", world.new),
        "experts train": ("experts", "train", *base, "--tasks", world.tasks, "--out", world.many),
        "experts gate": ("experts", "gate", world.one, *base, "--tasks", world.tasks),
        "experts derive": ("experts", "derive", world.one, *base),
    }


NAMES = "generate trace demo analyze eval gate train".split()
MANY = ["experts train", "experts gate", "experts derive"]


@pytest.mark.parametrize("name", [*NAMES, *MANY])
def test_all_options_arrive(name, commands, run, asked):
    trains = name in ("gate", "train", "experts train", "experts gate")
    with pytest.raises(Asked):
        run(*commands[name], *HOW, "--quantization", "bnb-4bit")
    with pytest.raises(Asked):
        run(*commands[name], "--device", "cpu")
    assert asked[0] == {
        "device": None,
        "device_map": {"": "cpu"},
        "dtype": torch.bfloat16,
        "quantization": "bnb-4bit",
        "trust_remote_code": True,
    }
    assert asked[1] == {
        "device": "cpu",
        "device_map": None,
        "dtype": torch.float32 if trains else None,
        "quantization": None,
        "trust_remote_code": False,
    }


def test_a_map_that_is_no_json(commands, refuses):
    refuses(*commands["generate"], "--device-map", "{cpu", says=["--device-map: is not JSON"])


def test_both_a_device_and_a_map(commands, refuses):
    both = ("--device", "cpu", "--device-map", "auto")
    refuses(*commands["generate"], *both, says=["Leave one out"])


def test_bfloat16_generates_and_gates(world, run):
    pool = ("--base", world.base, "--experts", world.one, "--device", "cpu")
    short = ("--max-new-tokens", 4, "--dtype", "bfloat16")
    assert run("generate", "goose", *pool, *short).code == 0
    gated = run("gate", world.one, *pool[:2], "--data", world.data, "--gate-steps", 2, *short[2:])
    assert gated.code == 0, gated.err
