"""experts list, verify, push, pull."""

import json
import shutil

import huggingface_hub
import pytest
from safetensors.torch import load_file

from phatgoose.default import smollm2, tiny
from phatgoose.experts import load_expert
from phatgoose.experts.hub import files

NAMES = [folder.name for folder in smollm2.expert_folders()]


def test_list_shows_the_pool_of_the_package(run):
    result = run("experts", "list")
    assert result.code == 0
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all("gates" in line and "rank" in line for line in lines)


def test_list_as_json(run):
    rows = json.loads(run("experts", "list", "--json").out)
    assert [row["name"] for row in rows] == NAMES
    for row, folder in zip(rows, smollm2.expert_folders(), strict=True):
        expert = load_expert(folder)
        assert row["modules"] == len(expert.modules)
        assert row["gate_steps"] == expert.gates.record.steps
        assert row["gates"] is True


def test_list_looks_into_a_folder_of_experts(run, world):
    world.ungated("two")
    rows = json.loads(run("experts", "list", world.root, "--json").out)
    assert [(row["name"], row["gates"]) for row in rows] == [("one", True), ("two", False)]
    assert [row["rank"] for row in rows] == [3, 3]
    assert "no gates" in run("experts", "list", world.two).out


def test_list_shows_a_repository_without_its_weights(run, world, monkeypatch):
    """Of a tree on the Hub only configs come; NAME= is a prefix there."""
    commit, asked = "a" * 40, []
    top = world.root / "snapshots" / commit
    for name in ("law/checkpoint-5", "code"):
        shutil.copytree(world.one, top / name)
        (top / name / "adapter_model.safetensors").unlink()

    def snapshot_download(name, *, allow_patterns, **_):
        asked.append(allow_patterns)
        return str(top)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    result = run("experts", "list", "owner/pool", "mine=owner/pool/law", "--json")
    assert [row["name"] for row in json.loads(result.out)] == [
        *("owner/pool/code", "owner/pool/law", "mine/law"),
    ]
    assert all(row["rank"] == 3 and row["modules"] is None for row in json.loads(result.out))
    assert all(name.endswith("adapter_config.json") for names in asked for name in names)
    assert "owner/pool/law   rank 3, on the Hub" in run("experts", "list", "owner/pool").out


def test_convert_makes_a_plain_lora(run, world):
    world.edit("one", lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()})
    result = run("experts", "convert", world.one, "--out", world.new, "--json")
    assert result.code == 0, result
    row = json.loads(result.out)
    assert (row["was"], row["error"], row["gates"]) == ("LORA", None, True)
    assert not any(".default." in key for key in load_file(world.new / "adapter_model.safetensors"))
    assert "from LORA" in run("experts", "convert", world.one, "--out", world.third).out


def test_verify_finds_nothing_wrong(run, world):
    result = run("experts", "verify", world.one, world.two, "--base", world.base)
    assert result.code == 0
    assert result.out.splitlines() == [f"{world.root / n}: nothing wrong" for n in ("one", "two")]


def test_verify_finds_nothing_wrong_with_the_package(run):
    result = run("experts", "verify", tiny.EXPERTS, "--base", tiny.BASE, "--json")
    assert result.code == 0
    assert json.loads(result.out) == {str(folder): [] for folder in tiny.expert_folders()}


def test_verify_as_json(run, world):
    world.ungated("two")
    result = run("experts", "verify", world.one, world.two, world.nothing, "--json")
    assert result.code == 3
    found = json.loads(result.out)
    assert list(found) == [str(world.root / name) for name in ("one", "two", "nothing")]
    assert [len(problems) for problems in found.values()] == [0, 1, 1]
    assert "phatgoose gate" in found[str(world.two)][0]


def test_verify_checks_against_the_base_given(run, world):
    foreign = world.foreign()
    result = run("experts", "verify", foreign, "--base", world.base)
    assert result.code == 3
    assert "the base maps 24 to" in result.out
    assert run("experts", "verify", foreign, "--base", world.other).code == 0


@pytest.fixture
def hub(monkeypatch, world):
    """A Hub that is a folder; its calls are recorded."""
    calls = []

    class Api:
        def create_repo(self, name, **settings):
            calls.append((name, settings))
            return f"https://hub/{name}"

        def upload_folder(self, *, folder_path, repo_id, allow_patterns, delete_patterns, **_):
            target = world.root / "hub" / repo_id
            target.mkdir(parents=True, exist_ok=True)
            for name in delete_patterns:
                (target / name).unlink(missing_ok=True)
            for name in allow_patterns:
                if (folder_path / name).exists():
                    shutil.copy(folder_path / name, target)

    def snapshot_download(name, *, local_dir, **_):
        return str(shutil.copytree(world.root / "hub" / name, local_dir, dirs_exist_ok=True))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_push_then_pull(run, world, hub):
    (world.one / "training_args.bin").write_bytes(b"pickle")
    pushed = run("experts", "push", world.one, "owner/one", "--private")
    assert (pushed.code, pushed.out) == (0, "https://hub/owner/one\n")
    assert hub == [("owner/one", {"private": True, "exist_ok": True})]
    pulled = run("experts", "pull", "owner/one", "--out", world.pulled)
    assert (pulled.code, pulled.out) == (0, f"{world.pulled}\n")
    assert {path.name for path in world.pulled.iterdir()} <= set(files())
    assert load_expert(world.pulled).gates.record == load_expert(world.one).gates.record


def test_push_and_pull_as_json(run, world, hub):
    pushed = run("experts", "push", world.one, "owner/one", "--json")
    assert json.loads(pushed.out) == {
        "folder": str(world.one),
        "address": "https://hub/owner/one",
    }
    pulled = json.loads(run("experts", "pull", "owner/one", "--out", world.pulled, "--json").out)
    (listed,) = json.loads(run("experts", "list", world.one, "--json").out)
    assert pulled == {**listed, "name": "pulled", "folder": str(world.pulled)}


def test_a_second_push_takes_old_signatures_away(run, world, hub):
    """They belong to the adapter of the first push, and make the second unreadable."""
    assert run("experts", "derive", world.one, "--base", world.base).code == 0
    assert run("experts", "push", world.one, "owner/x").code == 0
    there = load_expert(world.root / "hub" / "owner" / "x")
    assert "arrow" in there.signatures
    (world.one / "phatgoose_arrow.safetensors").unlink()
    folder = world.edit("one", lambda tensors: {n: t + 1 for n, t in tensors.items()})
    assert run("experts", "push", folder, "owner/x").code == 0
    assert "arrow" not in load_expert(there.folder).signatures


def test_an_expert_named_by_a_path_with_a_dot(run, world, monkeypatch):
    monkeypatch.chdir(world.one)
    assert json.loads(run("experts", "list", ".", "--json").out)[0]["name"] == "one"
