"""Gates: what training them costs beside the LoRA, and many experts' gates in one pass.

    python benchmarks/bench_gates.py [--shape 1b] [--experts 40] [--length 256] [--out FILE]

A Llama of random weights with a LoRA of rank 16 on every linear layer but the head, and a batch
with a row of random tokens for each expert. On the same batch:

- lora: a step of training the LoRA itself (PEFT, AdamW, gradients clipped, nothing else);
- gates: a step of `train_gates` for that LoRA;
- together: a step of `train_gates_together` for so many experts, the rows shared out among them.

On a GPU base and adapters compute in bf16 under autocast; LoRA and gates themselves are in fp32. A
step is the time from one batch to the next; the first few are left out.
"""

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import common
import peers
import phatgoose
from bench_generate import RANK, SHAPES, make_base, make_factors
from common import MIB, Results, say
from peers import Factors
from phatgoose.experts import LoraModule
from phatgoose.train import AdapterTraining

WARM_UP = 3
GATE_STEPS = 100  # as published

Batch = dict[str, Tensor]


class Ticking:
    """The same batch without end; notes the time at which each is asked for."""

    def __init__(self, batch: Batch, device: str, steps: int) -> None:
        self.batch, self.device, self.steps = batch, device, steps
        self.times: list[float] = []

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            yield self.batch

    def microseconds(self) -> list[float]:
        pairs = zip(self.times[WARM_UP:], self.times[WARM_UP + 1 :], strict=False)
        return [(end - start) * 1e6 for start, end in pairs]


def make_batch(model: nn.Module, rows: int, length: int) -> Batch:
    ids = torch.randint(1, model.config.vocab_size, (rows, length), device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def trainable(base: nn.Module, factors: dict[str, Factors]) -> nn.Module:
    """The base with the first expert as a PEFT LoRA in fp32, as before training."""
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    adapted = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(factors))
    )
    for name, f in factors.items():
        layer = adapted.get_base_model().get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(f.a[0])
        layer.lora_B["default"].weight.data.copy_(f.b[0])
    return adapted


def train_lora(model: nn.Module, batches: Ticking, autocast: torch.dtype | None) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    for _, batch in zip(range(batches.steps), batches, strict=False):
        enabled = autocast is not None
        with torch.autocast(batches.device, dtype=autocast, enabled=enabled):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def train_together(
    base: nn.Module,
    factors: dict[str, Factors],
    experts: int,
    batches: Ticking,
    autocast: torch.dtype | None,
) -> None:
    """The rows shared out among the experts; the first one's batches are the clock."""
    adapters = {
        f"e{i}": {name: LoraModule(f.a[i], f.b[i], 1.0) for name, f in factors.items()}
        for i in range(experts)
    }
    parts = {key: value.chunk(experts) for key, value in batches.batch.items()}
    given: dict[str, Any] = {
        f"e{i}": [{key: value[i] for key, value in parts.items()}] for i in range(experts)
    }
    batches.batch = given["e0"][0]
    given["e0"] = batches
    phatgoose.train_gates_together(
        base, adapters, given, steps=batches.steps, autocast=autocast, progress=False
    )


def row(
    kind: str, experts: int, batch: Batch, args: argparse.Namespace, train: Callable[[Ticking], Any]
) -> dict[str, Any]:
    """Run a training and say what its steps took."""
    tokens = batch["input_ids"].numel()
    found: dict[str, Any] = {
        "shape": args.shape,
        "kind": kind,
        "experts": experts,
        "rows": len(batch["input_ids"]),
        "tokens": tokens,
    }
    batches = Ticking(dict(batch), args.device, args.steps + WARM_UP + 1)
    common.free_memory(args.device)
    before = common.allocated(args.device)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        train(batches)
    except torch.OutOfMemoryError:
        return {**found, "note": "out of memory"}
    if args.device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    found["us"] = common.spread(batches.microseconds())
    found["tokens_per_s"] = tokens / found["us"]["p50"] * 1e6
    found["set_up_s"] = round(batches.times[0] - start, 2)
    return found


def compare(results: Results, made: dict[str, Any], adapter_steps: int) -> None:
    """Add a row, with what it is in terms of the rows before it."""
    if "us" in made:
        middle = made["us"]["p50"]
        known = {r["kind"]: r["us"]["p50"] for r in reversed(results.rows) if "us" in r}
        for other in ("lora", "gates"):
            if other in known and other != made["kind"]:
                made[f"over_{other}"] = middle / known[other]
        if made["kind"] == "gates":
            made["hundred_steps_s"] = middle * GATE_STEPS / 1e6
            if "lora" in known:
                made["of_adapter_training"] = middle * GATE_STEPS / (known["lora"] * adapter_steps)
    results.add(made)


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "shape": lambda r: r["shape"],
    "kind    ": lambda r: r["kind"],
    "experts": lambda r: str(r["experts"]),
    "rows": lambda r: str(r["rows"]),
    "tokens": lambda r: str(r["tokens"]),
    "p20 us": lambda r: f"{r['us']['p20']:.0f}" if "us" in r else "-",
    "p50 us": lambda r: f"{r['us']['p50']:.0f}" if "us" in r else "-",
    "p80 us": lambda r: f"{r['us']['p80']:.0f}" if "us" in r else "-",
    "/lora": lambda r: f"{r['over_lora']:.2f}" if "over_lora" in r else "-",
    "/gates": lambda r: f"{r['over_gates']:.2f}" if "over_gates" in r else "-",
    "peak MiB": lambda r: f"{r['peak_bytes'] / MIB:.0f}" if "peak_bytes" in r else "-",
    "note": lambda r: r.get("note", ""),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, help="default: 1b on a GPU, else tiny")
    parser.add_argument("--experts", type=int, default=40, help="at most, in one pass")
    parser.add_argument("--fewer", type=int, nargs="*", default=[8], help="also so many")
    parser.add_argument("--length", type=int, help="tokens of a row (256; on a CPU 16)")
    parser.add_argument("--steps", type=int, default=20, help="timed")
    args = parser.parse_args(arguments)
    gpu = args.device == "cuda"
    args.shape = args.shape or ("1b" if gpu else "tiny")
    args.length = args.length or (256 if gpu else 16)
    return args


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", module="peft")
    gpu = args.device == "cuda"
    autocast = torch.bfloat16 if gpu else None
    adapter_steps = AdapterTraining().steps
    results = Results(
        args,
        "gates",
        "microseconds of one training step",
        COLUMNS,
        dtype="bfloat16 under autocast" if gpu else "float32",
        rank=RANK,
        of_adapter_training=f"{GATE_STEPS} gate steps over {adapter_steps} steps of the LoRA, "
        "AdapterTraining's default",
        model=SHAPES[args.shape],
    )
    dtype = autocast or torch.float32
    base = make_base(args.shape, args.device, dtype, args.length)
    factors = make_factors(base, args.experts, RANK)
    batch = make_batch(base, args.experts, args.length)
    if peers.has_peft():
        lora = trainable(base, factors)
        made = row("lora", 1, batch, args, lambda b: train_lora(lora, b, autocast))
        compare(results, made, adapter_steps)
        made = row(
            "gates",
            1,
            batch,
            args,
            lambda b: phatgoose.train_gates(
                lora, b, steps=b.steps, autocast=autocast, progress=False
            ),
        )
        compare(results, made, adapter_steps)
        del lora
    else:
        say("peft is not there: no rows for the LoRA and for train_gates")
    counts = sorted({1, *args.fewer, args.experts})
    if not hasattr(phatgoose, "train_gates_together"):
        say("this phatgoose has no train_gates_together: no rows for it")
        counts = []
    for experts in counts:
        if results.spent():
            say(f"time is up: {experts} experts are left out")
            continue
        if args.experts % experts:
            raise SystemExit(f"--fewer {experts}: does not divide {args.experts} rows")
        made = row(
            "together",
            experts,
            batch,
            args,
            lambda b, n=experts: train_together(base, factors, n, b, autocast),
        )
        compare(results, made, adapter_steps)
    return results.finish()


if __name__ == "__main__":
    main()
