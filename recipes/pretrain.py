"""Pretrain the small Llama that ships in `phatgoose.default`.

    python recipes/tokenizer.py TEXT_DIR tokenizer
    python recipes/pretrain.py TEXT_DIR OUT_DIR --tokenizer tokenizer --minutes 7.2

TEXT_DIR holds `.txt` or `.txt.xz` files whose documents each end with a line
`<|endoftext|>`. OUT_DIR receives a bf16 model that `AutoModelForCausalLM` loads,
its tokenizer and `log.json`; `--resume` continues from the last checkpoint.
On several GPUs: `torchrun --nproc-per-node 2 recipes/pretrain.py ...`; each takes its share of
every step's rows. The shipped model is this command's on one NVIDIA H100: 7161 steps, 939 M tokens.
"""

import argparse
import functools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tokenizer import batched, load_tokenizer, tokenise

TIMED_STEPS = (10, 30)  # with --minutes: the steps that tell how fast the rest will go
WEIGHT_DECAY = 0.1


def causal_attention(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object
) -> tuple[Tensor, None]:
    """Plain causal attention over full rows: q [B H T D], k and v [B G T D], H % G = 0.

    Registered without a mask function, so transformers builds no mask. The mask it
    would build while compiling is a dense [T, T] one, which rules out the flash kernel.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # rotation leaves them in fp32
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2).contiguous(), None


AttentionInterface.register("plain_causal", causal_attention)


# ---------------------------------------------------------------- data


class Rows:
    """Packed rows of `length` + 1 tokens in an order fixed by the seed and the step.

    Each pass starts at a random offset and visits its rows in a random order, so a
    document is cut differently every time. Nothing is kept between steps: a resumed
    run reads exactly what an unbroken one would have read.
    """

    def __init__(self, tokens: np.ndarray, length: int, *, batch: int, seed: int) -> None:
        self.tokens, self.length, self.batch, self.seed = tokens, length, batch, seed
        self.per_pass = (len(tokens) - 1) // length - 1  # one row's worth goes to the offset
        if self.per_pass < 1:
            raise SystemExit(f"{len(tokens)} tokens do not fill two rows of {length}.")
        self.starts = functools.lru_cache(maxsize=2)(self._starts)

    def _starts(self, number: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, number))
        return rng.integers(self.length) + self.length * rng.permutation(self.per_pass)

    def __call__(self, step: int) -> Tensor:
        """The step's rows, int64 [batch, length + 1]."""
        items = range(step * self.batch, (step + 1) * self.batch)
        places = [divmod(i, self.per_pass) for i in items]
        starts = np.array([self.starts(number)[row] for number, row in places])
        rows = self.tokens[starts[:, None] + np.arange(self.length + 1)]
        return torch.from_numpy(rows.astype(np.int64))


# ---------------------------------------------------------------- model


def new_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        intermediate_size=args.intermediate,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="plain_causal")


def token_loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Mean next-token loss in nats, fp32; logits stay in the autocast dtype."""
    hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def autocast(device: torch.device) -> AbstractContextManager[None]:
    return torch.autocast(device.type, torch.bfloat16)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokens: np.ndarray, length: int, rows: int = 32) -> float:
    """Mean loss over consecutive full rows of the tokens, in nats a token."""
    count = (len(tokens) - 1) // length
    if count < 1:
        raise SystemExit(f"{len(tokens)} tokens are too few to evaluate rows of {length}.")
    total = 0.0
    for index in batched(range(count), rows):
        starts = np.array(index)[:, None] * length
        batch = torch.from_numpy(tokens[starts + np.arange(length + 1)].astype(np.int64))
        with autocast(model.device):
            total += token_loss(model, batch.to(model.device)).item() * len(index)
    return total / count


def save_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, source: Path, folder: Path
) -> None:
    """Write bf16 weights, configurations and a copy of the tokenizer's files."""
    model.to(torch.bfloat16).save_pretrained(folder)
    GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    ).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)


# ---------------------------------------------------------------- training


def schedule(step: int, total: int | None, *, warmup: int, decay: float) -> float:
    """Share of the peak learning rate: linear warm-up, a plateau, linear decay to 0.

    `decay` is the share of all steps that decay; None means the total is not yet known.
    """
    rate = min(1.0, (step + 1) / warmup)
    if total is not None:
        rate = min(rate, (total - step) / max(1.0, decay * total))
    return rate


def new_optimizer(model: LlamaForCausalLM, lr: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    norms = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file, then rename: a stop half-way leaves the old one whole."""
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


def micro_batches(rows: Tensor, size: int, device: torch.device) -> Iterator[Tensor]:
    if device.type == "cuda":
        rows = rows.pin_memory()
    for part in rows.split(size):
        yield part.to(device, non_blocking=True)


def train(
    model: LlamaForCausalLM,
    tokens: np.ndarray,
    held_out: np.ndarray,
    args: argparse.Namespace,
    *,
    started: float,
) -> list[dict[str, float]]:
    """Train in place; returns the log, one entry every `args.eval_every` steps."""
    device, rank, size = model.device, *place()
    optimizer = new_optimizer(model, args.lr)
    rows = Rows(tokens, args.length, batch=args.batch, seed=args.seed)
    checkpoint = args.out / "checkpoint.pt"
    step, total, log = 0, args.steps, []
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, total, log = state["step"], args.steps or state["total"], state["log"]
        print(f"resumed at step {step}", file=sys.stderr)
    loss_of = torch.compile(token_loss, dynamic=False) if device.type == "cuda" else token_loss
    parts = math.ceil(args.batch / size / args.micro_batch)
    recent = torch.zeros((), device=device)  # summed on the device: reading it would wait
    shown = clock = time.monotonic()
    shown_step = first = step
    while total is None or step < total:
        rate = schedule(step, total, warmup=args.warmup, decay=args.decay)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        for part in micro_batches(rows(step)[rank::size], args.micro_batch, device):
            with autocast(device):
                loss = loss_of(model, part) / parts
            loss.backward()
            recent += loss.detach()
        average_gradients(model, size)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        if total is None and step - first in TIMED_STEPS:
            recent.item()  # wait for the device
            if step - first == TIMED_STEPS[0]:
                clock = time.monotonic()
            else:
                now = time.monotonic()
                per_step = (now - clock) / (TIMED_STEPS[1] - TIMED_STEPS[0])
                # 3% for evaluations and checkpoints
                left = 0.97 * (started + 60 * args.minutes - now)
                total = agreed(step + max(1, int(left / per_step)), device, size)
                print(f"{per_step * 1000:.1f} ms a step: {total} steps", file=sys.stderr)
        if step % args.show_every == 0 or step == total:
            mean, now = recent.item() / (step - shown_step), time.monotonic()
            if not math.isfinite(mean):
                raise SystemExit(f"step {step}: the loss is {mean}. Lower --lr.")
            speed = (step - shown_step) * args.batch * args.length / (now - shown)
            message = f"step {step}/{total or '?'} loss {mean:.3f} {speed / 1e6:.3f} M tokens/s"
            print(message, file=sys.stderr, flush=True)
            if not rank and (step % args.eval_every == 0 or step == total):
                entry = {"step": step, "tokens": step * args.batch * args.length, "loss": mean}
                entry["held_out"] = evaluate(model, held_out, args.length)
                entry |= {"lr": args.lr * rate, "tokens_per_second": round(speed)}
                log.append(entry | {"seconds": round(now - started, 1)})
                print(f"held out {entry['held_out']:.4f}", file=sys.stderr, flush=True)
                write_log(args.out, {"log": log})
            recent.zero_()
            shown, shown_step = time.monotonic(), step
        if not rank and (step % args.checkpoint_every == 0 or step == total):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step, "total": total, "log": log}
            replace_file(checkpoint, functools.partial(torch.save, state))
    return log


def place() -> tuple[int, int]:
    """This process's number, and how many there are; `torchrun` says so."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def average_gradients(model: LlamaForCausalLM, size: int) -> None:
    """Give every process the mean of all their gradients."""
    if size > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients]) / size
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def agreed(value: int, device: torch.device, size: int) -> int:
    """The first process's value."""
    if size == 1:
        return value
    shared = torch.tensor(value, device=device)
    dist.broadcast(shared, 0)
    return int(shared)


def write_log(folder: Path, log: dict[str, object]) -> None:
    text = json.dumps(log, indent=1) + "\n"
    replace_file(folder / "log.json", functools.partial(Path.write_text, data=text))


# ---------------------------------------------------------------- command line


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("text", type=Path, help="folder of .txt or .txt.xz files")
    add("out", type=Path, help="folder for the model, its log and its checkpoint")
    add("--tokenizer", type=Path, required=True, help="folder written by tokenizer.py")
    add("--cache", type=Path, help="folder for the tokens; default: OUT/cache")
    add("--held-out", type=float, default=0.01, help="share of documents never trained on")
    add("--hidden", type=int, default=384)
    add("--layers", type=int, default=7)
    add("--heads", type=int, default=6)
    add("--kv-heads", type=int, default=2)
    add("--intermediate", type=int, default=1024)
    add("--length", type=int, default=1024, help="tokens a row")
    add("--batch", type=int, default=128, help="rows a step")
    add(
        "--micro-batch",
        type=int,
        default=64,
        help="rows at a time, at most; lower it to save memory",
    )
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--warmup", type=int, default=200, help="steps")
    add("--decay", type=float, default=0.4, help="share of the steps that decay to 0")
    add("--seed", type=int, default=0)
    add("--show-every", type=int, default=50)
    add("--eval-every", type=int, default=500, help="a multiple of --show-every")
    add("--checkpoint-every", type=int, default=1000)
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt if it is there")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int)
    length.add_argument("--minutes", type=float, help="from the program's start to the last step")
    args = parser.parse_args()
    processes = place()[1]
    args.micro_batch = min(args.micro_batch, max(1, args.batch // processes))
    share = args.micro_batch * processes
    if args.batch % share:
        parser.error(
            f"--batch {args.batch} is no multiple of {share}: --micro-batch, all processes"
        )
    if args.eval_every % args.show_every:
        parser.error(f"--eval-every {args.eval_every} is no multiple of {args.show_every}")
    return args


def main() -> None:
    started = time.monotonic()
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    rank, processes = place()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if processes > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    tokenizer = load_tokenizer(args.tokenizer)
    cache = args.cache or args.out / "cache"
    if rank:
        dist.barrier()  # the first tokenises, the others read what it kept
    tokens, held_out = tokenise(args.text, args.tokenizer, cache, held_out=args.held_out)
    if processes > 1 and not rank:
        dist.barrier()
    model = new_model(args, tokenizer).to(device)
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{size / 1e6:.2f} M parameters, {len(tokens) / 1e6:.2f} M tokens, "
        f"{len(held_out)} held out, {time.monotonic() - started:.0f} s so far",
        file=sys.stderr,
    )
    log = train(model, tokens, held_out, args, started=started)
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank:
        return
    save_model(model, tokenizer, args.tokenizer, args.out)

    # What is reported is the loss of the files, in bf16, as they will be loaded.
    saved = AutoModelForCausalLM.from_pretrained(args.out).to(device, torch.bfloat16)
    result = {
        "parameters": size,
        "training_tokens": len(tokens),
        "held_out_tokens": len(held_out),
        "tokens_seen": log[-1]["tokens"],
        "held_out_loss": evaluate(saved, held_out, args.length),
        "training_loss": evaluate(saved, tokens[: len(held_out)], args.length),
        "seconds": round(time.monotonic() - started, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    write_log(args.out, {"result": result, "settings": settings, "log": log})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
