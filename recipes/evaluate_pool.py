"""What routing recovers: the table of a pool on its own tasks and on held-out ones.

    python recipes/evaluate_pool.py --base BASE --experts EXPERTS --tasks TASKS --out OUT

EXPERTS holds expert folders, each named after its task. TASKS holds tasks/NAME/test.jsonl.xz,
heldout/NAME/test.jsonl.xz and INDEX.json. Methods: the bare base; each task's own expert, told
which; and the routed pool, which gets the examples of all tasks shuffled into one unlabelled
stream. OUT receives results.json, table.md and every answer as JSON lines. What is finished there
is not computed again, so an interrupted run goes on where it stopped, and another routing setting
computes only the routed answers anew.
"""

import argparse
import hashlib
import json
import platform
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from pool_table import METHODS, Scores, summarise, table
from pool_tasks import Item, Task, read_tasks
from tqdm import tqdm

import phatgoose
from phatgoose.errors import ConfigError, PhatgooseError
from phatgoose.evaluation import grade, own_share, predict
from phatgoose.experts import adapter_hash, identify_base
from phatgoose.experts.gates import gates_hash
from phatgoose.experts.lora import CONFIG_FILE
from phatgoose.files import write_bytes, write_json
from phatgoose.models import best_device, load_base
from phatgoose.pool import ExpertPool

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---------------------------------------------------------------- work


@dataclass(frozen=True)
class Unit:
    """Some examples to answer by one method, kept as one file."""

    method: str
    name: str
    items: list[Item]
    settings: dict[str, Any]  # all else that the answers depend on

    def file(self, out: Path) -> Path:
        """Named after all it depends on, so nothing stale is ever taken for finished."""
        asked = [
            (i.task.name, i.task.metric, i.task.lines[i.place], i.task.max_new_tokens, i.example)
            for i in self.items
        ]
        key = digest([self.settings, [(*rest, asdict(example)) for *rest, example in asked]])
        return out / "answers" / self.method / f"{self.name}-{key[:12]}.jsonl"


def plan(args: argparse.Namespace, tasks: Sequence[Task], identity: dict[str, Any]) -> list[Unit]:
    """What there is to compute: the stream in parts by base and routed, each task by its expert."""
    stream = [Item(task, place) for task in tasks for place in range(len(task.examples))]
    random.Random(args.seed).shuffle(stream)
    parts = [stream[start : start + args.part] for start in range(0, len(stream), args.part)]
    hashes = identity["experts"]
    common = {"base": identity["base"]["weights"], "dtype": args.dtype, "device": args.device}
    common["share_prompts"] = args.share_prompts
    routed = {**common, "experts": hashes, **routing(args)}
    units = [
        Unit(method, f"part-{number:03}", part, settings)
        for method, settings in (("base", common), ("routed", routed))
        for number, part in enumerate(parts)
    ]
    for task in tasks:
        if task.group == "tasks":
            items = [Item(task, place) for place in range(len(task.examples))]
            settings = {**common, "adapter": hashes[task.name]["adapter"]}
            units.append(Unit("own", task.name, items, settings))
    return [unit for unit in units if unit.method in args.methods]


def routing(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "router": args.router,
        "top_k": args.top_k,
        "temperature": args.temperature,
        "scale": args.scale,
        "null_score": args.null_score,
    }


@contextmanager
def set_up(model: Any, pool: ExpertPool, unit: Unit, args: argparse.Namespace) -> Iterator[None]:
    """The model as the unit's method wants it."""
    if unit.method == "base":
        yield
        return
    settings = routing(args) if unit.method == "routed" else {"router": args.router, "top_k": 1}
    phatgoose.route(model, pool, **settings)
    try:
        if unit.method == "routed":
            yield
        else:  # the one candidate has weight 1: the plain adapter
            with phatgoose.restrict(model, [unit.name]):
                yield
    finally:
        phatgoose.unroute(model)


def answer(model: Any, tokenizer: Any, unit: Unit, args: argparse.Namespace) -> bytes:
    """Answer a unit's examples as the model stands; JSON lines, in the stream's order."""
    predictions = predict(
        model,
        tokenizer,
        [item.example for item in unit.items],
        max_new_tokens=[item.task.max_new_tokens for item in unit.items],
        max_tokens_per_batch=args.tokens,
        batch_size=args.rows,
        share_prompts=args.share_prompts,
        progress=True,
    )
    lines = []
    for item, prediction in zip(unit.items, predictions, strict=True):
        (scored,) = grade([prediction], [item.example], item.task.metric)
        where = {"task": item.task.name, "line": item.task.lines[item.place]}
        lines.append(json.dumps({**where, **asdict(scored)}, ensure_ascii=False))
    return ("\n".join(lines) + "\n").encode()


def compute(
    model: Any, tokenizer: Any, pool: ExpertPool, *, units: Sequence[Unit], args: argparse.Namespace
) -> None:
    """Answer what OUT does not have yet."""
    for unit in tqdm(units, desc="parts", unit="part"):
        path = unit.file(args.out)
        if not path.exists():
            with set_up(model, pool, unit, args):
                write_bytes(path, answer(model, tokenizer, unit, args))


def diagnose(
    model: Any, tokenizer: Any, pool: ExpertPool, *, units: Sequence[Unit], args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """For each task with an expert: the share of routing weight that this expert gets."""
    routed = next((unit for unit in units if unit.method == "routed"), None)
    tasks = {i.task.name: i.task for u in units for i in u.items if i.task.group == "tasks"}
    if routed is None or not args.diagnose or not tasks:
        return {}
    items = [
        Item(task, place)
        for task in tasks.values()
        for place in range(min(args.diagnose, len(task.examples)))
    ]
    path = replace(routed, name="own-share", items=items).file(args.out).with_suffix(".json")
    if not path.exists():
        shares = {}
        with set_up(model, pool, routed, args):
            for name, task in tqdm(tasks.items(), desc="own share", unit="task"):
                # A trace keeps every token's routing at every site: small batches.
                some, most = task.examples[: args.diagnose], min(args.tokens, 16_384)
                found = own_share(model, tokenizer, some, name, max_tokens_per_batch=most)
                shares[name] = asdict(found)
        write_json(path, shares)
    return json.loads(path.read_text())


def read_scores(units: Sequence[Unit], out: Path) -> Scores:
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for unit in units:
        with unit.file(out).open(encoding="utf-8") as file:
            for found in map(json.loads, file):
                of_method = scores.setdefault(found["task"], {}).setdefault(unit.method, {})
                of_method[found["line"]] = found["score"]
    return scores


# ---------------------------------------------------------------- identity


def identify(model: Any, tokenizer: Any, pool: ExpertPool) -> dict[str, Any]:
    """The base and the experts by content."""
    base = identify_base(model, tokenizer).to_json()
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {list(tensor.shape)} ".encode())
        weights.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    experts = {
        expert.name: {
            "adapter": adapter_hash(expert.modules),
            "gates": gates_hash(expert.gates.vectors) if expert.gates else None,
        }
        for expert in pool
    }
    return {"base": {**base, "weights": weights.hexdigest()}, "experts": experts}


def versions(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    return {
        "phatgoose": phatgoose.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "device": f"{device} ({name})",
    }


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", required=True, help="folder or Hub id of the base model")
    add("--experts", type=Path, required=True, help="folder of expert folders")
    add("--tasks", type=Path, required=True, help="task collection")
    add("--out", type=Path, required=True, help="folder for the results")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--no-heldout", action="store_true", help="only the experts' own tasks")
    add("--limit", type=int, default=200, help="test examples per task (200)")
    add("--seed", type=int, default=0, help="of the subsets and the stream's order")
    add("--diagnose", type=int, default=64, help="examples per task for the own share (64)")
    add("--router", default="phatgoose")
    add("--top-k", type=int, default=2)
    add("--temperature", type=float, default=1.0)
    add("--scale", choices=("softmax", "unit"), default="softmax")
    add("--null-score", type=float, help="score of using no expert (none)")
    add("--device", help="cuda or cpu (what torch sees)")
    add("--dtype", choices=DTYPES, help="of the model (float32 on a cpu, else bfloat16)")
    add("--tokens", type=int, help="tokens per batch of ranking (131072, cpu 8192)")
    add("--rows", type=int, help="prompts per batch of generation (1024, cpu 64)")
    add("--part", type=int, help="examples computed between saves (16384, cpu 1024)")
    add(
        "--share-prompts",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read a prompt once for all its choices: same up to rounding, and faster",
    )
    args = parser.parse_args(argv)
    args.device = args.device or best_device()
    small = args.device == "cpu"
    args.dtype = args.dtype or ("float32" if small else "bfloat16")
    for name, usual, on_cpu in (
        ("tokens", 131_072, 8_192),
        ("rows", 1024, 64),
        ("part", 16_384, 1024),
    ):
        if getattr(args, name) is None:
            setattr(args, name, on_cpu if small else usual)
    for name in ("limit", "tokens", "rows", "part"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compute what is missing, write results.json and table.md, return the results."""
    folders = sorted(path.parent for path in args.experts.glob(f"*/{CONFIG_FILE}"))
    if not folders:
        raise ConfigError(f"--experts {args.experts}: holds no expert folders.")
    pool = ExpertPool.load(folders)
    model, tokenizer = load_base(args.base, device=args.device, dtype=DTYPES[args.dtype])
    # Settings and experts that do not fit are better known now than after the base's answers.
    phatgoose.unroute(phatgoose.route(model, pool, **routing(args)))
    identity = identify(model, tokenizer, pool)
    tasks = read_tasks(args, pool.names, tokenizer)
    units = plan(args, tasks, identity)
    compute(model, tokenizer, pool, units=units, args=args)
    shares = diagnose(model, tokenizer, pool, units=units, args=args)
    results = {
        "settings": {**routing(args), "dtype": args.dtype, "share_prompts": args.share_prompts}
        | {"limit": args.limit, "seed": args.seed, "diagnose": args.diagnose},
        "versions": versions(args.device),
        **identity,
        **summarise(tasks, read_scores(units, args.out)),
        "own_share": shares,
        "answers": [str(unit.file(Path("."))) for unit in units],
    }
    write_json(args.out / "results.json", results)
    write_bytes(args.out / "table.md", table(results).encode())
    return results


def main(argv: Sequence[str] | None = None) -> int:
    try:
        print(table(run(parse(argv))), end="")
    except PhatgooseError as error:
        print(f"evaluate_pool: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
