"""gate, train."""

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from phatgoose.cli.arguments.training import Gate, Train
from phatgoose.cli.loading import load
from phatgoose.cli.options import GateOptions
from phatgoose.errors import ConfigError
from phatgoose.experts import Delta, Expert, LoraModule, identify_base
from phatgoose.experts.bases import tell_bases
from phatgoose.experts.lora import has_peft_keys, read_adapter
from phatgoose.models import DEFAULT
from phatgoose.tasks import Encoded, Example, batches, encode_example, load_examples, within
from phatgoose.train import train_adapter, train_gates, train_gates_together
from phatgoose.train.gates import check_adapter

CHECKPOINT = "phatgoose_gates.checkpoint"


def gate(asked: Gate) -> None:
    """Train the gates of an adapter folder and write them into it."""
    asked.gate_training()  # refuses bad settings before anything is done
    folder = asked.adapter
    config, modules = read_adapter(folder)
    base = asked.base or config.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{folder}: its config names no base model. Pass --base.")
    examples = load_examples(asked.data, chat=asked.chat)
    model, tokenizer = load(base, asked, training=True)
    check_adapter(folder.name, modules, model)  # PEFT would load what fits, with a warning
    expert = Expert(folder.name, modules, base_name=config.get("base_model_name_or_path"))
    tell_bases([expert], identify_base(model), same_base=asked.same_base)
    encoded = encode_examples(examples, model, tokenizer, asked.max_length, who=asked.data)
    if has_peft_keys(folder) and all(isinstance(delta, LoraModule) for delta in modules.values()):
        peft_model = PeftModel.from_pretrained(model, folder)
        _train_gates(asked, peft_model, tokenizer, encoded, folder, json_wanted=asked.json)
    else:  # what PEFT computes of other kinds has no place for a gate, and other keys it leaves out
        _train_gates(
            asked, model, tokenizer, encoded, folder, json_wanted=asked.json, modules=modules
        )


def train(asked: Train) -> None:
    """Train an adapter and its gates into a new expert folder."""
    asked.gate_training()  # refuses bad settings before anything is done
    settings, out = asked.adapter_training(), asked.out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"{out}: is no empty folder. Give a new folder, or empty this one; if its adapter is "
            f"trained and only its gates are missing: phatgoose gate {out}"
        )
    examples = load_examples(asked.data, chat=asked.chat)
    model, tokenizer = load(asked.base or DEFAULT, asked, training=True)
    encoded = encode_examples(examples, model, tokenizer, asked.max_length, who=asked.data)
    peft_model = train_adapter(model, encoded, out, settings, pad=tokenizer.pad_token_id)
    _train_gates(asked, peft_model, tokenizer, encoded, out, json_wanted=asked.json)


def encode_examples(
    examples: list[Example], model: Any, tokenizer: Any, max_length: int, *, who: str
) -> list[Encoded]:
    """Token ids, no longer than asked for and than the base can read.

    Says on stderr how many examples of `who` are longer. Raises ConfigError where an answer has no
    token, or an example is a conversation that the tokenizer's chat template does not take.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or max_length
    longest, seq2seq = min(max_length, longest), model.config.is_encoder_decoder
    found, cut = [], 0
    for example in examples:
        whole = encode_example(tokenizer, example, max_length=sys.maxsize, seq2seq=seq2seq)
        if not whole.target:
            raise ConfigError(
                f"{who}: the answer to {example.prompt[:40]!r} has no token to learn. Remove it."
            )
        found.append(within(whole, longest, seq2seq=seq2seq))
        cut += found[-1] != whole
    if cut:
        print(
            f"phatgoose: {who}: {cut} of {len(examples)} examples have more than {longest} tokens "
            "and are cut to so many",
            file=sys.stderr,
        )
    return found


def _train_gates(
    asked: GateOptions,
    model: Any,
    tokenizer: Any,
    encoded: list[Encoded],
    folder: Path,
    *,
    json_wanted: bool,
    modules: Mapping[str, Delta] | None = None,
) -> None:
    """Of a PeftModel's adapter, or of these modules on a plain base."""
    settings = asked.gate_training()
    data = batches(
        encoded,
        asked.gate_batch,
        pad=tokenizer.pad_token_id,
        seq2seq=model.config.is_encoder_decoder,
        seed=asked.seed,
    )
    how: dict[str, Any] = {
        "steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "seed": settings.seed,
        "autocast": torch.bfloat16 if asked.bf16 else None,
        "tokenizer": tokenizer,
    }
    name, checkpoint = folder.name, folder / CHECKPOINT
    if modules is None:
        gates = train_gates(model, data, checkpoint=checkpoint, **how)
    else:
        kept = folder / f"{CHECKPOINT}s"
        found = train_gates_together(model, {name: modules}, {name: data}, checkpoint=kept, **how)
        gates = found[name]
    gates.save(folder)
    checkpoint.unlink(missing_ok=True)
    if modules is not None:
        shutil.rmtree(kept, ignore_errors=True)
    record = asdict(gates.record)
    if json_wanted:
        print(json.dumps({"folder": str(folder), **record}))
    else:
        print(
            f"{folder}: {len(gates.vectors)} gates after {record['steps']} steps on "
            f"{record['examples']} examples, loss {record['first_loss']:.3f} to "
            f"{record['last_loss']:.3f}"
        )
