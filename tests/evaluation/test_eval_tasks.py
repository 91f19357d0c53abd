"""Which tasks an evaluation reads, and what it says of those it cannot."""

import json
from pathlib import Path
from typing import Any

import pytest

from phatgoose.errors import ConfigError, TaskFormatError
from phatgoose.evaluation import read_tasks
from phatgoose.tasks import Example
from tests.evaluation.world import save_task
from tests.models import make_model

CHOICES = [{"inputs": f"{x}?", "targets": x, "choices": ["a", "b"]} for x in "abab"]
FREE = [{"inputs": f"say {x}", "targets": x} for x in "abcd"]


@pytest.fixture
def read(tokenizer: Any, tmp_path: Path) -> Any:
    model = make_model("llama", layers=1)

    def call(*folders: str, experts: tuple[str, ...] = ("one",), **more: Any) -> Any:
        sources = [tmp_path / folder for folder in folders]
        tasks = read_tasks(sources, experts, model, tokenizer, **more)
        return {task.name: task for task in tasks}

    return call


def test_folders_roles_and_metrics(read: Any, tmp_path: Path) -> None:
    save_task(tmp_path / "all" / "one", CHOICES)
    save_task(tmp_path / "all" / "two", FREE)
    save_task(tmp_path / "three", FREE)
    tasks = read("all", "three")
    assert {name: (t.role, t.metric) for name, t in tasks.items()} == {
        "one": ("own", "accuracy"),
        "two": ("heldout", "exact_match"),
        "three": ("heldout", "exact_match"),
    }
    assert len({task.hash for task in tasks.values()}) == 2  # of the content, not the name
    few = read("all", limit=2)
    assert [len(task.examples) for task in few.values()] == [2, 2]
    assert read("all", limit=2) == few != read("all", limit=2, seed=3)


def test_the_index_gives_metric_and_similar_skills(read: Any, tmp_path: Path) -> None:
    save_task(tmp_path / "heldout" / "two", FREE)
    records = [
        {"name": "two", "split": "tasks", "metric": "exact_match"},
        {"name": "two", "split": "heldout", "metric": "squad_f1", "near_task": ["one", "other"]},
    ]
    (tmp_path / "INDEX.json").write_text(json.dumps(records))
    assert read("heldout")["two"].metric == "squad_f1"
    assert read("heldout")["two"].contaminated == {"one": "similar skill"}
    assert not read("heldout", experts=("two",))["two"].contaminated
    (tmp_path / "INDEX.json").write_text("{}x")
    with pytest.raises(TaskFormatError, match=r"INDEX\.json"):
        read("heldout")


def test_what_an_expert_has_seen_is_told(read: Any, tmp_path: Path) -> None:
    save_task(tmp_path / "two", FREE)
    seen = [Example("say a\n", "a"), Example("say z\n", "z")]
    assert read("two", training={"one": seen})["two"].contaminated == {
        "one": "1 of 4 prompts in its training data"
    }
    card = "A LoRA for the task `two`."
    assert "model card" in read("two", cards={"one": card})["two"].contaminated["one"]


@pytest.mark.parametrize(
    "lines,words",
    [
        ([], "holds no examples"),
        ([{"inputs": "x", "targets": "c", "choices": ["a"]}], "line 1.*not in choices"),
    ],
)
def test_bad_tasks_are_named(read: Any, tmp_path: Path, lines: Any, words: str) -> None:
    save_task(tmp_path / "bad", lines)
    with pytest.raises(TaskFormatError, match=f"bad.*{words}"):
        read("bad")


def test_bad_requests(read: Any, tmp_path: Path) -> None:
    save_task(tmp_path / "one", FREE)
    save_task(tmp_path / "more" / "one", FREE)
    with pytest.raises(ConfigError, match="one: two tasks of this name"):
        read("one", "more")
    with pytest.raises(TaskFormatError, match="nowhere"):
        read("nowhere")
    with pytest.raises(ConfigError, match="limit"):
        read("one", limit=0)
