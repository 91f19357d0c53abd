"""A whole model: prefill and decoding, plain, with one LoRA, routed among many experts, with Arrow.

    python benchmarks/bench_generate.py --shape 8b [--experts 128] [--arrow-experts 8] [--out FILE]

The model has the sizes of Llama 3 8B (or Llama 3.2 1B) and random weights. Every linear layer but
the head is adapted, at rank 16; two experts for every token and layer. Prefill is one sequence into
an empty cache; a decoding step adds one token to each sequence of a static cache, run as it is
("eager"), as one CUDA graph ("graph"), or through torch.compile ("compile", on demand). All models
share the base's weights and the cache, and take turns.

The experts of layers of one size start from the same random factors, to be quick to make; each
layer's bank, and each PEFT layer, holds its own copy.
"""

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import common
import peers
import phatgoose
from bench_layer import backend_of, make_pool
from common import NotCapturableError, Results, say
from peers import Factors
from phatgoose.experts import linear_modules

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "tie_word_embeddings": False,
    },
}
RANK, TOP_K = 16, 2
WRONG = 0.05  # relative difference of logits that rounding does not explain
FLOORS = {
    "decode": "base p50 in the same mode + bytes / bandwidth; bytes: every layer's fp32 gates and "
    "the factors of the distinct experts chosen there, each read once",
    "prefill": "base p50 + flops / matmul rate + bytes / bandwidth, summed over layers: "
    "2 T I E + 2 T K R (I + O) flops; x read again, output read and written once, fp32 gates and "
    "factors of the distinct experts chosen read once",
    "bytes_floor_us": "bytes / bandwidth: the weights of all linear layers, the keys and values of "
    "the context, and for routed models what `decode` has",
}


# ---------------------------------------------------------------- models


def make_base(shape: str, device: str, dtype: torch.dtype, length: int) -> LlamaForCausalLM:
    """A Llama with random weights, made where it will run."""
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=max(8192, length),
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def make_factors(model: nn.Module, experts: int, rank: int) -> dict[str, Factors]:
    """Experts on every linear layer but the head; layers of one size share theirs."""
    like = {"device": model.device, "dtype": model.dtype}
    shared: dict[tuple[int, int], Factors] = {}
    found = {}
    for name, (inputs, outputs) in linear_modules(model).items():
        if name == "lm_head":
            continue
        if (inputs, outputs) not in shared:
            shared[inputs, outputs] = Factors(
                gates=torch.randn(experts, inputs, device=model.device),
                a=torch.randn(experts, rank, inputs, **like) / inputs**0.5,
                b=torch.randn(experts, outputs, rank, **like) / rank**0.5,
            )
        found[name] = shared[inputs, outputs]
    return found


def some(factors: dict[str, Factors], experts: int) -> dict[str, Factors]:
    """The first so many experts."""
    return {n: Factors(f.gates[:experts], f.a[:experts], f.b[:experts]) for n, f in factors.items()}


@dataclass
class Contender:
    name: str
    experts: int
    model: nn.Module
    keep: Any
    stored: int

    @property
    def label(self) -> str:
        return f"{self.name} {self.experts}" if self.name == "arrow" else self.name


def make_contender(
    name: str, experts: int, base: nn.Module, factors: dict[str, Factors], device: str
) -> Contender:
    start, before = time.perf_counter(), common.allocated(device)
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    keep: Any = None
    if name == "lora":
        keep = peers.peft_lora(model, some(factors, 1))
    elif name == "arrow":
        keep = peers.peft_arrow(model, some(factors, experts), TOP_K)
    elif name.startswith("phatgoose"):
        keep = make_pool(some(factors, experts))
        phatgoose.route(model, keep, top_k=TOP_K, backend=backend_of(name))
    stored = common.allocated(device) - before
    say(f"{name}, {experts} experts: made in {time.perf_counter() - start:.1f} s")
    return Contender(name, experts, model, keep, stored)


# ---------------------------------------------------------------- what is timed


class Prefill:
    """One sequence into an empty cache; only the last token's logits."""

    def __init__(self, base: nn.Module, tokens: int) -> None:
        self.task, self.batch, self.tokens, self.context = "prefill", 1, tokens, 0
        self.ids = torch.randint(base.config.vocab_size, (1, tokens), device=base.device)

    def run(self, model: nn.Module) -> Tensor:
        return model(input_ids=self.ids, use_cache=True, logits_to_keep=1).logits


class Decode:
    """One more token for each of `batch` sequences whose first `context` are in a static cache.

    Position and mask are tensors made beforehand, and the cache forgets the new token before the
    next step, so that every step is the same and one CUDA graph can hold it.
    """

    def __init__(self, base: nn.Module, batch: int, context: int) -> None:
        self.task, self.batch, self.tokens, self.context = "decode", batch, batch, context
        device, vocabulary = base.device, base.config.vocab_size
        room = context + 8
        self.cache = StaticCache(config=base.config, max_cache_len=room)
        base(
            input_ids=torch.randint(vocabulary, (batch, context), device=device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        # One tensor behind the counters of all layers: one operation sets them back.
        self.lengths = torch.full((len(self.cache.layers),), context, device=device)
        for layer, length in zip(self.cache.layers, self.lengths, strict=True):
            layer.cumulative_length = length
        self.ids = torch.randint(vocabulary, (batch, 1), device=device)
        self.positions = torch.full((batch, 1), context, device=device)
        self.mask = (torch.arange(room, device=device) <= context).expand(batch, 1, 1, room)

    def run(self, model: nn.Module) -> Tensor:
        self.lengths.fill_(self.context)
        return model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits


class Held:
    """A run that keeps its last logits: those in a CUDA graph are read after a replay."""

    def __init__(self, task: "Prefill | Decode", model: nn.Module) -> None:
        self.task, self.model = task, model
        self.logits = torch.empty(0)

    def __call__(self) -> None:
        self.logits = self.task.run(self.model)


def modes(
    task: "Prefill | Decode", contenders: list[Contender], args: argparse.Namespace
) -> dict[str, tuple[dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]]:
    """By mode: the runs, by contender, and what is to be said of each contender."""
    runs: dict[str, Callable[[], Any]] = {}
    notes: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        notes[contender.label] = {}
        held = Held(task, contender.model)
        try:
            held()
            if not held.logits.isfinite().all():
                notes[contender.label] = {"note": "not finite"}
            notes[contender.label]["peak_bytes"] = common.peak(held, args.device)
            runs[contender.label] = held
        except Exception as error:  # one contender's trouble is no other's
            notes[contender.label] = {"note": common.why_not(error)}
        held.logits = torch.empty(0)
        common.free_memory(args.device)
    found = {"eager": (runs, notes)}
    if isinstance(task, Prefill):
        return found
    if "graph" in args.modes and args.device == "cuda":
        found["graph"] = _graphs(task, contenders, set(runs))
    if "compile" in args.modes:
        found["compile"] = _compiled(task, contenders, set(runs))
    return found


def _graphs(
    task: "Prefill | Decode", contenders: list[Contender], fit: set[str]
) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]:
    runs: dict[str, Callable[[], Any]] = {}
    notes: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        label = contender.label
        if label not in fit:
            notes[label] = {"note": "not run"}
            continue
        held = Held(task, contender.model)
        try:
            replay = common.capture(held)
            notes[label] = compared(contender, held, replay)
            runs[label] = replay
        except NotCapturableError as error:
            say(f"{label}: no CUDA graph: {error}")
            notes[label] = {"note": "not capturable"}
        except torch.OutOfMemoryError:
            notes[label] = {"note": "out of memory"}
    return runs, notes


def _compiled(
    task: "Prefill | Decode", contenders: list[Contender], fit: set[str]
) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]:
    runs: dict[str, Callable[[], Any]] = {}
    notes: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        label = contender.label
        start = time.perf_counter()
        torch._dynamo.reset()
        held = Held(task, torch.compile(contender.model, mode="reduce-overhead"))
        try:
            for _ in range(3):
                held()
            notes[label] = compared(contender, held, held)
            runs[label] = held
        except Exception as error:  # whatever a compiler may not like
            say(f"{label}: torch.compile: {str(error).splitlines()[0]}")
            notes[label] = {"note": "does not compile"}
        say(f"{label}: compiled in {time.perf_counter() - start:.1f} s")
    return runs, notes


def compared(contender: Contender, held: Held, run: Callable[[], Any]) -> dict[str, Any]:
    """How far the logits that `run` leaves in `held` are from those of the eager model.

    A graph may use other products than eager mode, which round otherwise; near ties among many
    random experts then fall the other way, and a few of those are felt. So a routed model is
    compared once more while every token has only as many experts as it uses, and no choice.
    """

    def difference() -> float:
        eager = held.task.run(contender.model).float()
        run()
        return ((held.logits.float() - eager).norm() / eager.norm()).item()

    found = {"differs_from_eager": difference()}
    good = found["differs_from_eager"] < WRONG
    if contender.name.startswith("phatgoose"):
        with phatgoose.restrict(contender.model, contender.keep.names[:TOP_K]):
            found["differs_without_choice"] = difference()
        good = found["differs_without_choice"] < WRONG and found["differs_from_eager"] < 0.5
    return found if good else {**found, "note": "wrong"}


# ---------------------------------------------------------------- floors


def chosen(task: "Prefill | Decode", contender: Contender) -> dict[str, int]:
    """How many distinct experts each layer used."""
    with phatgoose.record(contender.model) as trace:
        task.run(contender.model)
    return {name: experts.unique().numel() for name, experts in trace.experts.items()}


def added(
    task: "Prefill | Decode", contender: Contender, factors: dict[str, Factors]
) -> tuple[float, float]:
    """Bytes and FLOPs that routing needs on top of the base; see FLOORS."""
    moved = flops = 0.0
    for name, distinct in chosen(task, contender).items():
        f = factors[name]
        inputs, outputs, size = f.a.shape[2], f.b.shape[1], f.a.itemsize
        moved += 4 * contender.experts * inputs + distinct * f.rank * (inputs + outputs) * size
        if task.task == "prefill":
            moved += task.tokens * (inputs + 2 * outputs) * size
            flops += 2 * task.tokens * inputs * contender.experts
            flops += 2 * task.tokens * TOP_K * f.rank * (inputs + outputs)
    return moved, flops


def base_bytes(task: "Prefill | Decode", base: nn.Module) -> int:
    """Weights of all linear layers, and keys and values of the context."""
    size, config = base.dtype.itemsize, base.config
    heads = config.num_key_value_heads * config.head_dim
    kept = 2 * task.batch * task.context * heads * config.num_hidden_layers
    return size * (kept + sum(i * o for i, o in linear_modules(base).values()))


# ---------------------------------------------------------------- report


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "shape": lambda r: r["shape"],
    "task": lambda r: r["task"],
    "batch": lambda r: str(r["batch"]),
    "tokens": lambda r: str(r["tokens"]),
    "mode": lambda r: r["mode"],
    "contender          ": lambda r: r["contender"],
    "experts": lambda r: str(r["experts"] or "-"),
    "p20 us": lambda r: f"{r['us']['p20']:.0f}" if "us" in r else "-",
    "p50 us": lambda r: f"{r['us']['p50']:.0f}" if "us" in r else "-",
    "p80 us": lambda r: f"{r['us']['p80']:.0f}" if "us" in r else "-",
    "tokens/s": lambda r: f"{r['tokens_per_s']:.0f}" if "us" in r else "-",
    "/base": lambda r: f"{r['over_base']:.2f}" if "us" in r else "-",
    "/floor": lambda r: f"{r['over_floor']:.2f}" if "over_floor" in r else "-",
    "note": lambda r: r.get("note", ""),
}


def bench(
    task: "Prefill | Decode",
    base: nn.Module,
    contenders: list[Contender],
    factors: dict[str, Factors],
    results: Results,
    args: argparse.Namespace,
) -> None:
    needs = {c.label: added(task, c, factors) for c in contenders if c.name.startswith("phatgoose")}
    bandwidth, rate = args.limits["copy_bytes_per_s"], args.limits["matmul_flops_per_s"]
    for mode, (runs, notes) in modes(task, contenders, args).items():
        times = common.measure(runs, args.device, seconds=args.seconds)
        for contender in contenders:
            label = contender.label
            moved, flops = needs.get(label, (0.0, 0.0))
            row: dict[str, Any] = {
                "shape": args.shape,
                "task": task.task,
                "batch": task.batch,
                "tokens": task.tokens,
                "context": task.context,
                "mode": mode,
                "contender": contender.name,
                "experts": contender.experts,
                "rank": RANK,
                "top_k": TOP_K,
                "stored_bytes": contender.stored,
                "bytes_floor_us": (base_bytes(task, base) + moved) / bandwidth * 1e6,
                **notes[label],
            }
            if label not in times:
                row.setdefault("note", "out of memory")
            else:
                middle, plain = times[label]["p50"], times["base"]["p50"]
                row |= {"us": times[label], "over_base": middle / plain}
                row["tokens_per_s"] = task.tokens / middle * 1e6
                if "lora" in times:
                    row["over_lora"] = middle / times["lora"]["p50"]
                if label in needs:
                    row["floor_us"] = plain + (moved / bandwidth + flops / rate) * 1e6
                    row["over_floor"] = middle / row["floor_us"]
            results.add(row)
    common.free_memory(args.device)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, help="default: 8b on a GPU, else tiny")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--arrow-experts", type=int, nargs="*", default=[8])
    parser.add_argument("--contenders", nargs="+", default=["lora", "phatgoose", "arrow"])
    parser.add_argument("--prefill", type=int, nargs="*", help="tokens (4096)")
    parser.add_argument("--batch", type=int, nargs="*", help="sequences that decode (1 and 32)")
    parser.add_argument("--context", type=int, help="tokens in the cache (512)")
    parser.add_argument("--modes", nargs="+", default=["eager", "graph"], help="also: compile")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    args = parser.parse_args(arguments)
    gpu = args.device == "cuda"
    args.shape = args.shape or ("8b" if gpu else "tiny")
    for name, large, small in (
        ("prefill", [4096], [64]),
        ("batch", [1, 32], [1, 4]),
        ("context", 512, 16),
    ):
        if getattr(args, name) is None:
            setattr(args, name, large if gpu else small)
    args.torch_dtype = torch.bfloat16 if gpu else torch.float32
    if not peers.has_peft():
        say("peft is not there: no rows for its LoRA and its Arrow")
        args.contenders = [c for c in args.contenders if c not in ("lora", "arrow")]
    return args


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", module="peft")
    args.limits = common.ceilings(args.device, args.torch_dtype)
    results = Results(
        args,
        "generate",
        "microseconds of one prefill or one decoding step",
        COLUMNS,
        dtype=str(args.torch_dtype).removeprefix("torch."),
        ceilings=args.limits,
        floors=FLOORS,
        model=SHAPES[args.shape],
    )
    with torch.no_grad():
        longest = max([*args.prefill, args.context + 8])
        base = make_base(args.shape, args.device, args.torch_dtype, longest)
        factors = make_factors(base, max([args.experts, *args.arrow_experts]), RANK)
        contenders = [Contender("base", 0, base, None, 0)]
        for name in args.contenders:
            for experts in {"lora": [1], "arrow": args.arrow_experts}.get(name, [args.experts]):
                contenders.append(make_contender(name, experts, base, factors, args.device))
        tasks: list[Callable[[], Prefill | Decode]] = [
            *(lambda n=n: Decode(base, n, args.context) for n in sorted(args.batch, reverse=True)),
            *(lambda n=n: Prefill(base, n) for n in args.prefill),
        ]
        for task in tasks:
            if results.spent():
                say("time is up: a task is left out")
                continue
            bench(task(), base, contenders, factors, results, args)
    return results.finish()


if __name__ == "__main__":
    main()
