"""What we want of speed and memory, and whether it was measured and met."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
LAYERS = ("4096x4096", "4096x14336")
PEERS = ("arrow", "r-three", "mttl")
MISSING = "not measured"


@dataclass(frozen=True)
class Found:
    """All rows of one benchmark on one kind of device, the best device's and latest first."""

    rows: list[Row]

    def one(self, **wanted: Any) -> Row | None:
        """A row with these values and a time, if there is one."""
        for row in self.rows:
            if all(row.get(key) == value for key, value in wanted.items()) and "us" in row:
                return row if row.get("note") is None else None
        return None

    def note(self, **wanted: Any) -> str | None:
        """What is said instead of a time."""
        row = self.first(**wanted)
        return None if row is None else row.get("note")

    def first(self, **wanted: Any) -> Row | None:
        """A row with these values, with a time or a note."""
        for row in self.rows:
            if all(row.get(key) == value for key, value in wanted.items()):
                return row
        return None


@dataclass(frozen=True)
class Target:
    """One line of the table."""

    what: str
    wanted: str
    measured: str = MISSING
    floor: str = "-"
    verdict: str = MISSING


def targets(gpu: Callable[[str], Found], cpu: Callable[[str], Found]) -> Iterator[Target]:
    """All targets; `gpu(name)` and `cpu(name)` give a benchmark's rows."""
    layer = gpu("layer")
    for mode in ("eager", "graph"):
        for size, limit in zip(LAYERS, (1.30, 1.20), strict=True):
            yield over_plain(layer, size, (36, 166), limit, mode=mode)
        for size in LAYERS:
            yield over_plain(layer, size, (1024,), 1.5, mode=mode)
    for size in LAYERS:
        for peer in ("arrow", "r-three"):
            yield faster(layer, size, peer, 25)
        yield memory(layer, size, 0.05)
    for size in LAYERS:
        yield few_tokens(layer, size, "over_floor", 1.3)
        yield few_tokens(layer, size, "over_plain", 2.0)
    model = gpu("generate")
    yield whole_model(model, "prefill", 1, "over_base", 1.25)
    yield whole_model(model, "decode", 32, "over_base", 1.5)
    yield whole_model(model, "prefill", 1, "over_lora", 1.0)
    yield whole_model(model, "decode", 32, "over_lora", 1.0)
    for size in ("512x512", "2048x2048"):
        yield over_plain(cpu("layer"), size, (36,), 1.5, tokens=1024, place="CPU, ")
        yield fastest(cpu("layer"), size)
    yield gates(gpu("gates"))


def over_plain(
    found: Found,
    size: str,
    experts: tuple[int, ...],
    limit: float,
    *,
    tokens: int = 4096,
    place: str = "",
    mode: str = "eager",
) -> Target:
    """The slowest of these numbers of experts, over the plain layer."""
    how = ", CUDA graph" if mode == "graph" else ""
    where = f"{place}{tokens} tokens, {size}, {_list(experts)} experts{how}: time over plain"
    rows = [ours(found, size, tokens, number, mode) for number in experts]
    return worst(where, rows, "over_plain", limit, _floor_over("over_plain"))


def few_tokens(found: Found, size: str, key: str, limit: float) -> Target:
    what = {"over_floor": "the bytes' floor", "over_plain": "plain"}[key]
    where = f"32 tokens, {size}, 36, 128 and 166 experts, CUDA graph: time over {what}"
    rows = [ours(found, size, 32, number, mode="graph") for number in (36, 128, 166)]
    return worst(where, rows, key, limit, _floor_over(key))


def faster(found: Found, size: str, peer: str, times: float) -> Target:
    where = f"4096 tokens, {size}, 128 experts: times as fast as {NAMES[peer]}"
    key = {"size": size, "tokens": 4096, "experts": 128, "rank": 16, "mode": "eager"}
    mine, other = ours(found, size, 4096, 128), found.one(contender=peer, **key)
    wanted = f"≥ {times:g}"
    if mine is None or other is None:
        note = found.note(contender=peer, **key)
        return Target(where, wanted, f"{NAMES[peer]}: {note}" if note else MISSING)
    ratio = other["us"]["p50"] / mine["us"]["p50"]
    limit = other["us"]["p50"] / mine["floor_us"]
    return Target(where, wanted, f"{ratio:.1f}", f"{limit:.1f}", _verdict(ratio >= times))


def memory(found: Found, size: str, share: float) -> Target:
    where = f"4096 tokens, {size}, 128 experts: extra memory over that of {NAMES['arrow']}"
    key = {"size": size, "tokens": 4096, "experts": 128, "rank": 16, "mode": "eager"}
    mine, other = ours(found, size, 4096, 128), found.one(contender="arrow", **key)
    if mine is None or other is None:
        return Target(where, f"< {share:.0%}")
    ratio = mine["extra_bytes"] / other["extra_bytes"]
    return Target(where, f"< {share:.0%}", f"{ratio:.2%}", verdict=_verdict(ratio < share))


def whole_model(found: Found, task: str, batch: int, key: str, limit: float) -> Target:
    other = {"over_base": "base", "over_lora": "one PEFT LoRA"}[key]
    what = "prefill of 4096 tokens" if task == "prefill" else f"decoding, batch {batch}"
    where = f"8B shape, 128 experts on all linear layers, {what}: time over {other}"
    wanted = {"shape": "8b", "task": task, "batch": batch, "contender": "phatgoose"}
    if task == "prefill":
        wanted["tokens"] = 4096
    for mode in ("graph", "eager"):
        row = found.one(mode=mode, experts=128, **wanted)
        if row is not None and key in row:
            where += {"graph": " (CUDA graph)", "eager": ""}[mode] if task == "decode" else ""
            return worst(where, [row], key, limit, _floor_over(key))
    return Target(where, f"≤ {limit:.2f}")


def fastest(found: Found, size: str) -> Target:
    where = f"CPU, 1024 tokens, {size}, 36 experts: times as fast as the fastest of the others"
    mine = ours(found, size, 1024, 36)
    key = {"size": size, "tokens": 1024, "experts": 36, "rank": 16, "mode": "eager"}
    others = {peer: found.one(contender=peer, **key) for peer in PEERS}
    if mine is None or not all(others.values()):
        return Target(where, "> 1")
    peer, best = min(
        ((name, row["us"]["p50"]) for name, row in others.items() if row), key=lambda pair: pair[1]
    )
    ratio = best / mine["us"]["p50"]
    return Target(where, "> 1", f"{ratio:.2f} ({NAMES[peer]})", verdict=_verdict(ratio > 1))


def gates(found: Found) -> Target:
    where = (
        "1B shape, gates of 40 experts in one pass: time of a step over the same tokens through one"
    )
    many = found.one(kind="together", experts=40, shape="1b")
    alone = [found.one(kind=kind, experts=1, shape="1b") for kind in ("gates", "together")]
    times = [row["us"]["p50"] for row in alone if row]
    if many is None or not times:
        return Target(where, "≤ 1.50")
    row = {**many, "over_one": many["us"]["p50"] / min(times)}
    return worst(where, [row], "over_one", 1.5, lambda _: "-")


# ---------------------------------------------------------------- helpers


NAMES = {
    "plain": "plain",
    "base": "base",
    "lora": "one LoRA",
    "phatgoose": "phatgoose",
    "arrow": "PEFT's Arrow",
    "r-three": "r-three",
    "mttl": "mttl",
    "dense": "dense",
}


def ours(found: Found, size: str, tokens: int, experts: int, mode: str = "eager") -> Row | None:
    return found.one(
        contender="phatgoose", size=size, tokens=tokens, experts=experts, rank=16, mode=mode
    )


def worst(
    where: str, rows: list[Row | None], key: str, limit: float, floor: Callable[[Row], str]
) -> Target:
    """The row that is furthest from the target, if all are there."""
    known = [row for row in rows if row is not None and key in row]
    if not known or len(known) < len(rows):
        return Target(where, f"≤ {limit:.2f}")
    row = max(known, key=lambda row: row[key])
    value = f"{row[key]:.2f}"
    if len(known) > 1:
        value += f" ({row['experts']} experts)"
    return Target(where, f"≤ {limit:.2f}", value, floor(row), _verdict(row[key] <= limit))


def _floor_over(key: str) -> Callable[[Row], str]:
    """The floor in the target's own unit: over what the time is over."""

    def show(row: Row) -> str:
        if key == "over_floor":
            return "1"
        if "floor_us" not in row:
            return "-"
        return f"{row['floor_us'] * row[key] / row['us']['p50']:.2f}"

    return show


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def _list(numbers: tuple[int, ...]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last
