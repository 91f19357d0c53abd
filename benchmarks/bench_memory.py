"""Peak memory of a routed forward: it follows the tokens, hardly the number of experts.

    python benchmarks/bench_memory.py [--device cuda] [--out FILE]

Makes a pool of 166 random experts for a small T5, as a checkpoint in the format of the published
pools, imports, routes and generates with it. Then measures what forwards allocate on top of what
was there before (weights and inputs), at their peak: the plain model, the routed model at several
pool sizes, and a dense restatement that computes every expert for every token. The same for one
layer alone, whose floor is known: T x E fp32 scores, T x K x R and T x O.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import common
import peers
import phatgoose
from common import MIB, Results, peak, say
from peers import Factors
from phatgoose.experts import Expert, linear_modules, load_expert
from phatgoose.experts.released import import_released
from phatgoose.pool import ExpertPool

POOLS = (8, 64, 166)  # the last as many as the largest published pool
SEQUENCES, LENGTHS = 8, (128, 256)  # of encoder and decoder alike
TOP_K = (1, 2, 4)
RANK = 16  # as published
LAYER = "encoder.block.0.layer.1.DenseReluDense.wi"
MODEL = {
    "vocab_size": 512,
    "d_model": 128,
    "d_kv": 32,
    "num_heads": 4,
    "d_ff": 256,
    "num_layers": 2,
    "num_decoder_layers": 2,
}


# ---------------------------------------------------------------- the pool


def save_checkpoint(path: Path, model: nn.Module, experts: int) -> None:
    """Random experts as a published best.pt has them."""
    tensors = {}
    for name, (inputs, outputs) in linear_modules(model).items():
        if name == "lm_head":
            continue
        for i in range(experts):
            lora, router = f"{name}._addons.expert_lora.layer", f"{name}._addons.router."
            tensors[f"{lora}1__{i}"] = torch.randn(inputs, RANK) / inputs**0.5
            tensors[f"{lora}2__{i}"] = torch.randn(RANK, outputs) / RANK**0.5
            tensors[f"{router}expert_embeddings__{i}"] = torch.randn(inputs)
    torch.save(tensors, path)


def make_experts(model: nn.Module, count: int) -> tuple[list[Expert], dict[str, float]]:
    """Experts, through checkpoint and expert folders, and the seconds of each step."""
    seconds, start = {}, time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model.config.save_pretrained(folder / "base")
        save_checkpoint(folder / "best.pt", model, count)
        seconds["checkpoint"], start = time.perf_counter() - start, time.perf_counter()
        folders = import_released(
            folder / "best.pt", str(folder / "base"), folder / "pool", progress=False
        )
        seconds["import"], start = time.perf_counter() - start, time.perf_counter()
        experts = [load_expert(path) for path in folders]
        seconds["load"] = time.perf_counter() - start
    return experts, {step: round(value, 2) for step, value in seconds.items()}


def generate(model: nn.Module, pool: ExpertPool, device: str) -> dict[str, Any]:
    """Greedy text of the routed model, and how many of its experts that used."""
    start = time.perf_counter()
    phatgoose.route(model, pool)
    ids = torch.randint(2, MODEL["vocab_size"], (4, 32), device=device)
    with torch.no_grad(), phatgoose.record(model) as trace:
        text = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    phatgoose.unroute(model)
    used = torch.cat([chosen.flatten() for chosen in trace.experts.values()]).unique().numel()
    assert text.shape == (4, 9), text.shape
    return {"new_tokens": 32, "experts_used": used, "seconds": time.perf_counter() - start}


# ---------------------------------------------------------------- measuring


@contextmanager
def routed(model: nn.Module, experts: list[Expert], top_k: int, *, dense: bool) -> Iterator[int]:
    """The model routed, or its dense restatement; yields the bytes that experts take in it."""
    if dense:
        factors = {name: stacked(experts, name, model.device) for name in experts[0].modules}
        handles = [
            peers.attach(model.get_submodule(name), peers.Dense(f, top_k))
            for name, f in factors.items()
        ]
        try:
            yield sum(part.nbytes for f in factors.values() for part in (f.gates, f.a, f.b))
        finally:
            for handle in handles:
                handle.remove()
        return
    before = sum(buffer.nbytes for buffer in model.buffers())
    phatgoose.route(model, ExpertPool(experts), top_k=top_k)
    try:
        yield sum(buffer.nbytes for buffer in model.buffers()) - before
    finally:
        phatgoose.unroute(model)


def stacked(experts: list[Expert], name: str, device: torch.device) -> Factors:
    """The experts of one layer, which all of them adapt."""
    modules = [expert.modules[name] for expert in experts]
    return Factors(
        gates=torch.stack([e.gates.vectors[name].float() for e in experts if e.gates]).to(device),
        a=torch.stack([lora.a for lora in modules]).to(device),
        b=torch.stack([lora.b * lora.scale for lora in modules]).to(device),
    )


def measure(
    model: nn.Module, experts: list[Expert], pools: list[int], device: str, results: Results
) -> bool:
    """Add the rows; returns whether there was time for all."""
    layer = model.get_submodule(LAYER)
    inputs = []
    for length in LENGTHS:
        ids = torch.randint(2, MODEL["vocab_size"], (SEQUENCES, length), device=device)
        inputs.append((ids, torch.randn(ids.numel(), MODEL["d_model"], device=device)))

    def forget() -> None:
        """A routed model keeps the encoder's last output; let that be one of a single token."""
        one = inputs[0][0][:1, :1]
        with phatgoose.restrict(model, []):
            model(input_ids=one, decoder_input_ids=one, use_cache=False)

    def add(kind: str, pool: int, k: int, stored: int) -> None:
        for ids, x in inputs:
            forward = partial(model, input_ids=ids, decoder_input_ids=ids, use_cache=False)
            row = {"kind": kind, "experts": pool, "top_k": k, "tokens": len(x)}
            row["model"] = peak(forward, device, forget if kind == "routed" else None)
            row["layer"] = peak(partial(layer, x), device)
            floor = len(x) * 4 * (pool + k * RANK + MODEL["d_ff"])
            results.add({**row, "stored": stored, "layer_floor": floor})

    add("plain", 0, 0, 0)
    settings = [("routed", pool, k) for pool in pools for k in TOP_K if k == 2 or pool == pools[-1]]
    settings += [("dense", pool, 2) for pool in (pools[0], pools[-1])]
    for kind, pool, k in settings:
        if results.spent():
            say("time is up: rows are left out")
            return False
        with routed(model, experts[:pool], k, dense=kind == "dense") as stored:
            add(kind, pool, k, stored)
    return True


def check(model: nn.Module, experts: list[Expert], device: str) -> float:
    """Relative difference of the dense restatement and the routed model: they compute the same."""
    ids = torch.randint(2, MODEL["vocab_size"], (2, 33), device=device)
    logits = {}
    for dense in (False, True):
        with routed(model, experts, 2, dense=dense):
            logits[dense] = model(input_ids=ids, decoder_input_ids=ids).logits.double()
    return float((logits[True] - logits[False]).norm() / logits[False].norm())


# ---------------------------------------------------------------- report


def summarise(rows: list[dict[str, Any]], pools: list[int]) -> dict[str, float]:
    """What the most experts and the most tokens cost, at the most tokens and top_k 2."""
    known = {(r["kind"], r["experts"], r["top_k"], r["tokens"]): r for r in rows}
    few, many = (SEQUENCES * length for length in LENGTHS)
    least, most = pools[0], pools[-1]

    def ratio(one: tuple[Any, ...], other: tuple[Any, ...], part: str) -> float:
        return round(known[one][part] / known[other][part], 3)

    routed, dense = ("routed", most, 2, many), ("dense", most, 2, many)
    ratios = {}
    for part in ("model", "layer"):
        ratios |= {
            f"{part}: {most} experts / {least}": ratio(routed, ("routed", least, 2, many), part),
            f"{part}: dense {most} / {least}": ratio(dense, ("dense", least, 2, many), part),
            f"{part}: routed / plain": ratio(routed, ("plain", 0, 0, many), part),
            f"{part}: dense / routed": ratio(dense, routed, part),
            f"{part}: {many} tokens / {few}": ratio(routed, ("routed", most, 2, few), part),
            f"{part}: top_k {TOP_K[-1]} / {TOP_K[0]}": ratio(
                ("routed", most, TOP_K[-1], many), ("routed", most, TOP_K[0], many), part
            ),
        }
    ratios["layer: routed / floor"] = round(
        known[routed]["layer"] / known[routed]["layer_floor"], 3
    )
    return ratios


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "kind": lambda r: r["kind"],
    "tokens": lambda r: str(r["tokens"]),
    "experts": lambda r: str(r["experts"] or "-"),
    "top_k": lambda r: str(r["top_k"] or "-"),
    "model MiB": lambda r: f"{r['model'] / MIB:.2f}",
    "layer MiB": lambda r: f"{r['layer'] / MIB:.2f}",
    "floor MiB": lambda r: f"{r['layer_floor'] / MIB:.2f}",
    "stored MiB": lambda r: f"{r['stored'] / MIB:.2f}",
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__)
    parser.add_argument("--pools", type=int, nargs="+", default=POOLS, help="numbers of experts")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the products are small; bytes do not depend on it
    config = T5Config(**MODEL, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval().requires_grad_(False)
    experts, seconds = make_experts(model, args.pools[-1])
    model = model.to(args.device)
    works = generate(model, ExpertPool(experts), args.device)
    seconds["route and generate"] = round(works.pop("seconds"), 2)
    with torch.no_grad():
        results = Results(
            args,
            "memory",
            "bytes, peak above weights and inputs",
            COLUMNS,
            settings={"model": MODEL, "rank": RANK, "dtype": "float32", "layer": LAYER}
            | {"tokens": "per stream: encoder and decoder each have them"},
            floor="of the layer: 4 bytes x (T x E scores + T x K x R + T x O)",
            generated=works,
            dense_difference=check(model, experts, args.device),
            making=seconds,
        )
        complete = measure(model, experts, args.pools, args.device, results)
    if complete:
        results.head["ratios"] = summarise(results.rows, args.pools)
        for name, value in results.head["ratios"].items():
            print(f"{name:32} {value:8.3f}")
    return results.finish()


if __name__ == "__main__":
    main()
