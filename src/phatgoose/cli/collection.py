"""experts train, experts gate: many experts at once."""

import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from phatgoose import default
from phatgoose.cli.sources import by_name
from phatgoose.cli.training import adapter_settings, check_options, encode_examples
from phatgoose.errors import ConfigError, ExpertNotFoundError, TaskFormatError
from phatgoose.experts import GateRecord, load_expert
from phatgoose.experts.kinds import KINDS
from phatgoose.experts.lora import read_config
from phatgoose.experts.sources import expert_sources
from phatgoose.models import load_base
from phatgoose.tasks import Example, load_examples, task_folders
from phatgoose.train import derive_signatures, gate_experts, train_experts
from phatgoose.train.derive import MEASURES, draw


def train(arguments: Namespace) -> None:
    """Train an expert for each task folder."""
    gates, adapter = check_options(arguments), adapter_settings(arguments)
    folders = by_name(task_folders(arguments.tasks, "train"))
    out = Path(arguments.out)
    examples = {name: load_examples(folder) for name, folder in folders.items()}
    model, tokenizer = _load(arguments, arguments.base or default.BASE)
    made = train_experts(
        model,
        tokenizer,
        _encode(arguments, examples, model, tokenizer),
        out,
        adapter=adapter,
        gates=gates,
        gate_batch_size=arguments.gate_batch_size,
        together=arguments.together,
    )
    _print(arguments, {name: out / name for name in folders}, made)


def gate(arguments: Namespace) -> None:
    """Train the gates of many adapter folders, each on the task of its name."""
    gates = check_options(arguments)
    folders = by_name(map(_local, expert_sources(arguments.adapters)))
    base = arguments.base or _common_base(folders)
    tasks = by_name(task_folders(arguments.tasks, "train"))
    for name, folder in folders.items():
        if name not in tasks:
            raise TaskFormatError(
                f"{folder}: no task is named {name}. Name adapter and task alike, or train it "
                f"alone: phatgoose gate {folder}"
            )
    examples = {name: load_examples(tasks[name]) for name in folders}
    model, tokenizer = _load(arguments, base)
    made = gate_experts(
        model,
        tokenizer,
        folders,
        _encode(arguments, examples, model, tokenizer),
        settings=gates,
        batch_size=arguments.gate_batch_size or arguments.batch_size,
        autocast=torch.bfloat16 if arguments.bf16 else None,
        together=arguments.together,
    )
    _print(arguments, folders, made)


def derive(arguments: Namespace) -> None:
    """Measure signatures of expert folders, and write them into the folders."""
    for option, least in (("examples", 1), ("max_length", 2), ("batch_size", 1)):
        if getattr(arguments, option) < least:
            raise ConfigError(f"--{option} must be at least {least}.".replace("_", "-"))
    folders = by_name(map(_local, expert_sources(arguments.adapters)))
    experts = {name: load_expert(folder, name=name) for name, folder in folders.items()}
    tasks = by_name(task_folders(arguments.tasks, "train")) if arguments.tasks else {}
    missing = [name for name in folders if name not in tasks]
    if arguments.tasks and missing:
        raise TaskFormatError(
            f"{folders[missing[0]]}: no task is named {missing[0]}. Name adapter and task alike."
        )
    examples = {
        name: draw(load_examples(tasks[name]), arguments.examples, arguments.seed)
        for name in folders
        if tasks
    }
    model, tokenizer = load_base(arguments.base or _common_base(folders), device=arguments.device)
    made = derive_signatures(
        model,
        tokenizer,
        list(experts.values()),
        _encode(arguments, examples, model, tokenizer),
        kinds=None if tasks else [kind for kind in MEASURES if not KINDS[kind].needs_data],
        examples=arguments.examples,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    files = {
        name: [
            str(signatures.save(folders[name]) / KINDS[kind].file)
            for kind, signatures in of_expert.items()
        ]
        for name, of_expert in made.items()
    }
    if arguments.json:
        print(json.dumps(files))
        return
    for name, written in files.items():
        print(f"{folders[name]}: " + ", ".join(Path(path).name for path in written))


def _load(arguments: Namespace, base: str | Path) -> tuple[Any, Any]:
    if arguments.together is not None and arguments.together < 1:
        raise ConfigError(f"--together must be at least 1, got {arguments.together}.")
    return load_base(base, device=arguments.device, dtype=torch.float32)


def _encode(
    arguments: Namespace, examples: Mapping[str, list[Example]], model: Any, tokenizer: Any
) -> dict[str, Any]:
    return {
        name: encode_examples(arguments, rows, model, tokenizer) for name, rows in examples.items()
    }


def _local(source: str | Path) -> Path:
    if not Path(source).is_dir():
        raise ExpertNotFoundError(
            f"{source}: not a folder. Gates are written beside adapters, so pull those of the Hub "
            "first: phatgoose experts pull"
        )
    return Path(source)


def _common_base(folders: Mapping[str, Path]) -> str:
    """The base that all adapters' configs name."""
    first: tuple[Path, str] | None = None
    for folder in folders.values():
        base = read_config(folder).get("base_model_name_or_path")
        if not base:
            raise ConfigError(f"{folder}: its config names no base model. Pass --base.")
        if first and base != first[1]:
            raise ConfigError(
                f"{folder}: its base is {base}, that of {first[0]} is {first[1]}. Train those of "
                "one base at a time, or pass --base if it is the same by two names."
            )
        first = first or (folder, base)
    assert first is not None
    return first[1]


def _print(
    arguments: Namespace, folders: Mapping[str, Path], made: Mapping[str, GateRecord]
) -> None:
    if arguments.json:
        trained = [{"folder": str(folders[name]), **asdict(made[name])} for name in made]
        there = [str(folder) for name, folder in folders.items() if name not in made]
        print(json.dumps({"trained": trained, "there": there}))
        return
    for name, folder in folders.items():
        if name in made:
            record = made[name]
            print(
                f"{folder}: gates after {record.steps} steps on {record.examples} examples, loss "
                f"{record.first_loss:.3f} to {record.last_loss:.3f}"
            )
        else:
            print(f"{folder}: there already")
