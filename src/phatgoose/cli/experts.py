"""experts list, verify, merge, import, push, pull."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from phatgoose.experts import hub, load_expert, verify_expert
from phatgoose.experts.expert import Expert
from phatgoose.experts.sources import expert_sources


def list_experts(arguments: Namespace) -> None:
    """One line per expert."""
    rows = [_row(load_expert(source)) for source in expert_sources(arguments.experts or None)]
    if arguments.json:
        print(json.dumps(rows))
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        gates = f"gates {row['gate_steps']} steps" if row["gates"] else "no gates"
        print(
            f"{row['name']:<{width}}  rank {row['rank']}, {row['modules']} modules, {gates}, "
            f"base {row['base']}"
        )


def verify(arguments: Namespace) -> int:
    """Check experts; 3 if anything is wrong with any."""
    base: Any = None
    if arguments.base:
        from phatgoose.models import load_base

        base, _ = load_base(arguments.base, device="cpu")
    found = {
        str(source): verify_expert(source, base) for source in expert_sources(arguments.experts)
    }
    if arguments.json:
        print(json.dumps(found))
    else:
        for source, problems in found.items():
            print(f"{source}: " + ("nothing wrong" if not problems else "not usable as it is"))
            for problem in problems:
                print(f"  - {' '.join(problem.split())}")
    return 3 if any(found.values()) else 0


def merge(arguments: Namespace) -> None:
    """Merge experts into one adapter folder."""
    from phatgoose.errors import IncompatibleExpertError
    from phatgoose.experts.save import check_new, save_expert
    from phatgoose.experts.verify import check_modules
    from phatgoose.models import load_base
    from phatgoose.pool import ExpertPool, merge_experts

    out = Path(arguments.out)
    check_new(out)  # before the work, not after it
    pool = ExpertPool.load(expert_sources(arguments.experts))
    task_type = None
    if arguments.base:
        base, _ = load_base(arguments.base, device="cpu")
        for problem in (problem for expert in pool for problem in check_modules(expert, base)):
            raise IncompatibleExpertError(problem)
        task_type = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    merged = merge_experts(
        pool,
        method=arguments.method,
        rank=arguments.rank,
        weights=arguments.weights,
        density=arguments.density,
        seed=arguments.seed,
        name=out.name,
    )
    if arguments.base:
        merged = replace(merged, base_name=arguments.base)
    card = f"# {out.name}\n\nMerged ({arguments.method}) from: {', '.join(pool.names)}.\n"
    save_expert(merged, out, task_type=task_type, card=card)
    if arguments.json:
        print(json.dumps({**_row(replace(merged, folder=out)), "merged": pool.names}))
    else:
        rank = max(lora.rank for lora in merged.modules.values())
        print(
            f"{out}: {arguments.method} of {len(pool)} experts, rank {rank}, "
            f"{len(merged.modules)} modules, no gates"
        )


def import_released(arguments: Namespace) -> None:
    """Turn the authors' checkpoint into expert folders."""
    from phatgoose.experts.released import import_released

    folders = import_released(Path(arguments.checkpoint), arguments.base, Path(arguments.out))
    if arguments.json:
        print(json.dumps([str(folder) for folder in folders]))
    else:
        print(f"{arguments.out}: {len(folders)} experts, {folders[0].name} to {folders[-1].name}")


def push(arguments: Namespace) -> None:
    """Upload an expert that verifies."""
    problems = verify_expert(arguments.expert)
    if problems:
        from phatgoose.errors import ExpertFormatError

        raise ExpertFormatError(f"{problems[0]} Nothing was uploaded.")
    print(hub.push(Path(arguments.expert), arguments.hub_id, private=arguments.private))


def pull(arguments: Namespace) -> None:
    """Download an expert and check it."""
    print(hub.pull(arguments.hub_id, Path(arguments.out)))


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
