"""What a user gets: six lines that sum up the benchmarks on a GPU."""

from collections.abc import Callable, Iterator

from targets import MISSING, Found, Row
from targets import gates as gates_of_many

MIB = 1 << 20
CONTENDERS = ("phatgoose", "lora", "arrow")
TITLES = ("what you do", "phatgoose", "one PEFT LoRA", "PEFT's Arrow")


def gains(gpu: Callable[[str], Found]) -> Iterator[tuple[str, ...]]:
    """The lines of the table, by `TITLES`; `gpu(name)` gives a benchmark's rows."""
    model, layer, gates = gpu("generate"), gpu("layer"), gpu("gates")
    for what, where in (
        ("prefill 4,096 tokens of an 8B shape: time over the base", {"task": "prefill"}),
        ("decode 32 sequences of it in a CUDA graph: time over the base", {"task": "decode"}),
    ):
        rows = [_of_model(model, contender, where["task"]) for contender in CONTENDERS]
        yield what, *(_said(row, lambda r: f"{r['over_base']:.2f}") for row in rows)
    key = {"size": "4096x4096", "tokens": 4096, "experts": 128, "rank": 16, "mode": "eager"}
    rows = [layer.first(contender=contender, **key) for contender in CONTENDERS]
    yield (
        "run one layer of 4096x4096 on 4,096 tokens: time over the plain layer",
        *(_said(row, lambda r: f"{r['over_plain']:.2f}") for row in rows),
    )
    plain = layer.first(contender="plain", **key)
    yield (
        "the same: memory beyond the plain layer's",
        *(_said(row, lambda r: _memory(r, plain)) for row in rows),
    )
    alone = gates.first(kind="gates", experts=1, shape="1b")
    yield "train gates of one adapter of a 1B shape, 100 steps", _said(alone, _training), "-", "-"
    many = gates_of_many(gates).measured
    yield (
        "train gates of 40 at once: time of a step over one adapter's, same tokens",
        many,
        "-",
        "-",
    )


def _of_model(model: Found, contender: str, task: str) -> Row | None:
    experts = {} if contender == "lora" else {"experts": 128 if contender == "phatgoose" else 8}
    mode, batch, tokens = ("eager", 1, 4096) if task == "prefill" else ("graph", 32, 32)
    return model.first(
        shape="8b", task=task, contender=contender, mode=mode, batch=batch, tokens=tokens, **experts
    )


def _said(row: Row | None, say: Callable[[Row], str]) -> str:
    """What a row says, or why it says nothing."""
    if row is None:
        return MISSING
    try:
        return str(row.get("note") or say(row))
    except KeyError:  # it was measured without this
        return MISSING


def _memory(row: Row, plain: Row | None) -> str:
    if plain is None:
        return MISSING
    count = (row["peak_bytes"] - plain["peak_bytes"]) / MIB
    return f"{count:.0f} MiB" if count >= 10 else f"{count:.1f} MiB"


def _training(row: Row) -> str:
    share = row["of_adapter_training"]
    return f"{row['hundred_steps_s']:.1f} s, {share:.0%} of training the LoRA"
