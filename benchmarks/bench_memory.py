"""Peak memory of a routed forward: it follows the tokens, hardly the number of experts.

    python benchmarks/bench_memory.py [--out FILE] [--device cuda]

Makes a pool of 166 random experts for a small T5 as a checkpoint in the format of the published
pools, imports, routes and generates with it. Then measures what forwards allocate on top of what
was there before (weights and inputs), at their peak: the plain model, the routed model at several
pool sizes, and a dense restatement that computes every expert for every token. The same for one
layer alone, whose floor is known: T x E fp32 scores, T x K x R and T x O.
"""

import argparse
import json
import platform
import subprocess
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock
from weakref import WeakSet

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config, T5ForConditionalGeneration

import phatgoose
from phatgoose.experts import Expert, linear_modules, load_expert
from phatgoose.experts.released import import_released
from phatgoose.files import write_json
from phatgoose.nn import site
from phatgoose.pool import ExpertPool
from phatgoose.types import Routing

EXPERTS = 166  # as many as the largest published pool
POOLS = (8, 64, EXPERTS)
TOKENS = ((8, 128), (8, 256))  # sequences and their length, in encoder and decoder alike
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
MIB = 1 << 20


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


def make_pool(model: nn.Module) -> tuple[list[Expert], dict[str, float]]:
    """The experts, through checkpoint and expert folders, and the seconds of each step."""
    seconds, start = {}, time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model.config.save_pretrained(folder / "base")
        save_checkpoint(folder / "best.pt", model, EXPERTS)
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


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the block that are alive, and their peak.

    What an operation allocates and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._held = 0
        self._known: WeakSet[torch.UntypedStorage] = WeakSet()

    def __enter__(self) -> "LiveBytes":
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                # A view, or an operation in place, makes nothing new.
                if storage not in self._known and storage._cdata not in given:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage)
        weakref.finalize(storage, self._drop, storage.nbytes())
        self._held += storage.nbytes()
        self.peak = max(self.peak, self._held)

    def _drop(self, size: int) -> None:
        self._held -= size


def peak(run: Callable[[], Any], device: str) -> int:
    """Bytes held at the highest point of `run`, above what was there when it began."""
    if device != "cuda":
        with LiveBytes() as live:
            run()
        return live.peak
    run()  # libraries allocate their workspaces at first use
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def dense_lora(x: Tensor, a: Tensor, b: Tensor, routing: Routing) -> Tensor:
    """The routed sum by way of every expert's output for every token, [T E O]."""
    weights = x.new_zeros(len(x), len(a)).scatter(1, routing.experts, routing.weights)
    outputs = torch.einsum("eor,ter->teo", b, torch.einsum("eri,ti->ter", a, x))
    return torch.einsum("teo,te->to", outputs, weights)


@contextmanager
def routed(model: nn.Module, pool: ExpertPool, top_k: int, *, dense: bool) -> Iterator[int]:
    """The model routed; yields the bytes that its banks keep."""
    phatgoose.route(model, pool, top_k=top_k)
    banks = sum(buffer.nbytes for name, buffer in model.named_buffers() if f".{site.BANK}." in name)
    try:
        if dense:
            with mock.patch.object(site, "routed_lora", dense_lora):
                yield banks
        else:
            yield banks
    finally:
        phatgoose.unroute(model)


def measure(model: nn.Module, experts: list[Expert], device: str) -> list[dict[str, Any]]:
    rows = []
    layer = model.get_submodule(LAYER)
    settings = [("plain", 0, 0)]
    settings += [("routed", pool, k) for pool in POOLS for k in TOP_K]
    settings += [("dense", pool, 2) for pool in (POOLS[0], POOLS[-1])]
    for sequences, length in TOKENS:
        ids = torch.randint(2, MODEL["vocab_size"], (sequences, length), device=device)
        x = torch.randn(sequences * length, MODEL["d_model"], device=device)

        def forward(ids: Tensor = ids) -> Any:
            return model(input_ids=ids, decoder_input_ids=ids, use_cache=False)

        def alone(x: Tensor = x) -> Tensor:
            return layer(x)

        for kind, pool, k in settings:
            row = {"kind": kind, "experts": pool, "top_k": k, "tokens": len(x)}
            if kind == "plain":
                found = {"model": peak(forward, device), "layer": peak(alone, device), "stored": 0}
                floor = len(x) * MODEL["d_ff"] * 4
            else:
                dense = kind == "dense"
                with routed(model, ExpertPool(experts[:pool]), k, dense=dense) as stored:
                    found = {"model": peak(forward, device), "layer": peak(alone, device)}
                found["stored"] = stored
                floor = len(x) * 4 * (pool + k * RANK + MODEL["d_ff"])
            rows.append({**row, **found, "layer_floor": floor})
    return rows


def check(model: nn.Module, experts: list[Expert], device: str) -> float:
    """Relative difference of the dense restatement and the routed model: they compute the same."""
    ids = torch.randint(2, MODEL["vocab_size"], (2, 33), device=device)
    logits = {}
    for dense in (False, True):
        with routed(model, ExpertPool(experts), 2, dense=dense):
            logits[dense] = model(input_ids=ids, decoder_input_ids=ids).logits.double()
    return float((logits[True] - logits[False]).norm() / logits[False].norm())


# ---------------------------------------------------------------- report


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the most experts and the most tokens cost, at the most tokens and top_k 2."""
    known = {(r["kind"], r["experts"], r["top_k"], r["tokens"]): r for r in rows}
    few, many = (sequences * length for sequences, length in TOKENS)

    def ratio(one: tuple[Any, ...], other: tuple[Any, ...], part: str) -> float:
        return round(known[one][part] / known[other][part], 3)

    most = ("routed", POOLS[-1], 2, many)
    ratios = {}
    for part in ("model", "layer"):
        ratios |= {
            f"{part}: {POOLS[-1]} experts / {POOLS[0]}": ratio(
                most, ("routed", POOLS[0], 2, many), part
            ),
            f"{part}: dense {POOLS[-1]} / {POOLS[0]}": ratio(
                ("dense", POOLS[-1], 2, many), ("dense", POOLS[0], 2, many), part
            ),
            f"{part}: routed / plain": ratio(most, ("plain", 0, 0, many), part),
            f"{part}: dense / routed": ratio(("dense", POOLS[-1], 2, many), most, part),
            f"{part}: {many} tokens / {few}": ratio(most, (*most[:3], few), part),
            f"{part}: top_k 4 / 1": ratio(
                ("routed", POOLS[-1], 4, many), ("routed", POOLS[-1], 1, many), part
            ),
        }
    ratios["layer: routed / floor"] = round(known[most]["layer"] / known[most]["layer_floor"], 3)
    return ratios


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["kind    tokens  experts  top_k |    model    layer    floor |   stored  (MiB)"]
    for r in rows:
        sizes = {key: r[key] / MIB for key in ("model", "layer", "layer_floor", "stored")}
        lines.append(
            f"{r['kind']:7} {r['tokens']:6} {r['experts'] or '-':>8} {r['top_k'] or '-':>6} |"
            f" {sizes['model']:8.2f} {sizes['layer']:8.2f} {sizes['layer_floor']:8.2f} |"
            f" {sizes['stored']:8.2f}"
        )
    return "\n".join(lines)


def versions(device: str) -> dict[str, str]:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "phatgoose": phatgoose.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="also write the results to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the products are small; bytes do not depend on it
    config = T5Config(**MODEL, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval().requires_grad_(False)
    experts, seconds = make_pool(model)
    model = model.to(args.device)
    works = generate(model, ExpertPool(experts), args.device)
    seconds["route and generate"] = round(works.pop("seconds"), 2)
    with torch.no_grad():
        difference = check(model, experts, args.device)
        rows = measure(model, experts, args.device)
    results = {
        "benchmark": "memory",
        "unit": "bytes, peak above weights and inputs",
        **versions(args.device),
        "settings": {"model": MODEL, "rank": RANK, "dtype": "float32", "layer": LAYER}
        | {"tokens": "per stream: encoder and decoder each have them"},
        "floor": "of the layer: 4 bytes x (T x E scores + T x K x R + T x O)",
        "generated": works,
        "dense_difference": difference,
        "seconds": {**seconds, "all": round(time.perf_counter() - start, 1)},
        "ratios": summarise(rows),
        "rows": rows,
    }
    print(table(rows))
    for name, value in results["ratios"].items():
        print(f"{name:32} {value:8.3f}")
    print(json.dumps(results))
    if args.out:
        write_json(args.out, results)


if __name__ == "__main__":
    main()
