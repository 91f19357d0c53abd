"""Which experts a folder, a tree or a repository stands for, and what they are called."""

import logging
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from phatgoose import ExpertPool
from phatgoose.errors import ConfigError, ExpertNotFoundError
from phatgoose.experts import expert_sources, load_expert
from phatgoose.experts import sources as module
from phatgoose.experts.sources import default_name, split_name

COMMIT = "a" * 40


@pytest.fixture
def tree(expert_dir, tmp_path):
    """tree("law/checkpoint-5", ...): a folder with experts at these places in it."""

    def grow(*places, root="tree"):
        for place in places:
            shutil.copytree(expert_dir, tmp_path / root / place, dirs_exist_ok=True)
        return tmp_path / root

    return grow


def names(*given):
    return [load_expert(source).name for source in expert_sources([*given])]


@pytest.mark.parametrize(
    ("places", "wanted", "left"),
    [
        (["a", "b"], ["a", "b"], ""),
        (["b/law", "a"], ["a", "law"], ""),  # as PEFT saves an adapter that has a name
        (["x/law", "y/law", "z"], ["x/law", "y/law", "z"], ""),
        (["law/checkpoint-500", "code/checkpoint-500"], ["code", "law"], ""),
        (["checkpoint-5"], ["tree"], ""),
        (["law/checkpoint-9", "law/checkpoint-10"], ["law"], "law/checkpoint-9"),
        (["law", "law/checkpoint-9"], ["law"], "law/checkpoint-9"),
        (["law", "law/other"], ["law", "other"], ""),
        (["a/b/c/d/e"], ["e"], ""),
        (["run/checkpoint-2/law", "run/checkpoint-2/code"], ["code", "law"], ""),
        (["checkpoint-x", ".hidden/a"], ["checkpoint-x"], ""),
        (["lr=1/law", "lr=2/law"], ["lr=1/law", "lr=2/law"], ""),
    ],
)
def test_a_tree_stands_for_all_experts_in_it(places, wanted, left, tree, caplog):
    root = tree(*places)
    with caplog.at_level(logging.WARNING):
        found = names(root)
        assert found == names(str(root))
    assert found == wanted
    assert (left in caplog.text) and bool(left) == ("left out" in caplog.text)
    assert ExpertPool.load(root).names == wanted


def test_the_last_checkpoint_is_taken(tree):
    root = tree("law/checkpoint-9", "law/checkpoint-10")
    (source,) = expert_sources([root])
    assert load_expert(source).folder.name == "checkpoint-10"


def test_what_lies_inside_an_expert_is_told(tree, caplog):
    """PEFT puts a second adapter of a model below the first."""
    root = tree(".", "law")
    with caplog.at_level(logging.WARNING):
        assert names(root) == ["tree"]
    assert "tree: left out" in caplog.text and "law" in caplog.text
    caplog.clear()
    assert names(root / "law") == ["law"] and not caplog.text


def test_links_keep_their_names(tree, tmp_path, monkeypatch):
    root = tree("runs/17/checkpoint-5")
    pool = tmp_path / "pool"
    pool.mkdir()
    for name in ("law", "again"):
        (pool / name).symlink_to(root / "runs/17/checkpoint-5")
    assert names(pool) == ["again", "law"]
    assert names(pool / "law") == ["law"]
    monkeypatch.chdir(root / "runs/17/checkpoint-5")
    assert names(".") == ["17"]


def test_loops_of_links_end(tree):
    root = tree("a", "deep/b")
    (root / "deep" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a")
    assert names(root) == ["a", "b"]


def test_a_tree_has_a_largest_size(tree, monkeypatch, one_line):
    root = tree("a", "b/c", "d")
    monkeypatch.setattr(module, "MOST_FOLDERS", 3)
    with pytest.raises(ConfigError, match="more than 3 folders") as info:
        expert_sources([root])
    one_line(info)


def test_names_are_given_before_paths(tree, tmp_path, monkeypatch):
    root = tree("law/checkpoint-500", "a=b/c", "x")
    law, odd = root / "law/checkpoint-500", root / "a=b/c"
    assert names(f"mine={law}", f"n={odd}", odd, str(odd)) == ["mine", "n", "c", "c"]
    assert load_expert(f"mine={law}").name == "mine"
    assert load_expert(f"mine={law}", name="yours").name == "yours"
    assert ExpertPool.load({"one": law, "two": str(law)}).names == ["one", "two"]
    pool = ExpertPool()
    pool.add(f"three={law}")
    assert pool.names == ["three"]
    assert names(f"pool={root}") == ["pool/c", "pool/law", "pool/x"]
    monkeypatch.chdir(tmp_path)
    assert names("mine=tree/x", "tree/x") == ["mine", "x"]


@pytest.mark.parametrize("text", ["=x", "a=", "=", "a\nb=x", "a\u202eb=x"])
def test_names_that_are_none(text, one_line):
    with pytest.raises(ConfigError, match="NAME=PATH") as info:
        load_expert(text)
    one_line(info)


def test_a_named_source_that_is_not_there(one_line):
    with pytest.raises(ExpertNotFoundError, match="nowhere: not a folder") as info:
        load_expert("law=nowhere")
    one_line(info)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("law=owner/name/sub@v1", ("law", "owner/name/sub@v1")),
        ("owner/name=other/name", ("owner/name", "other/name")),
        ("lr=1/law=owner/name", ("lr=1/law", "owner/name")),
        ("owner/name/law", (None, "owner/name/law")),
        ("a=b=nothing", ("a", "b=nothing")),
        (Path("a=b"), (None, Path("a=b"))),
    ],
)
def test_what_a_name_is_split_at(text, wanted):
    assert split_name(text) == wanted


def test_what_is_not_there_stays_as_it_is():
    assert expert_sources(["nowhere", "x=nowhere"]) == ["nowhere", "x=nowhere"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub whose one repository is `tmp_path`/snapshots/COMMIT; what is asked of it is kept."""
    asked = []

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None, local_dir=None):
        asked.append((repo_id, revision, tuple(allow_patterns)))
        if repo_id != "owner/name":
            raise OSError("no such repository")
        return str(tmp_path / "snapshots" / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_repository_is_a_tree_at_one_commit(hub, tree):
    tree("law", "more/code/checkpoint-5", "more/code/checkpoint-10", root=f"snapshots/{COMMIT}")
    found = expert_sources(["owner/name", "owner/name/more@v1", "mine=owner/name/more"])
    code = f"owner/name/more/code/checkpoint-10@{COMMIT}"
    assert found == [f"owner/name/law@{COMMIT}", code, code, f"mine/code={code}"]
    assert [default_name(source) for source in found[:2]] == [
        "owner/name/law",
        "owner/name/more/code",
    ]
    top, more, _ = hub
    assert top == ("owner/name", None, ("adapter_config.json", "*/adapter_config.json"))
    assert more[1:] == ("v1", ("more/adapter_config.json", "more/*/adapter_config.json"))
    assert ExpertPool.load("owner/name").names == ["owner/name/law", "owner/name/more/code"]


def test_a_repository_with_an_adapter_on_top_is_one(hub, tree, caplog):
    tree(".", "checkpoint-5", root=f"snapshots/{COMMIT}")
    with caplog.at_level(logging.WARNING):
        assert expert_sources(["owner/name@v1"]) == ["owner/name@v1"]
    assert "owner/name@v1: left out" in caplog.text and "checkpoint-5" in caplog.text


def test_a_repository_that_is_not_there_is_told_when_it_is_loaded(hub, one_line):
    assert expert_sources(["owner/other"]) == ["owner/other"]
    with pytest.raises(ExpertNotFoundError, match="owner/other: no such folder") as info:
        ExpertPool.load("owner/other")
    one_line(info)
