"""Do all backends compute the definition, also compiled and as a CUDA graph?

    python benchmarks/check_backends.py [--device cuda] [--cases 12] [--seed 0] [--out FILE]
    python benchmarks/check_backends.py --cases 0 --no-model       # of mixed dtypes alone

Random layers (tokens on both sides of every threshold, mixed ranks, odd sizes, closed slots, null
scores, priors, several layers of one input) in every dtype, by every backend, against the routed
sum in float64: the experts chosen (where scores are no near tie), the weights and the output; and
the same with a choice made elsewhere, and as vLLM runs a layer, on a GPU in a CUDA graph. Then
layers whose input and LoRA differ in dtype, on both sides of the threshold between few tokens and
many, so that every kernel runs; what must be the same in every run is run again. Then a small Llama
with random experts: compiled with fullgraph=True and, on a GPU, captured as a CUDA graph, it gives
the same logits as it is, also after the pool has changed within its capacity, without being
compiled or captured again.
The exit status is 1 where anything is off.
"""

import argparse
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import common
import phatgoose
from bench_generate import make_base, make_factors
from bench_layer import make_pool
from common import Results, say
from phatgoose.nn import Bank
from phatgoose.ops import (
    BACKENDS,
    EPS,
    Choosing,
    Extras,
    Rows,
    choose_backend,
    choose_open,
    gate_scores,
)
from phatgoose.serve.engine import operators  # noqa: F401  (defines them)

# Relative errors of the output, as in the tests' table of tolerances.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
WEIGHTS = 1e-4  # difference of weights; signatures in two halves keep 16 bits
NEAR_TIE = 1e-3
RANKS = (4, 16, 13, 64)
# Dtypes of the input and of the LoRA, where they differ.
MIXED = [(x, lora) for x in TOLERANCE for lora in TOLERANCE if x != lora]
# Of these cases: tokens, parts, slots, rank, features, outputs.
MIXED_SIZES = [(64, 1, 33, 16, 1024, 640), (1030, 1, 33, 16, 1024, 640), (300, 3, 5, 64, 512, 256)]
STEADY = (
    "reference",
    "triton",
)  # bit for bit the same in every run; "torch" adds as GPUs happen to
SETTINGS = ("top_k", "temperature", "unit", "null_score")


def make_case(number: random.Random, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Tensors and settings of one random layer."""
    parts, slots = number.choice((1, 1, 3)), number.choice((1, 5, 33, 166))
    rank, features = number.choice(RANKS), number.choice((64, 129, 1024))
    tokens, outputs = number.choice((0, 1, 7, 64, 255, 300, 1030)), number.choice((64, 77, 640))
    sizes = tokens, parts, slots, rank, features, outputs
    return make_layer(number, sizes, device, dtype, dtype)


def make_layer(
    number: random.Random,
    sizes: tuple[int, ...],
    device: str,
    dtype: torch.dtype,  # of x and of the output
    lora: torch.dtype,
) -> dict[str, Any]:
    """Tensors of these sizes, with random settings."""
    tokens, parts, slots, rank, features, outputs = sizes
    seed = torch.Generator().manual_seed(number.randrange(2**31))

    def made(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=seed) * scale).to(device)

    signatures = nn.functional.layer_norm(made(parts, slots, features), (features,))
    return {
        "x": (made(tokens, features) + number.choice((0.0, 0.0, 3.0))).to(dtype),
        "signatures": signatures,
        "open": torch.rand(parts, slots, generator=seed).to(device) < number.choice((0.5, 2.0)),
        "a": made(parts, slots, rank, features, scale=features**-0.5).to(lora),
        "b": [made(slots, outputs, rank, scale=rank**-0.5).to(lora) for _ in range(parts)],
        "output": [made(tokens, outputs).to(dtype) for _ in range(parts)],
        "top_k": number.choice((1, 2, 2, 3)),
        "temperature": number.choice((1.0, 0.5)),
        "unit": number.random() < 0.2,
        "null_score": number.choice((None, None, 0.5)),
        "prior": number.choice((None, made(tokens, slots, scale=2.0))),
    }


def as_seen(case: dict[str, Any], backend: str) -> dict[str, Any]:
    """The case as a backend reads it: where gates are in halves, x is rounded to their dtype."""
    lora = case["a"].dtype
    return {**case, "x": case["x"].to(lora)} if BACKENDS[backend].halves_gates(lora) else case


def tolerance(case: dict[str, Any]) -> float:
    return max(TOLERANCE[case[name].dtype] for name in "xa")


def gates_of(case: dict[str, Any], backend: str) -> tuple[Tensor, Tensor]:
    """Signatures and their sums, as a bank keeps them."""
    x, signatures, a = case["x"], case["signatures"], case["a"]
    sizes = [b.shape[1] for b in case["b"]]
    bank = Bank(x.shape[1], sizes, device=x.device, dtype=a.dtype, backend=backend)
    bank.reserve(a.shape[1], a.shape[2])
    bank.signatures.copy_(signatures)
    bank.members, bank.ranks = list(range(a.shape[1])), [a.shape[2]] * a.shape[1]
    bank._refresh(slice(None))
    gates, _ = bank.view(range(bank.parts))
    return gates.signatures, gates.sums


def run(case: dict[str, Any], backend: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Experts, weights and outputs [T, S, ...] by one backend, as `Site` calls it."""
    x, a, gates = case["x"], case["a"], gates_of(case, backend)
    settings = [case[key] for key in SETTINGS]
    experts, weights, *down = torch.ops.phatgoose.gated_down(
        x, *gates, case["open"], a, case["prior"], None, backend, *settings
    )
    return experts, weights, _add_up(case, down, experts, backend)


def exact(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Experts, weights, and the gap to the next candidate [T, S], in float64."""
    x = nn.functional.layer_norm(case["x"].double(), case["x"].shape[1:], eps=EPS)
    scores = torch.einsum("ti,sci->tsc", x, case["signatures"].double()) / math.sqrt(x.shape[1])
    if case["prior"] is not None:
        scores += case["prior"].double()[:, None]
    scores = scores.masked_fill(~case["open"], -math.inf)
    slots = scores.shape[2]
    if case["null_score"] is not None:
        scores = nn.functional.pad(scores, (0, 1), value=case["null_score"])
    count = min(case["top_k"], scores.shape[2])
    ordered, places = scores.sort(dim=-1, descending=True)
    gap = (ordered[..., :count] - nn.functional.pad(ordered, (0, 1), value=-math.inf)[
        ..., 1 : count + 1
    ]).nan_to_num(math.inf).amin(-1)  # fmt: skip
    kept, places = ordered[..., :count], places[..., :count]
    found = kept > -math.inf
    weights = found.double()
    if not case["unit"]:
        weights = (kept / case["temperature"]).softmax(-1).nan_to_num()
    return places.masked_fill(~found | (places == slots), -1), weights, gap


def routed_sum(case: dict[str, Any], part: int, experts: Tensor, weights: Tensor) -> Tensor:
    """The output in float64, given a choice."""
    slots, shares = experts.clamp_min(0), weights.double() * (experts >= 0)
    y = case["output"][part].double()
    for k in range(experts.shape[1]):
        a, b = case["a"][part].double()[slots[:, k]], case["b"][part].double()[slots[:, k]]
        low = torch.einsum("tri,ti,t->tr", a, case["x"].double(), shares[:, k])
        y = y + torch.einsum("tor,tr->to", b, low)
    return y


def compare(case: dict[str, Any], backend: str) -> dict[str, Any]:
    """Largest differences from the definition, and whether they are within bounds."""
    experts, weights, outputs = run(case, backend)
    seen = as_seen(case, backend)
    wanted, shares, gap = exact(seen)
    clear = gap > NEAR_TIE
    same = bool((experts == wanted)[clear].all())
    off = float((weights - shares)[clear].abs().max()) if bool(clear.any()) else 0.0
    error = _error(seen, outputs, experts, weights)
    experts2, weights2, outputs2 = run(case, backend)
    twice = zip((experts, weights, *outputs), (experts2, weights2, *outputs2), strict=True)
    steady = backend not in STEADY or all(torch.equal(*pair) for pair in twice)
    good = same and steady and off < WEIGHTS and error < tolerance(case)
    return {"same_experts": same, "steady": steady, "weights": off, "error": error, "good": good}


def compare_given(case: dict[str, Any], backend: str) -> dict[str, Any]:
    """A choice made elsewhere, as other routers and `assign` make it."""
    experts, weights, _ = exact(case)
    weights = weights.float()

    def compute() -> list[Tensor]:
        down = torch.ops.phatgoose.routed_down(case["x"], case["a"], experts, weights, backend)
        return _add_up(case, down, experts, backend)

    outputs, again = compute(), compute()
    steady = backend not in STEADY or all(map(torch.equal, outputs, again))
    error = _error(case, outputs, experts, weights)
    return {"steady": steady, "error": error, "good": steady and error < tolerance(case)}


def _add_up(case: dict[str, Any], down: Any, experts: Tensor, backend: str) -> list[Tensor]:
    z, *plan = down
    outputs = [output.clone() for output in case["output"]]
    for part, (output, b) in enumerate(zip(outputs, case["b"], strict=True)):
        torch.ops.phatgoose.routed_up_(output, b, z, experts, *plan, part, backend)
    return outputs


def _error(
    case: dict[str, Any], outputs: Sequence[Tensor], experts: Tensor, weights: Tensor
) -> float:
    """The largest relative error of the parts' outputs."""
    errors = [0.0]
    for part, output in enumerate(outputs):
        y = routed_sum(case, part, experts[:, part], weights[:, part])
        errors.append(float((output.double() - y).norm() / y.norm().clamp_min(1e-30)))
    return max(errors)


def compare_served(case: dict[str, Any], backend: str) -> dict[str, Any]:
    """The layer as vLLM runs it, on a GPU in a CUDA graph: parts side by side, experts counted."""
    experts, weights, _ = run(case, backend)
    return _served(as_seen(case, backend), case, backend, gates_of(case, backend), experts, weights)


def compare_rows(case: dict[str, Any], backend: str) -> dict[str, Any]:
    """The same, where requests have mixtures, or a top_k, temperature and scale of their own."""
    signatures, sums = case["signatures"], case["signatures"].sum(-1)
    rows = make_rows(case)
    scores = torch.stack([gate_scores(case["x"], part) for part in signatures], dim=1)
    choosing = Choosing(*(case[key] for key in SETTINGS))
    routing = choose_open(scores, case["open"], choosing, Extras(case["prior"]), rows)
    gates = signatures.flatten(0, 1), sums
    return _served(case, case, backend, gates, routing.experts, routing.weights, rows)


def make_rows(case: dict[str, Any]) -> Rows:
    """A third of the tokens mix up to four experts; the others have knobs of their own."""
    tokens, slots, device = len(case["x"]), case["open"].shape[1], case["x"].device
    seed = torch.Generator().manual_seed(tokens + slots)
    places = min(4, slots)
    mixed = torch.rand(tokens, slots, generator=seed).argsort(dim=1)[:, :places]
    top_k = torch.arange(tokens) % places + 1
    top_k[::3] = 0
    made = Rows(
        mixed,
        2 * torch.rand(tokens, places, generator=seed),
        top_k,
        0.5 + torch.rand(tokens, generator=seed),
        2 * torch.rand(tokens, generator=seed),
    )
    return Rows(*(table.to(device) for table in made))


def _served(
    seen: dict[str, Any],
    case: dict[str, Any],
    backend: str,
    scored: tuple[Tensor, Tensor],
    experts: Tensor,
    weights: Tensor,
    rows: Sequence[Tensor] = (),
) -> dict[str, Any]:
    """What vLLM's operators add, against the sum of these experts."""
    x, parts = case["x"], [base.shape[1] for base in case["output"]]
    tally = torch.zeros(len(x), 1 + case["open"].shape[1], device=x.device)
    output = torch.cat(case["output"], dim=1)
    gates = *scored, case["open"], case["a"], case["b"], case["prior"], tally, list(rows)
    settings, turn = [case[key] for key in SETTINGS], torch.zeros(1, device=x.device)

    def serve() -> Tensor:
        tally.zero_()
        torch.ops.phatgoose.fork_(turn, x, None)
        torch.cat(case["output"], dim=1, out=output)
        torch.ops.phatgoose.add_routed_(
            output, turn, x, None, *gates, x.shape[1], None, backend, *settings
        )
        return output

    if x.is_cuda and len(x) and backend == "triton":  # the others count on the host
        replay = captured(serve)
        output.fill_(torch.nan)
        replay()
    else:
        serve()
    counted = torch.zeros_like(tally).scatter_add_(1, (experts + 1).flatten(1), weights.flatten(1))
    off = float((tally - counted).abs().max()) if tally.numel() else 0.0
    error = _error(seen, output.split(parts, dim=1), experts, weights)
    return {"weights": off, "error": error, "good": off < WEIGHTS and error < tolerance(case)}


def check_model(device: str, dtype: torch.dtype, results: Results) -> bool:
    """Compiled and captured, before and after the pool changes within its capacity."""
    from torch._dynamo.testing import CompileCounterWithBackend

    base = make_base("tiny", device, dtype, 64)
    pool = make_pool(make_factors(base, 6, 4))
    spare = pool["e5"]
    pool.remove("e5")
    phatgoose.route(base, pool, capacity=8)
    ids = torch.randint(5, 100, (2, 9), device=device)
    # Inductor rounds less often in half precision; among random experts near ties then fall the
    # other way, and logits differ by a tenth and more.
    counter = CompileCounterWithBackend("inductor" if dtype == torch.float32 else "aot_eager")
    compiled = torch.compile(base, fullgraph=True, backend=counter)
    replay = None
    if device == "cuda":
        replay = captured(lambda: base(ids, use_cache=False).logits)
    changes: dict[str, Callable[[], Any]] = {
        "as routed": lambda: None,
        "expert added": lambda: pool.add(spare),
        "expert removed": lambda: pool.remove("e1"),
    }
    fine = True
    for name, change in changes.items():
        change()
        wanted = base(ids, use_cache=False).logits
        for way, call in (("compiled", lambda: compiled(ids, use_cache=False).logits),
                          ("CUDA graph", replay)):  # fmt: skip
            if call is None:
                continue
            error = float((call() - wanted).double().norm() / wanted.double().norm())
            good = error < 10 * TOLERANCE[dtype]
            fine = fine and good
            results.add(
                {"case": name, "what": way, "dtype": str(dtype), "error": error, "good": good}
            )
    once = counter.frame_count == 1
    results.add({"case": "compiled once", "what": "compiled", "dtype": str(dtype), "good": once})
    return fine and once


def captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What `run` gives, replayed from one CUDA graph."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()

    def replay() -> Tensor:
        graph.replay()
        return found

    return replay


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "case                ": lambda r: str(r["case"]),
    "backend          ": lambda r: r["what"],
    "dtype           ": lambda r: r["dtype"].removeprefix("torch."),
    "error  ": lambda r: f"{r['error']:.1e}" if "error" in r else "-",
    "weights": lambda r: f"{r['weights']:.1e}" if "weights" in r else "-",
    "": lambda r: "ok" if r["good"] else "WRONG",
}


WAYS = {
    "": compare,
    ", given": compare_given,
    ", served": compare_served,
    ", rows": compare_rows,
}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")


def main(arguments: list[str] | None = None) -> bool:
    parser = common.parser(__doc__)
    parser.add_argument("--cases", type=int, default=12, help="random layers for each dtype")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-model", dest="model", action="store_false")
    parser.add_argument("--no-mixed", dest="mixed", action="store_false")
    args: argparse.Namespace = parser.parse_args(arguments)
    results = Results(args, "backends", "relative error", COLUMNS)
    backends = ["reference", "torch"]
    if choose_backend("auto", args.device) == "triton":
        backends.append("triton")
    number, fine = random.Random(args.seed), True

    def check(i: int, case: dict[str, Any]) -> bool:
        x, lora, good = case["x"], case["a"].dtype, True
        size = f"{i}: {list(x.shape)} S{len(case['b'])} E{case['open'].shape[1]}"
        dtypes = str(lora) if lora == x.dtype else f"{_short(x.dtype)}, LoRA {_short(lora)}"
        for backend in backends:
            for way, compute in WAYS.items():
                found = compute(case, backend)
                results.add({"case": size, "what": backend + way, "dtype": dtypes, **found})
                good = good and found["good"]
        return good

    with torch.no_grad():
        for i in range(args.cases):
            for dtype in TOLERANCE:
                fine = check(i, make_case(number, args.device, dtype)) and fine
        for i, sizes in enumerate(MIXED_SIZES if args.mixed else []):
            for dtypes in MIXED:
                fine = check(i, make_layer(number, sizes, args.device, *dtypes)) and fine
        if args.model:
            for dtype in (torch.float32, torch.bfloat16):
                fine = check_model(args.device, dtype, results) and fine
    results.finish()
    say("all backends agree" if fine else "SOMETHING IS WRONG")
    return fine


if __name__ == "__main__":
    raise SystemExit(not main())
