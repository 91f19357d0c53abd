"""A tiny base with three experts, and tasks that are theirs or held out, in a folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phatgoose import ExpertPool
from phatgoose.evaluation import EvalTask, Inputs, RunSettings, make_methods, read_tasks
from phatgoose.evaluation import run_evaluation as run
from phatgoose.models import load_base
from tests.models import LINEARS, make_model, save_expert

EXPERTS = ("colour", "copy", "spare")
TASKS: dict[str, tuple[str, str, list[dict[str, Any]]]] = {  # name: group, metric, lines
    "colour": (
        "tasks",
        "accuracy",
        [
            {"inputs": f"colour {i}?", "targets": c, "choices": ["red", "blue", "no"]}
            for i, c in enumerate(["red", "blue", "no", "red", "blue"])
        ],
    ),
    "copy": (
        "tasks",
        "squad_f1",
        [{"inputs": f"say: {w}", "targets": w, "choices": None} for w in "abcde"],
    ),
    "letter": (
        "heldout",
        "accuracy",
        [
            {"inputs": f"{x}?", "targets": x, "choices": [x, "q", "long \u2028 one"]}
            for x in "stuvw"
        ],
    ),
    "vowel": (
        "heldout",
        "accuracy",
        [
            {"inputs": f"is {x} one?", "targets": t, "choices": ["yes", "no"]}
            for x, t in zip("abcei", ["yes", "no", "no", "yes", "yes"], strict=True)
        ],
    ),
}


def save_world(root: Path, tokenizer: Any) -> Path:
    """base, experts/NAME, tasks/NAME and heldout/NAME with an INDEX.json."""
    model = make_model("llama", layers=1)
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for seed, name in enumerate(EXPERTS):
        save_expert(root / "experts" / name, model, seed=seed, targets=LINEARS["llama"])
    for name, (group, _, lines) in TASKS.items():
        save_task(root / group / name, lines)
    save_task(root / "tasks" / "spare", [{"inputs": "nothing", "targets": "x"}], "train")
    index = [{"name": n, "split": group, "metric": m} for n, (group, m, _) in TASKS.items()]
    (root / "INDEX.json").write_text(json.dumps(index))
    return root


def save_task(folder: Path, lines: list[dict[str, Any]], *splits: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for split in splits or ("test", "train"):
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


class World:
    """The saved world, loaded."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model, self.tokenizer = load_base(root / "base", device="cpu")
        self.pool = ExpertPool.load(root / "experts" / name for name in EXPERTS)

    def tasks(self, *folders: str, limit: int | None = 4, **more: Any) -> list[EvalTask]:
        sources = [self.root / folder for folder in folders or ("tasks", "heldout")]
        return read_tasks(sources, self.pool.names, self.model, self.tokenizer, limit=limit, **more)

    def run(
        self,
        out: str,
        methods: Sequence[Any] = ("base", "own", "phatgoose"),
        *,
        tasks: Sequence[EvalTask] | None = None,
        inputs: Inputs | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """Methods by name or ready made, a part of eight examples at a time."""
        by_name = [method for method in methods if isinstance(method, str)]
        made, left_out = make_methods(by_name, inputs or Inputs(self.pool))
        return run(
            self.model,
            self.tokenizer,
            self.pool,
            methods=[*made, *(m for m in methods if not isinstance(m, str))],
            tasks=tasks or self.tasks(),
            out=self.root / out,
            settings=RunSettings(**{"part": 8, "limit": 4, "progress": False, **settings}),
            left_out=left_out,
        )
