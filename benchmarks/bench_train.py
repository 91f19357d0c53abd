"""`phatgoose experts train` on one device and on several: the time it takes, and the experts.

    python benchmarks/bench_train.py [--devices cuda:0 cuda:1] [--shape smollm2] [--out FILE]

The same command trains the same experts three times: on the first device, in groups as large as
each device's share; on all devices; and on the first device with all experts in one group. Each run
is timed as a user would, from the command's start to its end, and its experts are compared with
those of the first. The base has SmolLM2-135M's sizes and random weights, and the tasks are random
words.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import common
from common import Results, say

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "tie_word_embeddings": True,
    },
}
EXAMPLES = 512  # of a task


def make_base(folder: Path, shape: str) -> None:
    """Every token is one word."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=2048, bos_token_id=None, eos_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"t{number}": number for number in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t0", pad_token="t0")
    fast.save_pretrained(folder)


def make_tasks(folder: Path, count: int, length: int, words: int) -> None:
    """Examples of one length; a task's answers are words of its own."""
    draw = random.Random(0)
    for number in range(count):
        own = [f"t{draw.randrange(1, words)}" for _ in range(16)]
        task = folder / f"task{number}"
        task.mkdir(parents=True)
        with (task / "train.jsonl").open("w") as file:
            for _ in range(EXAMPLES):
                prompt = " ".join(f"t{draw.randrange(1, words)}" for _ in range(length - 9))
                answer = " " + " ".join(draw.choices(own, k=8))
                file.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")


def train(folder: Path, name: str, where: Sequence[str], args: argparse.Namespace) -> float:
    """Seconds of the command. Raises RuntimeError with what it said if it fails."""
    words = [
        *("experts", "train", "--base", folder / "base", "--tasks", folder / "tasks"),
        *("--out", folder / name, "--steps", args.steps, "--gate-steps", args.gate_steps),
        *("--batch-size", args.batch_size, *(["--bf16"] if args.bf16 else []), *where),
    ]
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "phatgoose.cli", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-4000:]}")
    return time.monotonic() - begin


def apart(one: Path, other: Path) -> dict[str, Any]:
    """Whether two folders hold the same experts, and how far their tensors are apart at most.

    As the norm of the difference over the norm.
    """
    worst, equal = 0.0, 0
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    for file in files:
        ours, theirs = load_file(one / file), load_file(other / file)
        equal += all(torch.equal(ours[name], theirs[name]) for name in ours)
        for name in ours:
            a, b = ours[name].double(), theirs[name].double()
            worst = max(worst, float((a - b).norm() / a.norm().clamp_min(1e-30)))
    return {"files": len(files), "equal_files": equal, "worst": worst}


COLUMNS = {
    "devices": lambda r: str(r["devices"]),
    "together": lambda r: str(r["together"]),
    "seconds": lambda r: f"{r['seconds']:.1f}",
    "speedup": lambda r: f"{r['speedup']:.2f}",
    "equal files": lambda r: f"{r['equal_files']}/{r['files']}",
    "worst difference": lambda r: f"{r['worst']:.1e}",
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--devices", nargs="+", help="default: every GPU, or two processes")
    parser.add_argument("--shape", choices=SHAPES, help="smollm2 on a GPU, else tiny")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--steps", type=int, help="of the adapters (60, or 3 on a CPU)")
    parser.add_argument("--gate-steps", type=int, help="(30, or 3 on a CPU)")
    parser.add_argument("--batch-size", type=int, help="(32, or 4 on a CPU)")
    parser.add_argument("--length", type=int, help="tokens of an example (128, or 24 on a CPU)")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep what is made here")
    args = parser.parse_args(arguments)
    gpu = args.device == "cuda"
    args.shape = args.shape or ("smollm2" if gpu else "tiny")
    every = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    args.devices = args.devices or (every if gpu else ["cpu", "cpu"])
    sizes = {"steps": (60, 3), "gate_steps": (30, 3), "batch_size": (32, 4), "length": (128, 24)}
    for name, (large, small) in sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, large if gpu else small)
    return args


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    results = Results(
        args,
        "train",
        "seconds of `phatgoose experts train`, from its start to its end",
        COLUMNS,
        model=SHAPES[args.shape],
        **{
            key: getattr(args, key)
            for key in ("devices", "experts", "steps", "gate_steps", "batch_size", "length", "bf16")
        },
    )
    with contextlib.ExitStack() as kept:
        folder = args.folder or Path(kept.enter_context(tempfile.TemporaryDirectory()))
        make_base(folder / "base", args.shape)
        vocabulary = SHAPES[args.shape]["vocab_size"]
        make_tasks(folder / "tasks", args.experts, args.length, vocabulary)
        share = -(-args.experts // len(args.devices))
        one = ["--device", args.devices[0]]
        runs = {
            "one": (1, share, [*one, "--together", share]),
            "all": (len(args.devices), share, ["--devices", *args.devices, "--together", share]),
            "whole": (1, args.experts, one),
        }
        for name, (devices, together, where) in runs.items():
            if results.spent():
                say(f"time is up: {name} is left out")
                continue
            seconds = train(folder, name, where, args)
            first = results.rows[0]["seconds"] if results.rows else seconds
            results.add(
                {
                    "devices": devices,
                    "together": together,
                    "seconds": seconds,
                    "speedup": first / seconds,
                    **apart(folder / "one", folder / name),
                }
            )
    return results.finish()


if __name__ == "__main__":
    main()
