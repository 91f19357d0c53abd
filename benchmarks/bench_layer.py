"""One linear layer: plain, with one LoRA, routed among many experts, and routed by others.

    python benchmarks/bench_layer.py [--size 4096x14336] [--tokens 32 4096] [--experts 36 166]
                                     [--contenders plain phatgoose r-three] [--out FILE]

All contenders have the same weights and run in one process, in turns. `phatgoose` is a layer that
`phatgoose.route` routes; `phatgoose/NAME` is the same with that backend. What the others are is
said in peers.py. Up to 256 tokens several copies of the layer run in sequence, so that no cache
holds their weights, and the time is divided by their number; there the sequence is also timed as
a CUDA graph.

With none of --tokens, --experts and --ranks, a selection of sensible rows; with any of them, every
combination of what is given (the others at all tokens; 36, 128, 166 and 1024 experts; rank 16).

Every routed output is compared with one computed in fp64 (`error`: relative, over tokens whose
choice of experts is no near tie). Arrow chooses other experts, so it has none. Where one computes
something else, its rows say "wrong" and the exit status is 1.
"""

import argparse
import copy
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import common
import peers
import phatgoose
from common import MIB, NotCapturableError, Results, say
from peers import Factors
from phatgoose.experts import Expert, GateRecord, Gates, LoraModule

TOKENS = (4096, 32, 1, 8, 256, 16384)
MAIN_EXPERTS = (166, 36, 128, 1024)
MORE_EXPERTS = (8, 512, 1)  # at 4096 tokens
RANK, MORE_RANKS = 16, (4, 64)  # the latter at 4096 tokens and 166 experts
FEW_TOKENS = 256
PEERS = ("arrow", "r-three", "mttl", "dense")
SAME_ROUTING = ("phatgoose", "r-three", "mttl", "dense")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
WRONG = "wrong"  # a note: what this computes is not the routed sum, so its time says nothing
NEAR_TIE = 1e-3  # of scores, whose standard deviation over experts is 1
FLOORS = {
    "few": "bytes / bandwidth; bytes: base weight, fp32 gates, factors of the distinct experts "
    "chosen, each read once",
    "many": "plain p50 + (2 T I E + 2 T K R (I + O)) / matmul rate + bytes / bandwidth; bytes: x "
    "read again, output read and written once, fp32 gates and factors of the distinct experts "
    "chosen read once",
}


# ---------------------------------------------------------------- layers and experts


class Holder(nn.Module):
    """A model of a few linear layers of one size, that do not follow one another."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for layer in layers:
            inner = nn.Module()
            inner.proj = layer
            self.layers.append(inner)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [inner.proj(x) for inner in self.layers]

    @property
    def names(self) -> list[str]:
        return [f"layers.{i}.proj" for i in range(len(self.layers))]

    def sharing(self) -> "Holder":
        """A second model with the same weights."""
        return copy.deepcopy(self, {id(p): p for p in self.parameters()})


@dataclass
class Setting:
    """Layers of one size with their experts."""

    inputs: int
    outputs: int
    experts: int
    rank: int
    top_k: int
    model: Holder
    factors: dict[str, Factors]

    @property
    def itemsize(self) -> int:
        return next(self.model.parameters()).itemsize


def make_layers(inputs: int, outputs: int, copies: int, device: str, dtype: torch.dtype) -> Holder:
    layers = []
    for _ in range(copies):
        layer = nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)
        layers.append(layer.requires_grad_(False))
    return Holder(layers).eval()


def make_factors(model: Holder, experts: int, rank: int) -> dict[str, Factors]:
    """Random experts whose outputs are about as large as the base's."""
    found = {}
    for name in model.names:
        weight = model.get_submodule(name).weight
        outputs, inputs = weight.shape
        like = {"device": weight.device, "dtype": weight.dtype}
        found[name] = Factors(
            gates=torch.randn(experts, inputs, device=weight.device),
            a=torch.randn(experts, rank, inputs, **like) / inputs**0.5,
            b=torch.randn(experts, outputs, rank, **like) / rank**0.5,
        )
    return found


def make_pool(factors: dict[str, Factors]) -> phatgoose.ExpertPool:
    """The same experts as phatgoose holds them."""
    pool = phatgoose.ExpertPool()
    record = GateRecord(base=None, adapter="")  # type: ignore[arg-type]  # of no base at all
    for i in range(len(next(iter(factors.values())))):
        modules = {name: LoraModule(f.a[i], f.b[i], 1.0) for name, f in factors.items()}
        gates = Gates({name: f.gates[i] for name, f in factors.items()}, record)
        pool.add(Expert(f"e{i}", modules, gates, base_name=None))
    return pool


# ---------------------------------------------------------------- contenders


@dataclass
class Contender:
    """A way to compute the layers: `call(x, i)` is the output of copy i."""

    name: str
    call: Callable[[Tensor, int], Tensor]
    stored: int  # bytes that it keeps beside the base's weights
    keep: Any = field(default=None, repr=False)

    def sequence(self, x: Tensor, copies: int) -> Callable[[], None]:
        def run() -> None:
            for i in range(copies):
                self.call(x, i)

        return run


def make_contender(name: str, setting: Setting, device: str) -> Contender:
    model, before = setting.model.sharing(), common.allocated(device)
    kept: Any = None
    if name == "lora":
        if peers.has_peft():
            model = peers.peft_lora(model, setting.factors).get_base_model()
        else:
            say("peft is not there: the one LoRA is a restatement")
            for layer, f in setting.factors.items():
                peers.attach(model.get_submodule(layer), peers.OneLora(f.a[0], f.b[0]))
    elif name == "arrow":
        kept = peers.peft_arrow(model, setting.factors, setting.top_k)
        model = kept.get_base_model()
    elif name.startswith("phatgoose"):
        kept = make_pool(setting.factors)
        route(model, kept, setting.top_k, backend=name.partition("/")[2])
    elif name != "plain":
        kind = {"r-three": peers.RThree, "mttl": peers.Mttl, "dense": peers.Dense}[name]
        for layer, f in setting.factors.items():
            peers.attach(model.get_submodule(layer), kind(f, setting.top_k))
    stored = common.allocated(device) - before
    if device != "cuda":
        stored = sum(buffer.nbytes for buffer in model.buffers())
    layers = [model.get_submodule(layer) for layer in setting.factors]
    return Contender(name, lambda x, i: layers[i](x), stored // len(layers), (model, kept))


def route(model: nn.Module, pool: phatgoose.ExpertPool, top_k: int, *, backend: str) -> None:
    options: dict[str, Any] = {}
    if "backend" in inspect.signature(phatgoose.route).parameters:
        options["backend"] = backend or "auto"
    elif backend:
        raise ValueError(f"this phatgoose has no backend {backend}")
    phatgoose.route(model, pool, top_k=top_k, **options)


def wanted(args: argparse.Namespace, tokens: int, experts: int) -> list[str]:
    """The contenders that run at this size: peers only where they end in time."""
    names = []
    for name in args.contenders:
        if name in PEERS and (experts > args.peer_experts or tokens not in args.peer_tokens):
            continue
        if name == "arrow" and not peers.has_peft():
            continue
        if name == "phatgoose/reference" and tokens > 4096:
            continue
        names.append(name)
    return names


# ---------------------------------------------------------------- measuring


def check(contender: Contender, x: Tensor, setting: Setting) -> dict[str, Any]:
    """Compare with the routed sum in fp64, and say so where it is something else."""
    factors = next(iter(setting.factors.values()))
    tokens = x.flatten(0, 1)
    wanted, gap = peers.exact(tokens, factors, setting.top_k)
    layer = setting.model.get_submodule(setting.model.names[0])
    wanted += (layer(x).flatten(0, 1)).double()
    found = contender.call(x, 0).flatten(0, 1).double()
    # How far each token is off tells those that took other experts from those rounded otherwise.
    each = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    clear = gap > NEAR_TIE
    error = ((found - wanted)[clear].norm() / wanted[clear].norm()).item()
    limit = TOLERANCE[x.dtype]
    other = (each > 10 * limit).float().mean().item()
    result: dict[str, Any] = {"error": error, "routed_otherwise": other}
    if not error < limit:
        say(f"{contender.name}: relative error {error:.1e}, at most {limit:.0e} is wanted")
        result["note"] = WRONG
    return result


def floor(
    plain: float, tokens: Tensor, setting: Setting, limits: dict[str, float], few: bool
) -> float:
    """Microseconds; see FLOORS."""
    experts, _ = peers.chosen(tokens, next(iter(setting.factors.values())), setting.top_k)
    both, size = setting.inputs + setting.outputs, setting.itemsize
    moved = 4 * setting.experts * setting.inputs
    moved += experts.unique().numel() * setting.rank * both * size
    if few:
        moved += setting.inputs * setting.outputs * size
        return moved / limits["copy_bytes_per_s"] * 1e6
    moved += len(tokens) * (setting.inputs + 2 * setting.outputs) * size
    flops = 2 * len(tokens) * setting.inputs * setting.experts
    flops += 2 * len(tokens) * setting.top_k * setting.rank * both
    seconds = moved / limits["copy_bytes_per_s"] + flops / limits["matmul_flops_per_s"]
    return plain + seconds * 1e6


def bench(
    args: argparse.Namespace,
    setting: Setting,
    contenders: dict[str, Contender],
    tokens: int,
    results: Results,
) -> None:
    """All rows of one setting and number of tokens."""
    few = tokens <= FEW_TOKENS
    copies = len(setting.factors) if few else 1
    x = torch.randn(1, tokens, setting.inputs, device=args.device, dtype=args.torch_dtype)
    notes: dict[str, dict[str, Any]] = {}
    runs = {}
    for name, contender in contenders.items():
        try:
            notes[name] = {"stored_bytes": contender.stored}
            if name.partition("/")[0] in SAME_ROUTING:
                notes[name] |= check(contender, x, setting)
            notes[name]["peak_bytes"] = common.peak(lambda c=contender: c.call(x, 0), args.device)
            runs[name] = contender.sequence(x, copies)
        except torch.OutOfMemoryError:
            notes[name]["note"] = "out of memory"
            runs.pop(name, None)
        common.free_memory(args.device)
    modes = {"eager": runs}
    if args.device == "cuda" and args.graph:
        modes["graph"] = {}
        for name, run in runs.items():
            try:
                modes["graph"][name] = common.capture(run)
            except NotCapturableError as error:
                say(f"{name}: no CUDA graph: {error}")
                notes[name]["graph"] = "not capturable"
    for mode, mine in modes.items():
        times = common.measure(mine, args.device, calls=copies, seconds=args.seconds)
        plain = times["plain"]["p50"]
        least = floor(plain, x.flatten(0, 1), setting, args.limits, few)
        for name in contenders:
            row = {
                "size": f"{setting.inputs}x{setting.outputs}",
                "tokens": tokens,
                "experts": setting.experts,
                "rank": setting.rank,
                "top_k": setting.top_k,
                "contender": name,
                "mode": mode,
                "copies": copies,
                **notes[name],
            }
            if name in times:
                row |= {"us": times[name], "over_plain": times[name]["p50"] / plain}
                if name not in ("plain", "lora"):
                    row |= {"floor_us": least, "over_floor": times[name]["p50"] / least}
                    row["extra_bytes"] = row["peak_bytes"] - notes["plain"]["peak_bytes"]
            elif mode == "graph" and "note" not in row:
                row["note"] = "not capturable"
            results.add(row)


def settings(args: argparse.Namespace) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """(experts, rank, tokens) of what is to be measured, the most telling first."""
    if args.tokens or args.experts or args.ranks:
        for rank in args.ranks or (RANK,):
            for experts in args.experts or MAIN_EXPERTS:
                yield experts, rank, tuple(args.tokens or TOKENS)
        return
    if args.device == "cpu":
        yield from ((experts, RANK, (1024,)) for experts in (36, 8, 166))
        return
    yield from ((experts, RANK, TOKENS) for experts in MAIN_EXPERTS)
    yield from ((experts, RANK, (4096,)) for experts in MORE_EXPERTS)
    yield from ((166, rank, (4096,)) for rank in MORE_RANKS)


def copies_for(size: str, args: argparse.Namespace) -> int:
    """So many layers of this size that the L2 cache holds little of them."""
    if args.device == "cpu":
        return 1
    if args.copies:
        return args.copies
    inputs, outputs = sizes(size)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    each = inputs * outputs * args.torch_dtype.itemsize
    return min(8, max(2, -(-4 * cache // each)))


def sizes(size: str) -> tuple[int, int]:
    inputs, _, outputs = size.partition("x")
    return int(inputs), int(outputs)


# ---------------------------------------------------------------- report


def _ratio(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.2f}" if key in row else "-"


def _time(row: dict[str, Any], key: str) -> str:
    return f"{row['us'][key]:.1f}" if "us" in row else "-"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "size": lambda r: r["size"],
    "tokens": lambda r: str(r["tokens"]),
    "experts": lambda r: str(r["experts"]),
    "rank": lambda r: str(r["rank"]),
    "contender          ": lambda r: r["contender"],
    "mode": lambda r: r["mode"],
    "p20 us": lambda r: _time(r, "p20"),
    "p50 us": lambda r: _time(r, "p50"),
    "p80 us": lambda r: _time(r, "p80"),
    "/plain": lambda r: _ratio(r, "over_plain"),
    "/floor": lambda r: _ratio(r, "over_floor"),
    "extra MiB": lambda r: f"{r['extra_bytes'] / MIB:.1f}" if "extra_bytes" in r else "-",
    "error": lambda r: f"{r['error']:.1e}" if "error" in r else "-",
    "note": lambda r: r.get("note", ""),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--size", nargs="+", metavar="IxO", help="sizes of the layer")
    parser.add_argument("--dtype", choices=common.DTYPES, help="bfloat16 on a GPU, else float32")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--experts", type=int, nargs="+")
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=["lora", "phatgoose", "phatgoose/torch", "arrow", "r-three", "mttl"],
        help=f"lora, phatgoose, phatgoose/BACKEND, {', '.join(PEERS)}; plain always runs",
    )
    parser.add_argument(
        "--peer-experts", type=int, default=166, help="the most experts at which peers run"
    )
    parser.add_argument(
        "--peer-tokens", type=int, nargs="+", help="numbers of tokens at which peers run"
    )
    parser.add_argument("--seconds", type=float, default=0.3, help="of each measurement")
    parser.add_argument("--copies", type=int, help="layers in sequence, up to 256 tokens")
    parser.add_argument("--no-graph", dest="graph", action="store_false")
    args = parser.parse_args(arguments)
    gpu = args.device == "cuda"
    args.dtype = args.dtype or ("bfloat16" if gpu else "float32")
    args.torch_dtype = common.DTYPES[args.dtype]
    args.size = args.size or (["4096x4096", "4096x14336"] if gpu else ["512x512", "2048x2048"])
    args.peer_tokens = args.peer_tokens or ((32, 4096) if gpu else args.tokens or (1024,))
    args.contenders = ["plain", *(c for c in args.contenders if c != "plain")]
    if "backend" not in inspect.signature(phatgoose.route).parameters:
        args.contenders = [c for c in args.contenders if "/" not in c]
    if not peers.has_peft():
        say("peft is not there: no rows for its Arrow")
    return args


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", module="peft")
    args.limits = common.ceilings(args.device, args.torch_dtype)
    results = Results(
        args,
        "layer",
        "microseconds",
        COLUMNS,
        dtype=args.dtype,
        ceilings=args.limits,
        floors=FLOORS,
        extra="peak_bytes: held at most during a forward, above weights, experts and input, with "
        "the output; extra_bytes: less the plain layer's",
    )
    with torch.no_grad():
        for size in args.size:
            model = make_layers(*sizes(size), copies_for(size, args), args.device, args.torch_dtype)
            for experts, rank, all_tokens in settings(args):
                if results.spent():
                    say(f"time is up: {size}, {experts} experts and rank {rank} are left out")
                    continue
                bench_setting(args, model, size, experts, rank, all_tokens, results)
    return results.finish()


def bench_setting(
    args: argparse.Namespace,
    model: Holder,
    size: str,
    experts: int,
    rank: int,
    all_tokens: tuple[int, ...],
    results: Results,
) -> None:
    """All rows of one size, number of experts and rank."""
    top_k = min(args.top_k, experts)
    factors = make_factors(model, experts, rank)
    setting = Setting(*sizes(size), experts, rank, top_k, model, factors)
    contenders: dict[str, Contender] = {}
    for tokens in all_tokens:
        names = wanted(args, tokens, experts)
        for name in names:
            if name not in contenders:
                contenders[name] = make_contender(name, setting, args.device)
        bench(args, setting, {name: contenders[name] for name in names}, tokens, results)
        common.free_memory(args.device)
    contenders.clear()
    common.free_memory(args.device)


if __name__ == "__main__":
    sys.exit(any(row.get("note") == WRONG for row in main()["rows"]))
