"""Every Python block of the README and the docs runs, or names only what is there."""

import ast
import importlib
import inspect
import json
import os
import shutil
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import phatgoose
from phatgoose.default import tiny
from phatgoose.routers import Router
from phatgoose.tasks import Example
from tests.docs.blocks import Block, Given, blocks
from tests.models import make_batch, make_model

# An engine, a server's client, a data set of the Hub: these blocks are looked at, and not run.
NOT_RUN = {"vllm", "openai", "lm_eval"}
EXPERTS = ("snips", "ud_pos", "trec_question_type", "banking77")
PROMPT = "Give the plural of each word: ink, eruption\n"


def parts(block: Block) -> set[str]:
    """The top packages that a block imports or takes for imported."""
    found = set()
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.Name):
            found.add(node.id)
    return found


PYTHON = blocks("python")
RUN = [block for block in PYTHON if not parts(block) & NOT_RUN]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders that the docs speak of, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Router, "_known", dict(Router._known))
    for name in EXPERTS:
        shutil.copytree(tiny.EXPERTS / name, tmp_path / "experts" / name)
    for name in ("someone/their-expert", "another/expert", "new/experts/e2e_nlg"):
        shutil.copytree(tiny.EXPERTS / "e2e_nlg", tmp_path / name)
    shutil.copytree(tiny.BASE, tmp_path / "my-base")
    rows = [{"inputs": f"Say {word}:", "targets": word} for word in ("goose", "duck", "swan")]
    for split in ("train", "test"):
        path = tmp_path / "my-tasks" / "snips" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def make_peft_model(_: Given) -> Any:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)  # as if trained
    model = get_peft_model(make_model("llama"), config)
    model.save_pretrained("my-adapter")
    return model


def make_batches(given: Given) -> Iterator[dict[str, Any]]:
    batch = make_batch(given["peft_model"], [5, 3])
    return repeat({**batch, "labels": batch["input_ids"]})


def make_trainer(given: Given) -> Trainer:
    batch = next(make_batches(given))
    rows = [{key: value[i] for key, value in batch.items()} for i in range(2)]
    settings = TrainingArguments(
        "my-adapter", max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    return Trainer(given["peft_model"], settings, train_dataset=rows)


def routed(given: Given) -> Any:
    return phatgoose.route(plain(given), given["pool"])


def plain(_: Given) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny.BASE, dtype=torch.float32).eval()


MAKERS = {
    "phatgoose": lambda _: phatgoose,
    "base": lambda _: str(tiny.BASE),
    "model": routed,
    "tokenizer": lambda _: AutoTokenizer.from_pretrained(tiny.BASE),
    "inputs": lambda given: given["tokenizer"](PROMPT, return_tensors="pt"),
    "pool": lambda _: phatgoose.ExpertPool.load("experts"),
    "general": lambda _: phatgoose.ExpertPool.load("someone/their-expert"),
    "examples": lambda _: [Example("Say goose:", "goose"), Example("Say duck:", "duck")],
    "peft_model": make_peft_model,
    "batches": make_batches,
    "trainer": make_trainer,
    "folder": lambda _: "out",
}
# What a page says of a name, where it is another thing than on the others.
OF_PAGE = {"docs/evaluation.md": {"model": plain}}


@pytest.mark.parametrize("block", RUN, ids=str)
def test_a_block_runs(block: Block, world: Path) -> None:
    torch.manual_seed(0)
    given = Given({**MAKERS, **OF_PAGE.get(block.page, {})})
    name = Path(os.path.relpath(world)) / str(block)
    exec(compile(block.code, str(name), "exec"), given)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_what_a_block_names_is_there(block: Block) -> None:
    """Imports, attributes and arguments of ours, by their signatures."""
    names: dict[str, Any] = {"phatgoose": phatgoose}
    tree = ast.parse(block.code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("phatgoose"):
            module = importlib.import_module(str(node.module))
            names |= {n.asname or n.name: getattr(module, n.name) for n in node.names}
        elif isinstance(node, ast.Import):
            for n in node.names:
                if n.name.startswith("phatgoose"):
                    importlib.import_module(n.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolve(node, names)
        elif isinstance(node, ast.Call) and callable(called := resolve(node.func, names)):
            given = {str(k.arg): None for k in node.keywords if k.arg}
            if not any(isinstance(a, ast.Starred) for a in node.args):
                inspect.signature(called).bind_partial(*node.args, **given)


def resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    """What of ours an expression names; None if it is nothing of ours."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        inner = resolve(node.value, names)
        return None if inner is None else getattr(inner, node.attr)
    return None


def test_there_are_blocks_of_both_kinds() -> None:
    assert len(RUN) > 10 and len(PYTHON) > len(RUN)
