"""experts train, experts gate, experts derive: many experts at once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from phatgoose.cli.arguments.collection import Derive, GateMany, TrainMany
from phatgoose.cli.loading import load
from phatgoose.cli.sources import by_name, experts_by_name
from phatgoose.cli.training import encode_examples
from phatgoose.errors import ConfigError, TaskFormatError
from phatgoose.experts import Expert, GateRecord, identify_base, load_expert
from phatgoose.experts.bases import one_base, tell_bases
from phatgoose.experts.kinds import KINDS
from phatgoose.experts.lora import read_config
from phatgoose.models import DEFAULT
from phatgoose.routers.base import measuring_routers
from phatgoose.tasks import Encoded, Example, load_examples, task_folders
from phatgoose.train import derive_signatures, gate_experts, train_experts, train_experts_on
from phatgoose.train.derive import draw


def train(asked: TrainMany) -> None:
    """Train an expert for each task folder."""
    gates, adapter = asked.gate_training(), asked.adapter_training()
    folders = by_name(task_folders(asked.tasks, "train"))
    examples = {name: load_examples(folder, chat=asked.chat) for name, folder in folders.items()}
    opened = partial(_opened, examples, asked)
    settings: dict[str, Any] = {
        "adapter": adapter,
        "gates": gates,
        "gate_batch_size": asked.gate_batch_size,
        "together": asked.together,
    }
    if asked.devices:
        made = train_experts_on(_every(asked.devices), opened, list(folders), asked.out, **settings)
    else:
        made = train_experts(*opened(asked.device), asked.out, **settings)
    _print({name: asked.out / name for name in folders}, made, as_json=asked.json)


def _opened(
    examples: Mapping[str, list[Example]], asked: TrainMany, device: str | None
) -> tuple[Any, Any, dict[str, list[Encoded]]]:
    """The base on a device, its tokenizer, and the examples for it."""
    model, tokenizer = load(asked.base or DEFAULT, asked, training=True, device=device)
    return model, tokenizer, _encode(examples, model, tokenizer, asked.max_length)


def _every(devices: Sequence[str]) -> list[str]:
    """The devices that were named, or every GPU; ConfigError where there is none."""
    if list(devices) != ["all"]:
        return list(devices)
    found = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if not found:
        raise ConfigError("--devices all: torch sees no GPU here. Name the devices, or none.")
    return found


def gate(asked: GateMany) -> None:
    """Train the gates of many adapter folders, each on the task of its name."""
    gates = asked.gate_training()
    folders = experts_by_name(asked.adapters)
    base = asked.base or _common_base(folders)
    tasks = by_name(task_folders(asked.tasks, "train"))
    for name, folder in folders.items():
        if name not in tasks:
            raise TaskFormatError(
                f"{folder}: no task is named {name}. Name adapter and task alike, or train it "
                f"alone: phatgoose gate {folder}"
            )
    examples = {name: load_examples(tasks[name], chat=asked.chat) for name in folders}
    model, tokenizer = load(base, asked, training=True)
    named = [Expert(name, {}, base_name=base) for name, base in _bases(folders).items()]
    tell_bases(named, identify_base(model), same_base=asked.same_base)
    made = gate_experts(
        model,
        tokenizer,
        folders,
        _encode(examples, model, tokenizer, asked.max_length),
        settings=gates,
        batch_size=asked.gate_batch,
        autocast=torch.bfloat16 if asked.bf16 else None,
        together=asked.together,
    )
    _print(folders, made, as_json=asked.json)


def derive(asked: Derive) -> None:
    """Measure signatures of expert folders, and write them into the folders."""
    folders = experts_by_name(asked.adapters)
    experts = {name: load_expert(folder, name=name) for name, folder in folders.items()}
    tasks = by_name(task_folders(asked.tasks, "train")) if asked.tasks else {}
    missing = [name for name in folders if name not in tasks]
    if asked.tasks and missing:
        raise TaskFormatError(
            f"{folders[missing[0]]}: no task is named {missing[0]}. Name adapter and task alike."
        )
    examples = {
        name: draw(load_examples(tasks[name], chat=asked.chat), asked.examples, asked.seed)
        for name in folders
        if tasks
    }
    model, tokenizer = load(asked.base or _common_base(folders), asked)
    tell_bases(experts.values(), identify_base(model), same_base=asked.same_base)
    made = derive_signatures(
        model,
        tokenizer,
        list(experts.values()),
        _encode(examples, model, tokenizer, asked.max_length),
        kinds=[kind for kind in measuring_routers() if tasks or not KINDS[kind].needs_data],
        examples=asked.examples,
        batch_size=asked.batch_size,
        seed=asked.seed,
    )
    files = {
        name: [
            str(signatures.save(folders[name]) / KINDS[kind].file)
            for kind, signatures in of_expert.items()
        ]
        for name, of_expert in made.items()
    }
    if asked.json:
        print(json.dumps(files))
        return
    for name, written in files.items():
        print(f"{folders[name]}: " + ", ".join(Path(path).name for path in written))


def _encode(
    examples: Mapping[str, list[Example]], model: Any, tokenizer: Any, max_length: int
) -> dict[str, list[Encoded]]:
    return {
        name: encode_examples(rows, model, tokenizer, max_length, who=name)
        for name, rows in examples.items()
    }


def _common_base(folders: Mapping[str, Path]) -> str:
    """The base that all adapters' configs name."""
    bases = _bases(folders)
    for name, base in bases.items():
        if not base:
            raise ConfigError(f"{folders[name]}: its config names no base model. Pass --base.")
    return one_base({str(folders[name]): base for name, base in bases.items()})


def _bases(folders: Mapping[str, Path]) -> dict[str, str | None]:
    return {name: read_config(f).get("base_model_name_or_path") for name, f in folders.items()}


def _print(folders: Mapping[str, Path], made: Mapping[str, GateRecord], *, as_json: bool) -> None:
    if as_json:
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
