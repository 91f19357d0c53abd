"""experts list, verify, import, push, pull."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from phatgoose.cli.sources import expert_sources
from phatgoose.experts import hub, load_expert, verify_expert
from phatgoose.experts.expert import Expert


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
    folder = hub.locate(arguments.hub_id, local_dir=Path(arguments.out))
    load_expert(folder)
    print(folder)


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
