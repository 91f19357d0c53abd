"""experts list, verify, merge, convert, import, push, pull."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from phatgoose.cli.arguments.experts import Convert, Import, List, Merge, Pull, Push, Verify
from phatgoose.errors import ExpertFormatError, IncompatibleExpertError
from phatgoose.experts import (
    Expert,
    expert_sources,
    hub,
    load_expert,
    released,
    save_expert,
    verify_expert,
)
from phatgoose.experts.convert import convert_adapter
from phatgoose.experts.lora import read_config
from phatgoose.experts.save import check_new
from phatgoose.experts.sources import default_name, split_name
from phatgoose.experts.verify import check_modules
from phatgoose.models import load_base
from phatgoose.pool import ExpertPool, merge_experts


def list_experts(asked: List) -> None:
    """One line per expert. Of trees on the Hub only the configs are downloaded."""
    rows = [
        _row(load_expert(source))
        if str(source) in asked.experts or os.path.isdir(split_name(source)[1])
        else _row_on_the_hub(source)
        for source in expert_sources(asked.experts or None)
    ]
    if asked.json:
        print(json.dumps(rows))
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        gates = f"gates {row['gate_steps']} steps" if row["gates"] else "no gates"
        more = "on the Hub" if row["modules"] is None else f"{row['modules']} modules, {gates}"
        print(f"{row['name']:<{width}}  rank {row['rank']}, {more}, base {row['base']}")


def verify(asked: Verify) -> int:
    """Check experts; 3 if anything is wrong with any."""
    base: Any = None
    if asked.base:
        base, _ = load_base(asked.base, device="cpu", trust_remote_code=asked.trust_remote_code)
    found = {
        str(source): verify_expert(source, base, same_base=asked.same_base)
        for source in expert_sources(asked.experts)
    }
    if asked.json:
        print(json.dumps(found))
    else:
        for source, problems in found.items():
            print(f"{source}: " + ("nothing wrong" if not problems else "not usable as it is"))
            for problem in problems:
                print(f"  - {' '.join(problem.split())}")
    return 3 if any(found.values()) else 0


def merge(asked: Merge) -> None:
    """Merge experts into one adapter folder."""
    out = asked.out
    check_new(out)  # before the work, not after it
    pool = ExpertPool.load(expert_sources(asked.experts), same_base=asked.same_base)
    task_type, base = None, None
    if asked.base:
        base, _ = load_base(asked.base, device="cpu", trust_remote_code=asked.trust_remote_code)
        pool.rename_for(base)
        for problem in (problem for expert in pool for problem in check_modules(expert, base)):
            raise IncompatibleExpertError(problem)
        task_type = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    merged = merge_experts(
        pool,
        method=asked.method,
        rank=asked.rank,
        weights=asked.weights,
        density=asked.density,
        seed=asked.seed,
        name=out.name,
        base=base,
    )
    if asked.base:
        merged = replace(merged, base_name=asked.base)
    card = f"# {out.name}\n\nMerged ({asked.method}) from: {', '.join(pool.names)}.\n"
    save_expert(merged, out, task_type=task_type, card=card)
    if asked.json:
        print(json.dumps({**_row(replace(merged, folder=out)), "merged": pool.names}))
    else:
        rank = max(lora.rank for lora in merged.modules.values())
        print(
            f"{out}: {asked.method} of {len(pool)} experts, rank {rank}, "
            f"{len(merged.modules)} modules, no gates"
        )


def convert(asked: Convert) -> None:
    """Make a plain LoRA folder."""
    check_new(asked.out)
    model = None
    if asked.base:
        trust = asked.trust_remote_code
        model, _ = load_base(asked.base, device="cpu", dtype=torch.float32, trust_remote_code=trust)
    made = convert_adapter(
        asked.expert, asked.out, base=model, rank=asked.rank, read_pickle=asked.bin
    )
    row = {**_row(load_expert(asked.out)), "was": made.was, "error": made.error}
    if asked.json:
        print(json.dumps(row))
        return
    print(f"{asked.out}: LoRA of rank {row['rank']} at {row['modules']} modules, from {made.was}")
    if made.error is not None:
        print(f"largest difference of a module's weights, of their norm: {made.error:.2g}")


def import_released(asked: Import) -> None:
    """Turn the authors' checkpoint into expert folders."""
    folders = released.import_released(asked.checkpoint, asked.base, asked.out)
    if asked.json:
        print(json.dumps([str(folder) for folder in folders]))
    else:
        print(f"{asked.out}: {len(folders)} experts, {folders[0].name} to {folders[-1].name}")


def push(asked: Push) -> None:
    """Upload an expert that verifies."""
    problems = verify_expert(asked.expert)
    if problems:
        raise ExpertFormatError(f"{problems[0]} Nothing was uploaded.")
    address = hub.push(asked.expert, asked.hub_id, private=asked.private)
    print(json.dumps({"folder": str(asked.expert), "address": address}) if asked.json else address)


def pull(asked: Pull) -> None:
    """Download an expert and check it."""
    folder = hub.pull(asked.hub_id, asked.out)
    print(json.dumps(_row(load_expert(folder))) if asked.json else folder)


def _row_on_the_hub(source: str | Path) -> dict[str, Any]:
    """What a config alone tells: None stands for what it does not."""
    name, place = split_name(source)
    listing = hub.configs(str(place))
    config = read_config(listing[0]) if listing else {}
    unknown = dict.fromkeys(
        ("modules", "gates", "gate_steps", "gate_examples", "gate_first_loss", "gate_last_loss")
    )
    return {
        "name": name or default_name(place),
        "folder": str(place),
        "base": config.get("base_model_name_or_path"),
        "rank": config.get("r"),
        **unknown,
    }


def _row(expert: Expert) -> dict[str, Any]:
    record = expert.gates.record if expert.gates else None
    return {
        "name": expert.name,
        "folder": str(expert.folder),
        "base": (record and record.base.name) or expert.base_name,
        "rank": max(module.rank for module in expert.modules.values()),
        "modules": len(expert.modules),
        "gates": record is not None,
        "gate_steps": record and record.steps,
        "gate_examples": record and record.examples,
        "gate_first_loss": record and record.first_loss,
        "gate_last_loss": record and record.last_loss,
    }
