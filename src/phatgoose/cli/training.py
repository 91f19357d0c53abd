"""gate, train."""

import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from phatgoose import default
from phatgoose.errors import ConfigError, IncompatibleExpertError
from phatgoose.experts import Expert, Gates
from phatgoose.experts.lora import LoraModule, read_adapter
from phatgoose.experts.verify import check_modules, check_numbers
from phatgoose.models import load_base
from phatgoose.tasks import Encoded, batches, encode, load_examples
from phatgoose.train import AdapterTraining, GateTraining, train_adapter, train_gates

CHECKPOINT = "phatgoose_gates.checkpoint"


def gate(arguments: Namespace) -> None:
    """Train the gates of an adapter folder and write them into it."""
    from peft import PeftModel

    check_options(arguments)
    folder = Path(arguments.adapter)
    config, modules = read_adapter(folder)
    base = arguments.base or config.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{folder}: its config names no base model. Pass --base.")
    examples = load_examples(arguments.data)
    model, tokenizer = load_base(base, device=arguments.device, dtype=torch.float32)
    _check_adapter(folder, modules, model)
    encoded = encode_examples(arguments, examples, model, tokenizer)
    _train_gates(arguments, PeftModel.from_pretrained(model, folder), tokenizer, encoded, folder)


def train(arguments: Namespace) -> None:
    """Train an adapter and its gates into a new expert folder."""
    check_options(arguments)
    settings = adapter_settings(arguments)
    out = Path(arguments.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"{out}: is no empty folder. Give a new folder, or empty this one; if its adapter is "
            f"trained and only its gates are missing: phatgoose gate {out}"
        )
    examples = load_examples(arguments.data)
    model, tokenizer = load_base(
        arguments.base or default.BASE, device=arguments.device, dtype=torch.float32
    )
    encoded = encode_examples(arguments, examples, model, tokenizer)
    peft_model = train_adapter(model, encoded, out, settings, pad=tokenizer.pad_token_id)
    _train_gates(arguments, peft_model, tokenizer, encoded, out)


def adapter_settings(arguments: Namespace) -> AdapterTraining:
    """The adapter phase as the command line has it."""
    return AdapterTraining(
        rank=arguments.rank,
        alpha=arguments.alpha,
        target_modules=arguments.target_modules or AdapterTraining.target_modules,
        dropout=arguments.dropout,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        seed_each=getattr(arguments, "seed_each", False),
        bf16=arguments.bf16,
        save_dtype=arguments.save_dtype,
    )


def check_options(arguments: Namespace) -> GateTraining:
    """The gate phase as the command line has it; refuses bad settings before anything is done."""
    settings = GateTraining(
        steps=arguments.gate_steps,
        learning_rate=arguments.gate_learning_rate,
        seed=arguments.seed,
    )
    for option, least in (("batch_size", 1), ("gate_batch_size", 1), ("max_length", 2)):
        value = getattr(arguments, option)
        if value is not None and value < least:
            raise ConfigError(f"{option} must be at least {least}, got {value}.")
    return settings


def _check_adapter(folder: Path, modules: Mapping[str, LoraModule], model: Any) -> None:
    """Refuse what PEFT would load in part, with a warning, or train into NaN."""
    expert = Expert(folder.name, modules, base_name=None, folder=folder)
    for problem in (*check_numbers(expert), *check_modules(expert, model)):
        raise IncompatibleExpertError(problem)


def encode_examples(
    arguments: Namespace, examples: list[Any], model: Any, tokenizer: Any
) -> list[Encoded]:
    longest = getattr(model.config, "max_position_embeddings", None) or arguments.max_length
    return [
        encode(
            tokenizer,
            example.prompt,
            example.target,
            max_length=min(arguments.max_length, longest),
            seq2seq=model.config.is_encoder_decoder,
        )
        for example in examples
    ]


def _train_gates(
    arguments: Namespace, model: Any, tokenizer: Any, encoded: list[Encoded], folder: Path
) -> None:
    checkpoint = folder / CHECKPOINT
    gates: Gates = train_gates(
        model,
        batches(
            encoded,
            arguments.gate_batch_size or arguments.batch_size,
            pad=tokenizer.pad_token_id,
            seq2seq=model.config.is_encoder_decoder,
            seed=arguments.seed,
        ),
        steps=arguments.gate_steps,
        learning_rate=arguments.gate_learning_rate,
        seed=arguments.seed,
        autocast=torch.bfloat16 if arguments.bf16 else None,
        tokenizer=tokenizer,
        checkpoint=checkpoint,
    )
    gates.save(folder)
    checkpoint.unlink(missing_ok=True)
    record = asdict(gates.record)
    if arguments.json:
        print(json.dumps({"folder": str(folder), **record}))
    else:
        print(
            f"{folder}: {len(gates.vectors)} gates after {record['steps']} steps on "
            f"{record['examples']} examples, loss {record['first_loss']:.3f} to "
            f"{record['last_loss']:.3f}"
        )
