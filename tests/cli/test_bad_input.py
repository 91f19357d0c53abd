"""Bad input: one line that names what is wrong and a way out, exit code 1, nothing changed."""

import json
import os
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from phatgoose.experts import load_expert
from phatgoose.experts.kinds import KINDS
from phatgoose.experts.lora import CONFIG_FILE, WEIGHTS_FILE
from phatgoose.experts.signatures import HEADER

NAME = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{NAME}.lora_"


def truncate(world, expert="one"):
    path = world.root / expert / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    return path, "not a readable safetensors file", "copy or download it again"


def corrupt(world, expert="one"):
    path = world.root / expert / WEIGHTS_FILE
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    return path, "not a readable safetensors file", "copy or download it again"


def leave_a_pickle(world, expert="one"):
    folder = world.root / expert
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    return folder / "adapter_model.bin", "pickle", "Ask its owner"


def swap_the_gates(world, expert="one"):
    shutil.copy(world.two / KINDS["gates"].file, world.root / expert)
    return world.root / expert, "gates were made for adapter", "phatgoose gate"


def put_a_nan(world, expert="one"):
    path = world.root / expert / WEIGHTS_FILE
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors[f"{KEY}A.weight"][1, 2] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    return expert, f"lora_A of {NAME}", "NaN", "Train the adapter again"


def adapt_an_unknown_module(world, expert="one"):
    path = world.root / expert / CONFIG_FILE
    path.write_text(path.read_text().replace("q_proj", "r_proj"))
    world.edit(expert, lambda t: {key.replace("q_proj", "r_proj"): t[key] for key in t})
    return expert, NAME.replace("q_proj", "r_proj"), "no linear layer", "another base"


def change_the_rank(world, expert="one"):
    path = world.root / expert / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 5}))
    return WEIGHTS_FILE, NAME.removesuffix("self_attn.q_proj"), "rank 3", "5", "save the adapter"


def change_the_sizes(world, expert="one"):
    def change(tensors):
        a = tensors[f"{KEY}A.weight"]
        return {**tensors, f"{KEY}A.weight": torch.cat([a, a], dim=1)}

    world.edit(expert, change)
    return expert, NAME, "maps 48 to", "the base maps 24 to", "another base"


def remove_the_config(world, expert="one"):
    (world.root / expert / CONFIG_FILE).unlink()
    return world.root / expert, f"no {CONFIG_FILE}", "save_pretrained"


def garble_the_config(world, expert="one"):
    path = world.root / expert / CONFIG_FILE
    path.write_text(path.read_text()[:-20])
    return path, "not readable as JSON", "Copy it again"


def garble_the_record(world, expert="one"):
    path = world.root / expert / KINDS["gates"].file
    save_file(load_file(path), path, {HEADER: '{"format_version": 2, "kind"'})
    return path, "a field of its record", "Copy it again"


DAMAGE = [
    truncate,
    corrupt,
    leave_a_pickle,
    swap_the_gates,
    put_a_nan,
    adapt_an_unknown_module,
    change_the_rank,
    change_the_sizes,
    remove_the_config,
    garble_the_config,
    garble_the_record,
]
# What only the base can tell; an expert is whole without it.
NEEDS_THE_BASE = [adapt_an_unknown_module, change_the_sizes]
# Gates are about to be replaced, so old ones may be broken.
HARMS_ONLY_GATES = [swap_the_gates, garble_the_record]


@pytest.mark.parametrize("damage", DAMAGE)
def test_generate_refuses_a_broken_expert(refuses, world, damage):
    says = damage(world)
    experts = ("--experts", world.one, world.two)
    refuses("generate", "hello", "--base", world.base, *experts, says=says)


@pytest.mark.parametrize("damage", [d for d in DAMAGE if d not in HARMS_ONLY_GATES])
def test_gate_refuses_a_broken_adapter(refuses, world, damage):
    says = damage(world)
    refuses("gate", world.one, "--base", world.base, "--data", world.data, says=says)


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_tells_what_is_broken(run, world, damage):
    says = damage(world)
    result = run("experts", "verify", world.one, "--base", world.base)
    assert result.code == 3
    first, *problems = result.out.splitlines()
    assert first == f"{world.one}: not usable as it is"
    assert any(all(str(word) in problem for word in says) for problem in problems), problems


@pytest.mark.parametrize("damage", [d for d in DAMAGE if d not in NEEDS_THE_BASE])
def test_push_uploads_nothing_of_a_broken_expert(refuses, world, monkeypatch, damage):
    def called():
        raise AssertionError("the Hub was called")

    monkeypatch.setattr(huggingface_hub, "HfApi", called)
    says = damage(world)
    refuses("experts", "push", world.one, "owner/name", says=[*says, "Nothing was uploaded"])


@pytest.mark.parametrize("damage", [truncate, garble_the_config])
def test_list_refuses_a_broken_expert(refuses, world, damage):
    says = damage(world)
    refuses("experts", "list", world.one, says=says)


@pytest.mark.parametrize("command", ["generate", "trace"])
def test_a_wrong_folder(refuses, world, command):
    for folder in (world.nothing, world.data):
        says = [folder, "not a folder", "Give the folder that holds adapter_config.json"]
        refuses(command, "hello", "--experts", folder, says=says)


def test_a_folder_without_experts(refuses, world):
    world.empty.mkdir()
    says = [world.empty, "no adapter_config.json", "save_pretrained"]
    refuses("generate", "hello", "--base", world.base, "--experts", world.empty, says=says)


def test_experts_of_two_bases(refuses, world):
    foreign = world.foreign()
    says = ["foreign", "another base than one", "start a second pool"]
    refuses("generate", "x", "--base", world.base, "--experts", world.one, foreign, says=says)


def test_experts_of_another_base(refuses, world):
    foreign = world.foreign()
    argv = ("generate", "x", "--base", world.base, "--top-k", 1, "--experts", foreign)
    refuses(*argv, says=["foreign", "another base than this model"])


def test_two_experts_of_one_name(refuses, world):
    argv = ("generate", "x", "--base", world.base, "--experts", world.one, world.one)
    refuses(*argv, says=["one", "two experts of this name", "Rename"])


def test_an_expert_without_gates(refuses, world):
    folder = world.ungated("one")
    argv = ("generate", "x", "--base", world.base, "--experts", world.one, world.two)
    refuses(*argv, says=["one", "gate", f"phatgoose gate {folder}"])


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--top-k", 0, ["top_k", "at least 1", "0"]),
        ("--router", "compass", ["compass", "phatgoose"]),
        ("--temperature", 0, ["temperature", "above 0", "0"]),
        ("--null-score", "nan", ["null_score", "nan"]),
        ("--max-new-tokens", 0, ["--max-new-tokens", "at least 1", "0"]),
        ("--device", "abacus", ["abacus"]),
        ("--device", "cuda:99", ["cuda:99"]),
    ],
)
def test_settings_out_of_range(refuses, world, option, value, says):
    experts = ("--experts", world.one, world.two)
    refuses("generate", "x", "--base", world.base, *experts, option, value, says=says)


def test_an_empty_prompt(refuses, world):
    argv = ("generate", "x", "", "--base", world.base, "--experts", world.one, world.two)
    refuses(*argv, says=["prompt", "empty", "Give some text"])


def test_pictures_where_a_file_is(refuses, world):
    argv = ("trace", "x", "--base", world.base, "--experts", world.one, world.two)
    refuses(*argv, "--max-new-tokens", 1, "--out", world.data, says=[world.data, "Check the path"])


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "x", "--experts", "owner/unreachable"],
        ["trace", "x", "--experts", "owner/unreachable"],
        ["experts", "list", "owner/unreachable"],
        ["experts", "pull", "owner/unreachable", "--out", "pulled"],
    ],
)
def test_an_unreachable_expert(refuses, world, monkeypatch, argv):
    monkeypatch.chdir(world.root)
    refuses(*argv, says=["owner/unreachable", "the Hub did not give it", "network"])


def test_an_unreachable_base(refuses, world):
    says = ["owner/unreachable", "no base model", "network"]
    base = ("--base", "owner/unreachable")
    refuses("generate", "x", *base, "--experts", world.one, world.two, says=says)
    refuses("gate", world.one, *base, "--data", world.data, says=says)
    refuses("train", *base, "--data", world.data, "--out", world.new, says=says)
    refuses("experts", "verify", world.one, *base, says=says)


def test_a_base_that_is_no_model(refuses, world):
    says = [world.one, "no base model could be loaded", "save_pretrained"]
    refuses("generate", "x", "--base", world.one, "--experts", world.one, world.two, says=says)


def test_a_truncated_base(refuses, world):
    path = world.base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    says = [world.base, "no base model could be loaded"]
    refuses("generate", "x", "--base", world.base, "--experts", world.one, world.two, says=says)


BAD_DATA = {
    "not JSON": (["{"], ["line 2", "not JSON", "Correct or remove it"]),
    "no object": ([[1, 2]], ["line 2", "list", "a JSON object is wanted"]),
    "other fields": ([{"question": "?", "answer": "!"}], ["line 2", "answer, question", "wanted"]),
    "no text": ([{"prompt": "a", "completion": 3}], ["line 2", "completion is a int", "text"]),
    "bad choices": (
        [{"inputs": "a", "targets": "b", "choices": ["c"]}],
        ["line 2", "'b'", "not in choices"],
    ),
}


@pytest.mark.parametrize("kind", BAD_DATA)
@pytest.mark.parametrize("command", ["gate", "train"])
def test_bad_lines_of_data(refuses, world, command, kind):
    rows, says = BAD_DATA[kind]
    world.write_data({"text": "a good line"}, *rows)
    target = [world.one] if command == "gate" else ["--out", world.new]
    refuses(command, *target, "--base", world.base, "--data", world.data, says=[world.data, *says])


def test_data_that_is_not_there(refuses, world):
    argv = ("gate", world.one, "--base", world.base, "--data")
    missing = world.root / "missing.jsonl"
    refuses(*argv, missing, says=[missing, "no such file", "Give a .jsonl file"])
    refuses(*argv, world.two, says=[world.two, "holds no train.jsonl"])
    refuses(*argv, "owner/unreachable", says=["owner/unreachable", "the Hub gave no data set"])


def test_data_without_examples(refuses, world):
    world.data.write_text("\n\n")
    argv = ("gate", world.one, "--base", world.base, "--data", world.data)
    refuses(*argv, says=[world.data, "no examples"])


def test_gates_for_an_untrained_adapter(refuses, world):
    folder = world.edit(
        "one", lambda t: {k: v if "lora_A" in k else torch.zeros_like(v) for k, v in t.items()}
    )
    argv = ("gate", folder, "--base", world.base, "--data", world.data)
    refuses(*argv, says=["lora_B", "zero", "rain"])


TRAINING_OPTIONS = [
    ("--batch-size", 0),
    ("--batch-size", -1),
    ("--gate-batch-size", 0),
    ("--gate-batch-size", -1),
    ("--gate-steps", 0),
    ("--gate-learning-rate", -1),
    ("--gate-learning-rate", "nan"),
    ("--max-length", 0),
    ("--max-length", -3),
    ("--seed", -1),
]


@pytest.mark.parametrize(("option", "value"), TRAINING_OPTIONS)
def test_settings_of_gate_out_of_range(refuses, world, option, value):
    argv = ("gate", world.one, "--base", world.base, "--data", world.data, option, value)
    refuses(*argv, says=[f"{option} must be", value])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *TRAINING_OPTIONS,
        ("--steps", 0),
        ("--rank", 0),
        ("--alpha", 0),
        ("--dropout", 2),
        ("--learning-rate", 0),
    ],
)
def test_settings_of_train_out_of_range(refuses, world, option, value):
    argv = ("train", "--base", world.base, "--data", world.data, "--out", world.new, "--steps", 1)
    refuses(*argv, option, value, says=[f"{option} must be", value])


def test_train_into_a_folder_with_something_in_it(refuses, world):
    argv = ("train", "--base", world.base, "--data", world.data, "--out")
    refuses(*argv, world.two, says=[world.two, "no empty folder", "Give a new folder"])
    refuses(*argv, world.data, says=[world.data, "Give a new folder"])


def test_import_of_what_is_no_checkpoint(refuses, world):
    argv = ("--base", world.base, "--out", world.new)
    world.best.write_bytes(b"no checkpoint at all")
    refuses("experts", "import", world.best, *argv, says=[world.best])
    torch.save({"weight": torch.zeros(2)}, world.best)
    refuses("experts", "import", world.best, *argv, says=[world.best, "weight"])
    refuses("experts", "import", world.nothing, *argv, says=[world.nothing])


def test_push_that_the_hub_refuses(refuses, world):
    says = ["owner/name", "the Hub did not take the upload", "logged in"]
    refuses("experts", "push", world.one, "owner/name", says=says)


class TestInterrupts:
    """Ctrl-C while `gate` saves over older gates."""

    @pytest.fixture
    def gate(self, run, world):
        argv = ("--base", world.base, "--data", world.data, "--gate-steps", "2")
        return lambda: run("gate", world.one, *argv)

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    @pytest.mark.parametrize("file", ["phatgoose_gates.checkpoint", KINDS["gates"].file])
    def test_old_gates_stay(self, world, monkeypatch, gate, call, file):
        before = load_expert(world.one).gates
        saved = world.files()
        interrupt(monkeypatch, call, file)
        result = gate()
        assert result.code == 130
        assert result.lines == ["phatgoose: interrupted"]
        assert "Traceback" not in result.err
        after = load_expert(world.one).gates
        assert after.record == before.record
        torch.testing.assert_close(after.vectors, before.vectors, rtol=0, atol=0)
        made = set(world.files()) - set(saved)
        assert made <= {"one/phatgoose_gates.checkpoint"}  # to go on from, never a temporary file
        assert {name: world.files()[name] for name in saved} == saved

    def test_the_same_command_goes_on(self, world, monkeypatch, gate):
        with monkeypatch.context() as patch:
            interrupt(patch, "replace", KINDS["gates"].file)
            assert gate().code == 130
        assert (world.one / "phatgoose_gates.checkpoint").exists()
        assert gate().code == 0
        assert load_expert(world.one).gates.record.steps == 2
        assert not (world.one / "phatgoose_gates.checkpoint").exists()


def interrupt(monkeypatch, call, file):
    """Let os.fsync or os.replace raise KeyboardInterrupt while `file` is being written."""
    real = getattr(os, call)

    def interrupted(*arguments):
        name = arguments[0]
        if isinstance(name, int):
            name = os.readlink(f"/proc/self/fd/{name}")
        if os.path.basename(name).startswith(f".{file}."):
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(os, call, interrupted)


def test_an_interrupt_before_anything_is_written(run, world, monkeypatch):
    monkeypatch.setattr("phatgoose.experts.lora.read_tensors", _interrupted)
    before = world.files()
    result = run("experts", "list", world.one)
    assert (result.code, result.lines) == (130, ["phatgoose: interrupted"])
    assert world.files() == before


def _interrupted(*_):
    raise KeyboardInterrupt
