"""Serving: vLLM with the bare base, with one ordinary LoRA, and with a pool routed token by token.

    python benchmarks/bench_serving.py --shape 8b [--experts 128] [--out FILE]
    python benchmarks/bench_serving.py --table FILE

One server after the other, on the same machine and with the same options, under the load of vLLM's
own serving benchmark: random prompts of one length, answers of one length, so many requests at a
time. With --gpus 1 2 each is measured on one GPU and again over two, tensor parallel. With
--together all servers start at once and idle until their turn: each on GPUs of its own, or with
--share wherever there is room, which --more has to see to (--gpu-memory-utilization 0.05
--kv-cache-memory-bytes 7G). Prefix caching is off. The base is a Llama with the sizes of Llama 3
8B and vLLM's dummy weights; the LoRA, and each expert, adapts every linear layer but the head at
rank 16, and two experts serve every token at every layer.

Experts share one file of random LoRA factors, which is loaded into a slot of its own for each;
their gates differ. Answers are sampled at temperature 1, which with such weights means any token,
so that the requests of a batch do not come to say the same, and to choose the same experts.

"phatgoose" is `phatgoose serve` as it comes, with shares of the experts recorded; "phatgoose-quiet"
(on demand) does not record them. --more is for vLLM's options, the same for all, as in
--more="--max-num-seqs 64"; --table prints the Markdown of an earlier run's file. --profile loads
servers once more afterwards, all or those it names, and says what GPU kernels decoding and prompts
spend their time in; of several numbers of GPUs, with the first.
"""

import argparse
import bisect
import contextlib
import dataclasses
import gzip
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import common
from bench_generate import RANK, SHAPES, TOP_K
from common import Results, say
from phatgoose.experts import Expert, Gates, LoraModule, identify_base, linear_modules, save_expert
from phatgoose.experts.lora import CONFIG_FILE, WEIGHTS_FILE, adapter_hash
from phatgoose.experts.signatures import GateRecord
from phatgoose.serve.http.recent import EVERY

LOCAL = {  # vLLM's attention on a CPU wants larger heads than other benchmarks' tiny model has
    **SHAPES,
    "tiny": {**SHAPES["tiny"], "hidden_size": 128, "head_dim": 32, "vocab_size": 512},
}
CONTENDERS = ("base", "lora", "phatgoose", "phatgoose-quiet")
TARGETS = (  # what, of which measure, against whom, and the bound
    ("output tokens/s over one LoRA's", "output_tokens_per_s", "lora", ">=", 1.0),
    ("output tokens/s over the bare base's", "output_tokens_per_s", "base", ">=", 0.7),
    ("median time to first token over the bare base's", "ttft_median_ms", "base", "<=", 1.3),
    ("median time to first token over one LoRA's", "ttft_median_ms", "lora", "<=", 1.3),
)
# vLLM's command line for it also imports what this needs not. It waits for a line before it begins.
CLIENT = (
    "import argparse, sys; from vllm.benchmarks import serve; parser = argparse.ArgumentParser(); "
    "serve.add_cli_args(parser); sys.stdin.readline(); serve.main(parser.parse_args())"
)

PROFILED = {  # the prompts of one wave of requests, and steps of decoding after them
    "profiler": "torch",
    "ignore_frontend": True,
    "torch_profiler_with_stack": False,
    "torch_profiler_dump_cuda_time_total": False,
    "max_iterations": 32,
}
STEP = re.compile(r"execute_context_\d+\((\d+)\)_generation_\d+\((\d+)\)")  # tokens of either
SHOWN = 12  # kernels of a contender in the table

# ---------------------------------------------------------------- models


def make_base(folder: Path, shape: str, length: int) -> LlamaForCausalLM:
    """A model's folder without weights; returns its skeleton.

    Every token is one word, so a prompt that is made of tokens is as long once it was text.
    """
    config = LlamaConfig(
        **LOCAL[shape], max_position_embeddings=max(8192, length), bos_token_id=None, eos_token_id=0
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    words = {f"t{number}": number for number in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t0").save_pretrained(folder)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def make_experts(folder: Path, base: LlamaForCausalLM, count: int, dtype: torch.dtype) -> None:
    """Folders 0, 1, ... in `folder`, of which all but the first link to its factors."""
    sizes = {n: size for n, size in linear_modules(base).items() if n != "lm_head"}
    factors = {
        name: LoraModule(
            torch.randn(RANK, inputs, dtype=dtype) * inputs**-0.5,
            torch.randn(outputs, RANK, dtype=dtype) * 0.01,
            1.0,
        )
        for name, (inputs, outputs) in sizes.items()
    }
    record = GateRecord(identify_base(base, name="random"), adapter_hash(factors))
    first = folder / "0"
    for number in range(count):
        gates = Gates({name: torch.randn(inputs) for name, (inputs, _) in sizes.items()}, record)
        if number == 0:
            save_expert(Expert("0", factors, gates, "random"), first, task_type="CAUSAL_LM")
            continue
        mine = folder / str(number)
        mine.mkdir()
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            (mine / file).symlink_to(first / file)
        gates.write(mine)


# ---------------------------------------------------------------- servers


@dataclasses.dataclass(frozen=True)
class Contender:
    """A kind of server, and over how many GPUs it is spread."""

    name: str
    gpus: int

    @property
    def key(self) -> str:
        """Names its files."""
        return self.name if self.gpus == 1 else f"{self.name}-{self.gpus}"


def server_words(
    one: Contender, base: Path, experts: Path, folder: Path, args: argparse.Namespace
) -> list[str]:
    """The command of a contender's server, without port."""
    name = one.name
    profiler = {**PROFILED, "torch_profiler_dir": str(folder / f"{one.key}-trace")}
    vllm = [
        *("--dtype", args.dtype, "--max-model-len", str(args.length), "--no-enable-prefix-caching"),
        *(
            "--served-model-name",
            "served",
            *(["--enforce-eager"] if args.eager else []),
            *(["--tensor-parallel-size", str(one.gpus)] if one.gpus > 1 else []),
            *(["--profiler-config", json.dumps(profiler)] if profiles(one, args) else []),
            *args.more,
        ),
    ]
    if name.startswith("phatgoose"):
        ours = {"base_load_format": "dummy", "routing": name == "phatgoose"}
        return [
            *("-m", "phatgoose.cli", "serve", "--base", str(base), "--experts", str(experts)),
            *("--top-k", str(TOP_K), "--additional-config", json.dumps({"phatgoose": ours})),
            *vllm,
        ]
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    words += ["--host", "127.0.0.1", "--load-format", "dummy", *vllm]
    if name == "lora":
        words += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(RANK)]
        words += ["--lora-modules", f"adapter={experts / '0'}"]
    return words


def profiles(one: Contender, args: argparse.Namespace) -> bool:
    return one.name in args.profile and one.gpus == args.gpus[0]


def places(contenders: Sequence[Contender], gpus: int) -> dict[Contender, str]:
    """Which GPUs each of those that run beside each other gets, as CUDA_VISIBLE_DEVICES.

    Where they share GPUs, a pool weighs as much as two others.
    """
    taken = [0] * gpus
    found = {}
    for one in sorted(contenders, key=lambda one: (-one.gpus, not one.name.startswith("phat"))):
        mine = sorted(range(gpus), key=lambda gpu: taken[gpu])[: one.gpus]
        for gpu in mine:
            taken[gpu] += 2 if one.name.startswith("phat") else 1
        found[one] = ",".join(map(str, sorted(mine)))
    return found


@dataclasses.dataclass
class Server:
    process: subprocess.Popen[bytes]
    url: str
    log: Path
    begun: float = dataclasses.field(default_factory=time.monotonic)
    start_s: float | None = None

    def wait(self, seconds: float) -> float:
        """The seconds its start took. Raises RuntimeError after so many, or if it has ended."""
        while self.start_s is None and not _is_up(self.url):
            if self.process.poll() is not None or time.monotonic() > self.begun + seconds:
                raise RuntimeError(f"no server\n{self.log.read_text()[-6000:]}")
            time.sleep(0.3)
        self.start_s = self.start_s or round(time.monotonic() - self.begun, 1)
        return self.start_s


@contextlib.contextmanager
def server(words: Sequence[str], log: Path, gpus: str | None) -> Iterator[Server]:
    """A server that is starting, on these GPUs of those there are if some are named."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    on = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *words, "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **on},
        )
    try:
        yield Server(process, f"http://127.0.0.1:{port}", log)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            say("the server does not end by itself")
        with contextlib.suppress(ProcessLookupError):  # the engine's processes are in its group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_up(url: str) -> bool:
    try:
        return _get(f"{url}/health") is not None
    except OSError:
        return False


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        body: bytes = answer.read()
    return body


# ---------------------------------------------------------------- load


def client_words(
    key: str, url: str, base: Path, folder: Path, args: argparse.Namespace
) -> list[str]:
    """The command of vLLM's own serving benchmark."""
    served = "adapter" if key.startswith("lora") else "served"
    flags: dict[str, Any] = {
        "--base-url": url,
        "--model": served,
        "--tokenizer": base,
        "--dataset-name": "random",
        "--random-input-len": args.input_len,
        "--random-output-len": args.output_len,
        "--num-prompts": args.requests,
        "--max-concurrency": args.concurrency,
        "--num-warmups": args.concurrency,
        "--temperature": 1,
        "--result-dir": folder,
        "--result-filename": f"{key}.json",
    }
    words = [str(word) for pair in flags.items() for word in pair]
    return ["-c", CLIENT, *words, "--ignore-eos", "--save-result", "--disable-tqdm"]


@dataclasses.dataclass
class Client:
    """vLLM's own serving benchmark, which has been imported while its server starts."""

    process: subprocess.Popen[str]
    out: Path  # what it says

    def run(self, args: argparse.Namespace) -> None:
        """Raises RuntimeError with what it said if it fails."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.close()
        if self.process.wait(args.load_seconds):
            raise RuntimeError(f"the load failed\n{self.out.read_text()[-6000:]}")


@contextlib.contextmanager
def client(words: Sequence[str], out: Path) -> Iterator[Client]:
    with out.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        yield Client(process, out)
    finally:
        process.kill()
        process.wait()


def row_of(found: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What is kept of the benchmark's own JSON. Raises RuntimeError where requests failed."""
    tokens = args.requests * args.output_len
    if found["completed"] != args.requests or found["total_output_tokens"] != tokens:
        raise RuntimeError(
            f"{found['completed']} of {args.requests} requests were answered, with "
            f"{found['total_output_tokens']} tokens of {tokens}"
        )
    kept = {
        f"{measure}_{point}_ms": found[f"{point}_{measure}_ms"]
        for measure in ("ttft", "tpot", "itl")
        for point in ("median", "p99")
    }
    return {
        "output_tokens_per_s": found["output_throughput"],
        "total_tokens_per_s": found["total_token_throughput"],
        "duration_s": found["duration"],
        "input_tokens": found["total_input_tokens"],
        **kept,
    }


@dataclasses.dataclass
class Run:
    """A contender's server, and who loads it."""

    one: Contender
    server: Server
    loads: Client
    profiled: Client | None


@contextlib.contextmanager
def begun(
    one: Contender, base: Path, experts: Path, folder: Path, gpus: str | None, args: Any
) -> Iterator[Run]:
    """A contender's server and clients, which are starting."""
    with contextlib.ExitStack() as until_end:
        words = server_words(one, base, experts, folder, args)
        served = until_end.enter_context(server(words, folder / f"{one.key}.log", gpus))

        def begin(key: str, *more: str) -> Client:
            words = [*client_words(key, served.url, base, folder, args), *more]
            return until_end.enter_context(client(words, folder / f"{key}-load.log"))

        profiled = None
        if profiles(one, args):
            wave = ("--profile", "--num-prompts", str(args.concurrency))
            profiled = begin(f"{one.key}-profiled", *wave)
        yield Run(one, served, begin(one.key), profiled)


def load(run: Run, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A contender's row."""
    run.loads.run(args)
    row = row_of(json.loads((folder / f"{run.one.key}.json").read_text()), args)
    if run.one.name == "phatgoose":
        time.sleep(EVERY + 1)  # until the server has counted the last answers
        row |= spread_of(json.loads(_get(f"{run.server.url}/v1/experts")))
    return row


def profile(run: Run, folder: Path, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The kernels of a contender's steps, in a load of its own; see `kernels_of`."""
    assert run.profiled is not None
    run.profiled.run(args)
    return kernels_of(folder / f"{run.one.key}-trace")


def kernels_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The GPU kernels of the newest trace in `folder`, by their time; first any of them together.

    "kernels" are those of a step of decoding, "prompt_kernels" those of 1,000 tokens of prompts,
    both of the steps with most tokens of their kind. A kernel belongs to the last run of the model
    that vLLM had noted when it was launched. Raises RuntimeError without trace or steps.
    """
    traces = sorted(folder.glob("*.pt.trace.json.gz"), key=lambda file: file.stat().st_mtime)
    if not traces:
        raise RuntimeError(f"{folder}: no trace; did the load run for enough steps?")
    with gzip.open(traces[-1], "rt") as file:
        events = json.load(file)["traceEvents"]
    notes = [(e["ts"], STEP.match(e["name"])) for e in events if e.get("cat") == "user_annotation"]
    steps = sorted((ts, int(step[1]), int(step[2])) for ts, step in notes if step)
    if not steps:
        raise RuntimeError(f"{traces[-1]}: no step of the model in it")
    most_prompt, most_decoded = (max(step[kind] for step in steps) for kind in (1, 2))

    def phase_of(step: tuple[float, int, int]) -> str | None:
        _, prompt, decoded = step
        if prompt:
            return "prompt_kernels" if 2 * prompt >= most_prompt else None
        return "kernels" if 2 * decoded >= most_decoded else None

    launches = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e["args"]
    }
    ran: dict[str | None, list[dict[str, Any]]] = {"kernels": [], "prompt_kernels": [], None: []}
    for event in events:
        if event.get("cat") == "kernel" and event["args"]["correlation"] in launches:
            launched = launches[event["args"]["correlation"]]
            place = bisect.bisect_right(steps, launched, key=lambda step: step[0]) - 1
            ran[phase_of(steps[place]) if place >= 0 else None].append(event)
    tokens = sum(sum(step[1:]) for step in steps if phase_of(step) == "prompt_kernels")
    decoding = sum(phase_of(step) == "kernels" for step in steps)
    return {
        "kernels": _by_time(ran["kernels"], decoding),
        "prompt_kernels": _by_time(ran["prompt_kernels"], tokens / 1000),
    }


def _by_time(ran: list[dict[str, Any]], units: float) -> list[dict[str, Any]]:
    us, calls, busy, until = Counter[str](), Counter[str](), 0.0, -math.inf
    for event in sorted(ran, key=lambda event: event["ts"]):
        us[event["name"]] += event["dur"]
        calls[event["name"]] += 1
        end = event["ts"] + event["dur"]
        busy += max(0.0, end - max(until, event["ts"]))  # some run beside each other
        until = max(until, end)
    found = [("any of them", busy), *us.most_common()]
    calls["any of them"] = len(ran)
    return [
        {"kernel": name, "us": time_us / units, "calls": calls[name] / units}
        for name, time_us in found
        if units
    ]


def spread_of(pool: dict[str, Any]) -> dict[str, Any]:
    """How evenly the experts of `GET /v1/experts` were chosen."""
    shares = [expert["share"] for expert in pool["data"]]
    return {
        "experts_used": sum(share > 0 for share in shares),
        "largest_share": max(shares),
        "entropy": pool["entropy"],
    }


# ---------------------------------------------------------------- report


COLUMNS = {
    "contender      ": lambda r: r["contender"],
    "GPUs": lambda r: str(r.get("gpus", 1)),
    "experts": lambda r: str(r["experts"] or "-"),
    "output tokens/s": lambda r: _number(r, "output_tokens_per_s", 0),
    "/base": lambda r: _number(r, "over_base", 2),
    "/lora": lambda r: _number(r, "over_lora", 2),
    "TTFT median ms": lambda r: _number(r, "ttft_median_ms", 1),
    "p99 ms": lambda r: _number(r, "ttft_p99_ms", 1),
    "TPOT median ms": lambda r: _number(r, "tpot_median_ms", 2),
    "TPOT p99 ms": lambda r: _number(r, "tpot_p99_ms", 2),
    "start s": lambda r: _number(r, "start_s", 0),
    "note": lambda r: r.get("note", ""),
}


def _number(row: dict[str, Any], key: str, digits: int) -> str:
    return f"{row[key]:.{digits}f}" if key in row else "-"


def over(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Output tokens/s over those of the base and of the LoRA on as many GPUs, if measured."""
    measured = {
        r["contender"]: r["output_tokens_per_s"]
        for r in rows
        if "output_tokens_per_s" in r and r.get("gpus", 1) == row.get("gpus", 1)
    }
    return {
        f"over_{name}": row["output_tokens_per_s"] / measured[name]
        for name in ("base", "lora")
        if name in measured
    }


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every target, what was measured (None: it was not), and whether it is met.

    Each by as many GPUs as there are rows of.
    """
    found = []
    for gpus in sorted({row.get("gpus", 1) for row in rows}):
        by_name = {row["contender"]: row for row in rows if row.get("gpus", 1) == gpus}
        for what, key, rival, sign, bound in TARGETS:
            ours, theirs = (by_name.get(name, {}).get(key) for name in ("phatgoose", rival))
            ratio = ours / theirs if ours and theirs else None
            met = None if ratio is None else (ratio >= bound if sign == ">=" else ratio <= bound)
            wanted = f"{sign} {bound}"
            found.append(
                {"target": what, "gpus": gpus, "wanted": wanted, "measured": ratio, "met": met}
            )
    return found


def markdown(value: dict[str, Any]) -> str:
    """The table and the targets of a run, for a page."""
    lines = [
        f"`{value['command']}`",
        f"on {value['device']}, {value['dtype']}, vLLM {value['vllm']}, torch {value['torch']}: "
        f"{value['requests']} requests, {value['concurrency']} at a time, "
        f"{value['input_len']} tokens in and {value['output_len']} out.",
        "",
        "| " + " | ".join(title.strip() for title in COLUMNS) + " |",
        "| --- |" + " ---: |" * (len(COLUMNS) - 1),
        *(
            "| " + " | ".join(show(row) for show in COLUMNS.values()) + " |"
            for row in value["rows"]
        ),
        "",
        "| target | GPUs | wanted | measured | verdict |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    says = {None: "not measured", True: "met", False: "**missed**"}
    for one in verdicts(value["rows"]):
        measured = "-" if one["measured"] is None else f"{one['measured']:.2f}"
        lines.append(
            f"| {one['target']} | {one['gpus']} | {one['wanted']} | {measured} | "
            f"{says[one['met']]} |"
        )
    for key, what in (("kernels", "a step of decoding"), ("prompt_kernels", "1,000 prompt tokens")):
        profiled = [row for row in value["rows"] if row.get(key)]
        if profiled:
            lines += ["", f"| contender | kernel, in {what} | us | calls |"]
            lines += ["| --- | --- | ---: | ---: |"]
        for row in profiled:
            lines += [
                f"| {row['contender']} | `{k['kernel'][:60]}` | {k['us']:.0f} | {k['calls']:.1f} |"
                for k in row[key][:SHOWN]
            ]
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--shape", choices=LOCAL, help="default: 8b on a GPU, else tiny")
    parser.add_argument("--experts", type=int, help="128, or 6 on a CPU")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS[:3])
    parser.add_argument("--requests", type=int, help="256, or 12 on a CPU")
    parser.add_argument("--concurrency", type=int, help="64, or 4 on a CPU")
    parser.add_argument("--input-len", type=int, help="tokens (512, or 24 on a CPU)")
    parser.add_argument("--output-len", type=int, help="tokens (256, or 8 on a CPU)")
    parser.add_argument(
        "--gpus", nargs="+", type=int, default=[1], help="GPUs of a server, one number or several"
    )
    parser.add_argument("--together", action="store_true", help="start all at once, on own GPUs")
    parser.add_argument("--share", action="store_true", help="start all at once, on shared GPUs")
    parser.add_argument("--eager", action="store_true", help="neither compile nor capture graphs")
    parser.add_argument(
        "--profile", nargs="*", choices=CONTENDERS, help="also say what kernels take, of these"
    )
    parser.add_argument("--more", type=shlex.split, default=[], help="further options of vLLM's")
    parser.add_argument("--start-seconds", type=float, default=300, help="that a server may take")
    parser.add_argument("--load-seconds", type=float, default=300, help="that the load may take")
    parser.add_argument("--folder", type=Path, help="keep models, logs and raw results here")
    parser.add_argument("--table", type=Path, help="print the Markdown of this file and end")
    args = parser.parse_args(arguments)
    gpu = args.device == "cuda"
    args.shape = args.shape or ("8b" if gpu else "tiny")
    args.dtype = "bfloat16" if gpu else "float32"
    args.profile = list(args.contenders) if args.profile == [] else args.profile or []
    for name, large, small in (
        ("experts", 128, 6),
        ("requests", 256, 12),
        ("concurrency", 64, 4),
        ("input_len", 512, 24),
        ("output_len", 256, 8),
    ):
        if getattr(args, name) is None:
            setattr(args, name, large if gpu else small)
    # vLLM takes a text for too long by its characters, and the spaces between words are none of a
    # token's: hence twice the input.
    args.length = 2 * args.input_len + args.output_len
    there = torch.cuda.device_count() if gpu else max(args.gpus)  # workers on a CPU share it
    wanted = sum(args.gpus) * len(args.contenders) if args.together and not args.share else 0
    if gpu and there < max(wanted, *args.gpus):
        parser.error(f"that wants {max(wanted, *args.gpus)} GPUs, and there are {there}")
    args.together = args.together or args.share
    args.there = there
    return args


def bench(folder: Path, results: Results, args: argparse.Namespace) -> None:
    begin = time.perf_counter()
    base, experts = folder / "base", folder / "experts"
    make_experts(
        experts, make_base(base, args.shape, args.length), args.experts, common.DTYPES[args.dtype]
    )
    say(f"{args.experts} experts: made in {time.perf_counter() - begin:.1f} s")

    contenders = [Contender(name, gpus) for gpus in args.gpus for name in args.contenders]
    where = places(contenders, args.there) if args.together and args.device == "cuda" else {}

    def start(one: Contender) -> contextlib.AbstractContextManager[Run]:
        return begun(one, base, experts, folder, where.get(one), args)

    with contextlib.ExitStack() as until_end:
        runs: dict[Contender, Run] = {}
        if args.together:
            for one in contenders:
                runs[one] = until_end.enter_context(start(one))
            with ThreadPoolExecutor() as threads:  # no load while another still compiles
                waits = [threads.submit(r.server.wait, args.start_seconds) for r in runs.values()]
            say(f"started: {sum(wait.exception() is None for wait in waits)} of {len(waits)}")
        for one in contenders:
            if results.spent():
                say(f"time is up: {one.key} is left out")
                continue
            count = {"base": 0, "lora": 1}.get(one.name, args.experts)
            row: dict[str, Any] = {"contender": one.name, "gpus": one.gpus, "experts": count}
            try:
                with contextlib.nullcontext(runs[one]) if runs else start(one) as run:
                    row["start_s"] = run.server.wait(args.start_seconds)
                    say(f"{one.key}: started in {row['start_s']} s")
                    row |= load(run, folder, args)
                    row |= over(row, [*results.rows, row])
                    results.add(row)
                    if run.profiled is not None and not args.together:
                        row |= profile(run, folder, args)
            except (RuntimeError, subprocess.TimeoutExpired) as error:  # the others go on
                say(f"{one.key}: {error}")
                row["note"] = str(error).splitlines()[0]
                if "output_tokens_per_s" not in row:
                    results.add(row)
            results.save()
        for row in results.rows:  # those that run beside each other: first all loads
            run = runs.get(Contender(row["contender"], row["gpus"]))
            if run and run.profiled and "note" not in row and not results.spent():
                try:
                    row |= profile(run, folder, args)
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    say(f"{run.one.key}: {error}")
                    row["note"] = str(error).splitlines()[0]
                results.save()
    for row in results.rows:  # whoever came before its rivals
        if "output_tokens_per_s" in row:
            row |= over(row, results.rows)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    if args.table:
        value: dict[str, Any] = json.loads(args.table.read_text())
        print(markdown(value))
        return value
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the server
    torch.manual_seed(0)
    results = Results(
        args,
        "serving",
        "output tokens per second of a server, and milliseconds of its answers",
        COLUMNS,
        vllm=vllm_version(),
        dtype=args.dtype,
        model=LOCAL[args.shape],
        rank=RANK,
        top_k=TOP_K,
        **{
            key: getattr(args, key)
            for key in ("requests", "concurrency", "input_len", "output_len")
        },
        **{key: getattr(args, key) for key in ("gpus", "eager", "together", "share", "more")},
        profile=args.profile,
    )
    with contextlib.ExitStack() as kept:
        where = args.folder or Path(kept.enter_context(tempfile.TemporaryDirectory(dir=_shared())))
        where.mkdir(parents=True, exist_ok=True)
        bench(where, results, args)
    results.head["targets"] = verdicts(results.rows)
    return results.finish()


def vllm_version() -> str:
    """Raises ModuleNotFoundError without vLLM."""
    from vllm.version import __version__  # its distribution has another name on CPUs

    version: str = __version__
    return version


def _shared() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    main()
