"""Does a pool that vLLM serves on several GPUs answer as on one, and as `phatgoose.route` does?

    python benchmarks/check_ranks.py [--shapes wide deep] [--ranks 1 2] [--out FILE]

Each shape is a Llama with random weights, and each of its random experts adapts every linear layer
but the head. "wide" has two layers of Llama 3 8B's widths; "deep" is SmolLM2's 30 layers with 8
heads in place of its 9, which two GPUs could not share; "tiny" is for CPUs.

In float32 the engines answer greedily, in batches whose neighbours choose differently: all experts,
the bare base, one expert, all but two. Then an expert joins while answers are under way, and leaves
again. Wanted are the tokens of `route` on transformers (backend "reference"), and log-probabilities
within 1e-4 of its own. A prompt counts if no score, nor any token's logit, of its right answer is
nearer to a tie than 1e-5; the others are counted apart.

In bfloat16 a near-tie is never far, so all experts serve every token there, and the engines read
the prompts' tokens rather than write their own. On average the log-probabilities on all ranks
should be no further from those on one rank than three times what they are for the bare base.

Engines are vLLM's, compiled and with CUDA graphs where there are any. They start side by side and
share the GPUs. On a GPU set TRITON_F32_DEFAULT=ieee, or Triton's attention rounds to TF32.
The exit status is 1 where anything is off.
"""

import argparse
import asyncio
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import common
from bench_generate import RANK
from common import Results, say
from phatgoose import ExpertPool, route, unroute
from phatgoose.experts import (
    Expert,
    Gates,
    LoraModule,
    identify_base,
    linear_modules,
    load_expert,
    save_expert,
)
from phatgoose.experts.lora import adapter_hash
from phatgoose.experts.signatures import GateRecord
from phatgoose.files import write_json
from phatgoose.ops.scoring import EPS, gate_scores
from phatgoose.serve.pool.choice import Request

SHAPES: dict[str, dict[str, Any]] = {
    "wide": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 2048,
    },
    "deep": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 2048,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 128,
    },
}
LENGTHS = {  # of the prompts; many layers make many near-ties, so few tokens
    "wide": (1, 7, 33, 90, 150, 260, 12, 48, 64, 20),
    "deep": (1, 4, 7, 9, 12, 16, 20, 24, 5, 14),
    "tiny": (1, 7, 33, 90, 150),
}
EXPERTS, TOP_K, TOKENS = 8, 2, 8
LATE = f"e{EXPERTS}"  # the expert that joins
NEAR_TIE = 1e-5
LOGPROB = 1e-4  # float32
TIMES_BASE = 3.0  # bfloat16: the mean distance of log-probabilities, over the bare base's
CHOICES: dict[str, dict[str, Any]] = {
    "all": {},
    "base": {"base": True},
    "one": {"allow": ["e3"]},
    "some": {"deny": ["e0", "e4"]},
}
POOLS: dict[str, list[str]] = {
    "all": [f"e{n}" for n in range(EXPERTS)],
    "base": [],
    "one": ["e3"],
    "some": [f"e{n}" for n in range(EXPERTS) if n not in (0, 4)],
    "late": [f"e{n}" for n in range(EXPERTS + 1)],
}
BUDGET = 64  # tokens of a forward: longer prompts go in chunks
Answer = dict[str, Any]

# ---------------------------------------------------------------- models and right answers


def make(folder: Path, shape: str, device: str) -> LlamaForCausalLM:
    """A base with its experts, saved; returns the base."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device(device):
        base = LlamaForCausalLM(config).eval().requires_grad_(False)
    base.save_pretrained(folder / "base")
    sizes = {n: size for n, size in linear_modules(base).items() if n != "lm_head"}
    identity = identify_base(base, name="random")
    for name in POOLS["late"]:
        factors = {
            module: LoraModule(
                torch.randn(RANK, inputs) * inputs**-0.5,
                torch.randn(outputs, RANK) * 0.3 * RANK**-0.5,
                1.0,
            )
            for module, (inputs, outputs) in sizes.items()
        }
        gates = {module: torch.randn(inputs) for module, (inputs, _) in sizes.items()}
        record = GateRecord(identity, adapter_hash(factors))
        where = folder / ("late" if name == LATE else "experts") / name
        save_expert(
            Expert(name, factors, Gates(gates, record), "random"), where, task_type="CAUSAL_LM"
        )
    return base


def folder_of(folder: Path, name: str) -> Path:
    return folder / ("late" if name == LATE else "experts") / name


def prompts_of(shape: str) -> list[list[int]]:
    random = torch.Generator().manual_seed(5)
    top = SHAPES[shape]["vocab_size"]
    return [torch.randint(1, top, (n,), generator=random).tolist() for n in LENGTHS[shape]]


@torch.no_grad()
def right_answers(base: LlamaForCausalLM, folder: Path, shape: str) -> dict[str, list[Answer]]:
    """By pool: greedy tokens, their log-probabilities, and the least gap between two candidates."""
    found = {}
    for pool, names in POOLS.items():
        folders = [folder_of(folder, name) for name in names]
        if folders:
            route(base, ExpertPool.load(folders), top_k=TOP_K, backend="reference")
        with watched(base, folders) as gaps:
            found[pool] = [greedy(base, prompt, gaps) for prompt in prompts_of(shape)]
        if folders:
            unroute(base)
    return found


def greedy(model: Any, prompt: list[int], gaps: list[Tensor]) -> Answer:
    gaps.clear()
    cache, ids = None, torch.tensor([prompt], device=model.device)
    tokens, logprobs, ties = [], [], []
    for _ in range(TOKENS):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        best = output.logits[0, -1].float().log_softmax(-1).topk(2)
        cache, ids = output.past_key_values, best.indices[:1].view(1, 1)
        tokens.append(int(ids))
        logprobs.append(float(best.values[0]))
        ties.append(float(best.values[0] - best.values[1]))
    scores = float(torch.stack(gaps).min()) if gaps else math.inf
    return {"tokens": tokens, "logprobs": logprobs, "gap": min(scores, *ties)}


@contextmanager
def watched(model: Any, folders: Sequence[Path]) -> Iterator[list[Tensor]]:
    """A list that gets each layer's least gap between the last chosen score and the next one."""
    gaps: list[Tensor] = []
    experts = [load_expert(path) for path in folders]
    handles = []
    for name in experts[0].modules if len(experts) > TOP_K else ():
        every = torch.stack([expert.gates.vectors[name] for expert in experts if expert.gates])
        signatures = F.layer_norm(every.float(), every.shape[1:], eps=EPS).to(model.device)

        def look(_: Any, inputs: tuple[Tensor], signatures: Tensor = signatures) -> None:
            best = gate_scores(inputs[0].flatten(0, -2), signatures).topk(TOP_K + 1).values
            gaps.append((best[:, TOP_K - 1] - best[:, TOP_K]).min())

        handles.append(model.get_submodule(name).register_forward_pre_hook(look))
    yield gaps
    for handle in handles:
        handle.remove()


# ---------------------------------------------------------------- engines


class Engine:
    """vLLM's engine as its server has it."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self.asked = 0

    async def ask(
        self,
        requests: Sequence[tuple[list[int], dict[str, Any]]],
        begun: asyncio.Event | None = None,
        **sampling: Any,
    ) -> list[Answer]:
        """The answers to prompts, each by its own choice."""
        [pool, *_] = await self.llm.collective_rpc("phatgoose_pool")
        return await asyncio.gather(*(self._one(*r, pool, begun, sampling) for r in requests))

    async def _one(
        self,
        ids: list[int],
        choice: dict[str, Any],
        pool: dict[str, Any],
        begun: asyncio.Event | None,
        sampling: dict[str, Any],
    ) -> Answer:
        from vllm import SamplingParams

        self.asked += 1
        wanted = Request.read(choice)
        kind = {"max_tokens": TOKENS, "logprobs": 0, **sampling}
        params = SamplingParams(
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            extra_args={"phatgoose": wanted.text()},
            **kind,
        )
        prompt = {"prompt_token_ids": ids, "cache_salt": wanted.salt(pool)}
        answer: Any = None
        async for so_far in self.llm.generate(prompt, params, f"cmpl-{self.asked}"):
            answer = so_far
            if begun is not None:
                begun.set()
        best, read = answer.outputs[0], answer.prompt_logprobs
        found: Answer = {"tokens": list(best.token_ids), "cached": answer.num_cached_tokens}
        if best.logprobs:
            steps = zip(best.token_ids, best.logprobs, strict=True)
            found["logprobs"] = [step[token].logprob for token, step in steps]
        if read:
            steps = zip(ids[1:], read[1:], strict=True)
            found["read"] = [step[token].logprob for token, step in steps]
        return found

    async def change(self, source: Path | None, name: str) -> str | None:
        """Add the expert of a folder, or remove it; what went wrong."""
        arguments: tuple[str, ...] = (name,)
        method = "phatgoose_remove"
        if source is not None:
            ready = await self.llm.collective_rpc("phatgoose_prepare", args=(name, str(source)))
            problem: str | None = ready[0]["error"]
            if problem:
                return problem
            method, arguments = "phatgoose_commit", ()
        await self.llm.pause_generation(mode="wait")
        done = await self.llm.collective_rpc(method, args=arguments)
        reset = await self.llm.reset_prefix_cache()
        await self.llm.resume_generation()
        errors = [each["error"] for each in done if each["error"]]
        return errors[0] if errors else None if reset else "the prefix cache was not emptied"


async def answers(job: dict[str, Any]) -> dict[str, Any]:
    """What an engine says in float32; see the top."""
    prompts, late = job["prompts"], Path(job["late"])
    mixed = [(p, choice) for p in prompts for choice in CHOICES.values()]
    every: list[tuple[list[int], dict[str, Any]]] = [(p, {}) for p in prompts]
    engine = Engine(job["llm"])
    try:
        found: dict[str, Any] = {"mixed": await engine.ask(mixed)}
        found["again"] = await engine.ask(mixed)
        found["alone"] = [(await engine.ask([request]))[0] for request in every]
        for what, source in (("add", late), ("remove", None)):
            begun = asyncio.Event()
            asked = asyncio.create_task(engine.ask(every, begun))
            await begun.wait()
            found[what] = await engine.change(source, LATE)
            found[f"during {what}"] = await asked
            found[f"after {what}"] = await engine.ask(every)
        return found
    finally:
        engine.llm.shutdown()


async def readings(job: dict[str, Any]) -> dict[str, Any]:
    """What an engine makes of given answers, by the whole pool and by the base."""
    engine = Engine(job["llm"])
    try:
        return {
            name: await engine.ask(
                [(ids, CHOICES[name]) for ids in job["prompts"]],
                prompt_logprobs=0,
                logprobs=None,
                max_tokens=1,
            )
            for name in ("all", "base")
        }
    finally:
        engine.llm.shutdown()


def run_engine(job: dict[str, Any], folder: Path, name: str, seconds: float) -> dict[str, Any]:
    """An engine in a process of its own. Raises RuntimeError with what it said if it fails."""
    (folder / f"{name}.job.json").write_text(json.dumps(job))
    out = folder / f"{name}.out.json"
    begin = time.monotonic()
    with (folder / f"{name}.log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, __file__, "--engine", str(folder / f"{name}.job.json"), str(out)],
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
    if done.returncode or not out.exists():
        raise RuntimeError(f"{name}: no engine\n{(folder / f'{name}.log').read_text()[-3000:]}")
    say(f"{name}: {time.monotonic() - begin:.0f} s")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def job_of(
    folder: Path, ranks: int, dtype: str, prompts: list[list[int]], more: dict[str, Any]
) -> dict[str, Any]:
    return {
        "kind": "answers" if dtype == "float32" else "readings",
        "prompts": prompts,
        "late": str(folder / "late" / LATE),
        "llm": {
            "model": str(folder / "base"),
            "dtype": dtype,
            "max_model_len": 512,
            "max_num_batched_tokens": BUDGET,
            "max_num_seqs": BUDGET,
            "tensor_parallel_size": ranks,
            "load_format": "phatgoose",
            "skip_tokenizer_init": True,
            "worker_cls": "phatgoose.serve.worker.Worker",
            "additional_config": {
                "phatgoose": {
                    "experts": [str(folder / "experts")],
                    "capacity": EXPERTS + 1,
                    "max_rank": RANK,
                    "top_k": TOP_K if dtype == "float32" else EXPERTS,
                }
            },
            **more,
        },
    }


# ---------------------------------------------------------------- comparing


def compare(found: Sequence[Answer], wanted: Sequence[Answer]) -> dict[str, Any]:
    """How many answers are those wanted, of prompts far from a tie and of the others."""
    far = [(a, b) for a, b in zip(found, wanted, strict=True) if b["gap"] >= NEAR_TIE]
    near = [(a, b) for a, b in zip(found, wanted, strict=True) if b["gap"] < NEAR_TIE]
    apart = [
        abs(x - y)
        for a, b in far
        for x, y in zip(a["logprobs"], b["logprobs"], strict=True)
        if a["tokens"] == b["tokens"]
    ]
    return {
        "prompts": len(far),
        "equal": sum(a["tokens"] == b["tokens"] for a, b in far),
        "logprob": max(apart, default=math.nan),
        "near": len(near),
        "near_equal": sum(a["tokens"] == b["tokens"] for a, b in near),
    }


def rows_in_float32(found: dict[str, Any], right: dict[str, list[Answer]]) -> list[dict[str, Any]]:
    rows = []
    for key in ("mixed", "again"):
        for place, choice in enumerate(CHOICES):
            rows.append((f"{key}: {choice}", found[key][place :: len(CHOICES)], right[choice]))
    after = {"after add": "late", "after remove": "all", "alone": "all"}
    rows += [(key, found[key], right[pool]) for key, pool in after.items()]
    for change, old, new in (("add", "all", "late"), ("remove", "late", "all")):
        mine = found[f"during {change}"]
        # A request that the engine had not begun waits for the new pool. None gets a bit of both.
        pairs = zip(mine, right[old], right[new], strict=True)
        wanted = [c if a["tokens"] == c["tokens"] else b for a, b, c in pairs]
        rows.append((f"during {change}", mine, wanted))
    made = []
    for what, mine, wanted in rows:
        row = {"what": what, **compare(mine, wanted)}
        # Half of the prompts at least must count, or the row says nothing.
        row["good"] = (
            row["equal"] == row["prompts"] >= len(wanted) / 2 and row["logprob"] <= LOGPROB
        )
        made.append(row)
    problems = [found[key] for key in ("add", "remove") if found[key]]
    cached = sum(answer["cached"] > 0 for answer in found["again"])
    return [
        *made,
        {"what": "changes", "good": not problems, "problems": problems, "cached": cached},
    ]


def rows_in_bfloat16(one: dict[str, Any], many: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name in ("base", "all"):
        ours, theirs = (
            torch.tensor([x for answer in found[name] for x in answer["read"]])
            for found in (many, one)
        )
        apart = (ours - theirs).abs()
        rows.append(
            {
                "what": f"reads as on one rank: {name}",
                "tokens": len(apart),
                "mean": float(apart.mean()),
                "p99": float(apart.quantile(0.99)),
                "logprob": float(apart.max()),
            }
        )
    base, pool = rows
    base["good"] = True
    pool["good"] = bool(pool["mean"] <= TIMES_BASE * base["mean"] + 1e-6)
    return rows


# ---------------------------------------------------------------- a run


COLUMNS = {
    "shape": lambda r: r["shape"],
    "dtype   ": lambda r: r["dtype"],
    "ranks": lambda r: str(r["ranks"]),
    "what                 ": lambda r: r["what"],
    "equal": lambda r: f"{r['equal']}/{r['prompts']}" if "equal" in r else "-",
    "near ties": lambda r: f"{r['near_equal']}/{r['near']}" if "near" in r else "-",
    "mean": lambda r: f"{r['mean']:.1e}" if "mean" in r else "-",
    "worst": lambda r: f"{r['logprob']:.1e}" if "logprob" in r else "-",
    "good": lambda r: "yes" if r["good"] else "NO",
}


def check(
    shape: str, folder: Path, results: Results, args: argparse.Namespace, pool: ThreadPoolExecutor
) -> Callable[[], None]:
    """Start all engines of a shape; returns what waits for them and adds their rows."""
    base = make(folder, shape, args.device)
    prompts = prompts_of(shape)

    def engine(ranks: int, dtype: str) -> Any:
        job = job_of(folder, ranks, dtype, prompts, args.llm)
        return pool.submit(run_engine, job, folder, f"{shape}-{dtype}-{ranks}", args.seconds)

    exact = {ranks: engine(ranks, "float32") for ranks in args.ranks}
    half = {ranks: engine(ranks, "bfloat16") for ranks in args.ranks} if args.half else {}
    right = right_answers(base, folder, shape)  # while they start
    del base
    common.free_memory(args.device)
    write_json(folder / "right.json", right)
    say(f"{shape}: right answers after {time.perf_counter() - args.began:.0f} s")

    def add(ranks: int, dtype: str, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            results.add({"shape": shape, "dtype": dtype, "ranks": ranks, **row})

    def finish() -> None:
        for ranks, asked in exact.items():
            add(ranks, "float32", rows_in_float32(asked.result(), right))
        for ranks in args.ranks[1:] if half else ():
            found = half[args.ranks[0]].result(), half[ranks].result()
            add(ranks, "bfloat16", rows_in_bfloat16(*found))

    return finish


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="wide and deep, or tiny")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--llm", type=json.loads, default={}, help="further arguments, as JSON")
    parser.add_argument("--no-half", dest="half", action="store_false", help="float32 alone")
    parser.add_argument("--at-once", type=int, default=8, help="engines beside each other")
    parser.add_argument("--seconds", type=float, default=600, help="that an engine may take")
    parser.add_argument("--folder", type=Path, help="keep models, answers and logs here")
    parser.add_argument("--engine", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.shapes = args.shapes or (["wide", "deep"] if args.device == "cuda" else ["tiny"])
    args.began = time.perf_counter()
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.engine:
        job_file, out = args.engine
        job = json.loads(job_file.read_text())
        out.write_text(
            json.dumps(asyncio.run({"answers": answers, "readings": readings}[job["kind"]](job)))
        )
        return 0
    from vllm.version import __version__

    results = Results(
        args,
        "ranks",
        "log-probabilities, in nats",
        COLUMNS,
        vllm=__version__,
        near_tie=NEAR_TIE,
        tolerance={"float32": LOGPROB, "bfloat16 over base": TIMES_BASE},
        f32=os.environ.get("TRITON_F32_DEFAULT"),
    )
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.at_once) as pool:
        waits = []
        for shape in args.shapes:
            folder = (args.folder or Path(temporary)) / shape
            folder.mkdir(parents=True, exist_ok=True)
            waits.append(check(shape, folder, results, args, pool))
        failed = 0
        for finish in waits:
            try:
                finish()
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                say(str(error))
                failed += 1
    results.finish()
    return int(failed > 0 or not all(row["good"] for row in results.rows))


if __name__ == "__main__":  # vLLM's own processes import this module again
    sys.exit(main())
