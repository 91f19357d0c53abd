"""Write docs/performance.md, and its figure, from the JSON files in benchmarks/results.

    python benchmarks/report.py [--results FOLDER] [--out docs/performance.md]

Every figure in the document comes from those files. Where two have the same row, the file whose
name sorts last counts; an H200's rows come before another GPU's.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gains import TITLES, gains
from targets import NAMES, Found, Row, targets

HERE = Path(__file__).parent
MIB = 1 << 20
INTRO = """\
# Performance

This page says how fast routing is and what memory it takes. It compares a routed layer with a plain
layer, with one ordinary LoRA and with other ways to route. `make bench` measures your machine.

`python benchmarks/report.py` writes this page from the files in `benchmarks/results`. Each table
names the command and the commit that it was measured at. [The log](log.md) has what was tried and
did not help.
"""

READING = """\
## How to read the tables

- Times are medians.
- *Over plain* is the time divided by that of the same layer without experts. Both were measured in
  the same process, in turns.
- A *floor* is what no implementation of the same sum can beat by much. Its formula stands under
  each table, and its rates of products and of copies were measured in the same run.
- Plain `phatgoose` is what is chosen by default. `reference`, `torch` and `triton` are our
  backends.
- PEFT's Arrow is the real one. r-three (the authors' code) and mttl are restatements of what those
  repositories compute for a layer, without what surrounds it (`benchmarks/peers.py`).
- The outputs of r-three, of mttl and of ours were compared with the routed sum in fp64, in the same
  run.
"""


@dataclass(frozen=True)
class Run:
    """One results file."""

    head: dict[str, Any]
    rows: list[Row]

    @property
    def gpu(self) -> bool:
        return "NVIDIA" in self.head["device"]


def load(folder: Path) -> list[Run]:
    """All runs, those that count most first."""
    runs = []
    for path in sorted(folder.glob("*.json"), reverse=True):
        value = json.loads(path.read_text(encoding="utf-8"))
        runs.append(Run({k: v for k, v in value.items() if k != "rows"}, value["rows"]))
    return sorted(runs, key=lambda run: "H200" not in run.head["device"])


def of(runs: list[Run], benchmark: str, gpu: bool) -> list[Run]:
    return [run for run in runs if run.head["benchmark"] == benchmark and run.gpu == gpu]


def by_device(runs: list[Run], benchmark: str) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: not run.gpu):
        if run.head["benchmark"] == benchmark:
            found.setdefault(run.head["device"], []).append(run)
    return found


# ---------------------------------------------------------------- markdown


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = list(titles)
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def source(runs: Iterable[Run]) -> str:
    """Which commands gave a table, where, and with what, and what is to be said of them."""
    lines = []
    for run in runs:
        head = run.head
        parts = [f"`{head['command']}`" if "command" in head else head["benchmark"]]
        parts.append(head["device"] if run.gpu else f"{head['device']}, {head['threads']} threads")
        if "dtype" in head:
            parts.append(head["dtype"])
        packages = ("torch", "triton", "transformers", "peft")
        parts.append(", ".join(f"{name} {head[name]}" for name in packages if head.get(name)))
        parts.append(f"commit {head['commit']}")
        if "ceilings" in head:
            rates = head["ceilings"]
            parts.append(
                f"products at {rates['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s, copies at "
                f"{rates['copy_bytes_per_s'] / 1e12:.3g} TB/s"
            )
        if "note" in head:  # written by hand
            parts.append(head["note"])
        lines.append("- " + "; ".join(parts))
    return "\n".join(lines) + "\n"


def duration(microseconds: float) -> str:
    if microseconds >= 1e6:
        return f"{microseconds / 1e6:.2f} s"
    if microseconds >= 1e3:
        return f"{microseconds / 1e3:.2f} ms"
    return f"{microseconds:.1f} µs"


def size(count: float) -> str:
    return f"{count / MIB:.0f} MiB" if count >= 10 * MIB else f"{count / MIB:.1f} MiB"


def name(contender: str) -> str:
    first, _, backend = contender.partition("/")
    return f"{first} ({backend})" if backend else NAMES.get(first, first)


def timed(row: Row | None, ratio: str) -> str:
    """A time and its ratio, or why there is none."""
    if row is None:
        return "-"
    if "us" not in row or row.get("note"):
        return row.get("note", "-")
    return f"{duration(row['us']['p50'])} ({row[ratio]:.2f})"


def wide(shape: str) -> list[int]:
    """To sort sizes by."""
    return [int(features) for features in shape.split("x")]


def merged(runs: list[Run], keys: tuple[str, ...]) -> dict[tuple[Any, ...], Row]:
    """Rows by the values of `keys`; runs that come first win."""
    found: dict[tuple[Any, ...], Row] = {}
    for run in runs:
        for row in run.rows:
            found.setdefault(tuple(row[key] for key in keys), row)
    return found


def ordered(contenders: Iterable[str]) -> list[str]:
    known = list(NAMES)
    return sorted(set(contenders), key=lambda c: (known.index(c.partition("/")[0]), c))


# ---------------------------------------------------------------- sections


def rows_of(runs: list[Run], gpu: bool) -> Callable[[str], Found]:
    """A benchmark's rows by its name."""

    def find(benchmark: str) -> Found:
        return Found([row for run in of(runs, benchmark, gpu) for row in run.rows])

    return find


def gain_section(runs: list[Run]) -> Iterator[str]:
    yield "## What you get\n"
    yield (
        "A pool has 128 experts of rank 16, and each token uses two. In a whole model, Arrow has 8 "
        "experts. All runs are in bf16.\n"
    )
    yield table(TITLES, gains(rows_of(runs, True)))
    devices = sorted({run.head["device"] for run in runs if run.gpu})
    yield f"These were measured on: {', '.join(devices) or 'no GPU'}.\n"


def target_section(runs: list[Run]) -> Iterator[str]:
    yield "## What we aimed at\n"
    yield (
        "The targets are for an H200 in bf16 unless the line says otherwise, at rank 16, with two "
        "experts for each token. A *floor* is what no implementation of the same sum can beat by "
        "much, in the unit of the target.\n"
    )
    yield table(
        ("what", "target", "measured", "floor", "verdict"),
        (
            (t.what, t.wanted, t.measured, t.floor, t.verdict)
            for t in targets(rows_of(runs, True), rows_of(runs, False))
        ),
    )
    yield READING


LAYER_KEYS = ("size", "mode", "tokens", "experts", "rank", "contender")


def layer_section(runs: list[Run], picture: str | None) -> Iterator[str]:
    yield "## One layer\n"
    if picture:
        yield f"![Time over the plain layer by number of experts]({picture})\n"
    for device, mine in by_device(runs, "layer").items():
        rows = merged(mine, LAYER_KEYS)
        contenders = ordered(key[-1] for key in rows)
        for shape, mode in sorted({key[:2] for key in rows}, key=lambda k: (wide(k[0]), k[1])):
            how = "one CUDA graph" if mode == "graph" else "eager"
            yield f"### {shape}, {how}, {device}\n"
            yield (
                "Cells hold the time, and in brackets the time over plain. The last column is "
                f"{name('phatgoose')}'s time over the floor.\n"
            )
            yield table(
                ("tokens", "experts", "rank", *map(name, contenders), "over floor"),
                _layer_lines(rows, contenders, (shape, mode)),
            )
        yield f"### Memory, {device}\n"
        yield (
            "Cells say what a forward holds at most beyond what the plain layer does, and in "
            "brackets what the experts take all the time.\n"
        )
        yield table(
            ("size", "tokens", "experts", *(name(c) for c in contenders if c != "plain")),
            _memory_lines(rows, contenders),
        )
        for kind, formula in mine[0].head["floors"].items():
            yield f"Floor, {kind} tokens: {formula}.\n"
        yield source(mine)


def _layer_lines(
    rows: dict[tuple[Any, ...], Row], contenders: list[str], where: tuple[str, str]
) -> Iterator[list[str]]:
    for setting in sorted({key[2:5] for key in rows if key[:2] == where}):
        line = {c: rows.get((*where, *setting, c)) for c in contenders}
        mine = line.get("phatgoose")
        floor = f"{mine['over_floor']:.2f}" if mine and "over_floor" in mine else "-"
        yield [*map(str, setting), *(timed(line[c], "over_plain") for c in contenders), floor]


def _memory_lines(rows: dict[tuple[Any, ...], Row], contenders: list[str]) -> Iterator[list[str]]:
    most = max((key[2] for key in rows if key[-1] in ("arrow", "r-three")), default=4096)
    settings = {(k[0], k[2], k[3]) for k in rows if k[1] == "eager" and k[2] == most and k[4] == 16}
    for shape, tokens, experts in sorted(settings, key=lambda k: (wide(k[0]), *k[1:])):
        cells = []
        for contender in contenders:
            row = rows.get((shape, "eager", tokens, experts, 16, contender))
            if contender == "plain":
                continue
            if row is None or "peak_bytes" not in row:
                cells.append((row or {}).get("note", "-"))
                continue
            plain = rows[shape, "eager", tokens, experts, 16, "plain"]
            extra = size(row["peak_bytes"] - plain["peak_bytes"])
            cells.append(f"{extra} ({size(row['stored_bytes'])})")
        yield [shape, str(tokens), str(experts), *cells]


def model_section(runs: list[Run]) -> Iterator[str]:
    yield "## A whole model\n"
    keys = ("shape", "task", "batch", "tokens", "mode", "contender", "experts")
    for device, mine in by_device(runs, "generate").items():
        yield f"### {device}\n"
        lines = []
        for key, row in sorted(merged(mine, keys).items(), key=lambda item: item[0][:5]):
            if "us" in row:
                p = row["us"]
                times = [duration(p["p50"]), f"{duration(p['p20'])} to {duration(p['p80'])}"]
                cells = [*times, f"{row['tokens_per_s']:.0f}", f"{row['over_base']:.2f}"]
                cells.append(f"{row['over_lora']:.2f}" if "over_lora" in row else "-")
                cells.append(f"{row['over_floor']:.2f}" if "over_floor" in row else "-")
                cells.append(row.get("note", duration(row["bytes_floor_us"])))
            else:
                cells = [row.get("note", "-"), *"------"]
            shape, task, batch, tokens, mode, contender, experts = key
            what = f"prefill of {tokens}" if task == "prefill" else f"decode, batch {batch}"
            lines.append([f"{shape}, {what}", mode, name(contender), str(experts or "-"), *cells])
        yield table(
            (
                *("what", "mode", "contender", "experts", "p50", "p20 to p80", "tokens/s"),
                *("over base", "over one LoRA", "over floor", "bytes' floor"),
            ),
            lines,
        )
        for kind, formula in mine[0].head["floors"].items():
            yield f"Floor, {kind.removesuffix('_floor_us')}: {formula}.\n"
        yield source(mine)
    if not any(run.head["benchmark"] == "generate" for run in runs):
        yield "Not measured.\n"


def gates_section(runs: list[Run]) -> Iterator[str]:
    yield "## Training gates\n"
    yield (
        "Each line is a step on the same tokens. It trains the LoRA itself, one expert's gates, or "
        "the gates of many experts in one pass.\n"
    )
    kinds = {"lora": "the LoRA", "gates": "train_gates", "together": "train_gates_together"}
    for device, mine in by_device(runs, "gates").items():
        yield f"### {device}\n"
        lines = []
        for row in merged(mine, ("shape", "tokens", "kind", "experts")).values():
            cells = [timed_step(row), row["shape"], str(row["tokens"])]
            cells += [f"{row[k]:.2f}" if k in row else "-" for k in ("over_lora", "over_gates")]
            cells.append(size(row["peak_bytes"]) if "peak_bytes" in row else "-")
            lines.append([kinds[row["kind"]], str(row["experts"]), *cells])
        yield table(
            (
                *("what", "experts", "p50 of a step", "model", "tokens a step"),
                *("over the LoRA's", "over one expert's gates", "peak memory"),
            ),
            lines,
        )
        for row in (row for run in mine for row in run.rows if "hundred_steps_s" in row):
            text = f"100 gate steps take {row['hundred_steps_s']:.1f} s"
            if "of_adapter_training" in row:
                text += f", which is {row['of_adapter_training']:.0%} of training the LoRA"
                text += f" ({mine[0].head['of_adapter_training']})"
            yield text + ".\n"
        yield source(mine)
    if not any(run.head["benchmark"] == "gates" for run in runs):
        yield "Not measured.\n"


def timed_step(row: Row) -> str:
    return duration(row["us"]["p50"]) if "us" in row else row.get("note", "-")


def memory_section(runs: list[Run]) -> Iterator[str]:
    for device, mine in by_device(runs, "memory").items():
        yield f"## Memory of a routed T5, {device}\n"
        yield (
            "Cells say the peak of a forward above weights and inputs. `dense` computes every "
            "expert for every token.\n"
        )
        rows = merged(mine, ("kind", "tokens", "experts", "top_k"))
        yield table(
            ("kind", "tokens", "experts", "top_k", "model", "one layer", "its floor", "stored"),
            (
                [key[0], str(key[1]), str(key[2] or "-"), str(key[3] or "-")]
                + [size(row[k]) for k in ("model", "layer", "layer_floor", "stored")]
                for key, row in sorted(rows.items(), key=lambda item: item[0][1])
            ),
        )
        yield f"Floor {mine[0].head['floor']}.\n"
        yield source(mine)


def serving_section(runs: list[Run]) -> Iterator[str]:
    mine = [run for run in runs if run.head["benchmark"] == "serving"]
    if not mine:
        return
    yield "## Serving with vLLM\n"
    yield (
        "A server under the load of vLLM's own serving benchmark. Over two GPUs it is tensor "
        "parallel. [Serving](serving.md#how-fast-it-is) says what takes the time.\n"
    )
    for run in mine:
        yield table(
            (
                *("", "GPUs", "experts", "output tokens/s", "over the base's", "over one LoRA's"),
                *("first token, median", "each further token, median"),
            ),
            (
                [
                    *(name(row["contender"]), str(row.get("gpus", 1)), str(row["experts"] or "-")),
                    *(f"{row['output_tokens_per_s']:.0f}", f"{row['over_base']:.2f}"),
                    *(f"{row['over_lora']:.2f}", duration(row["ttft_median_ms"] * 1e3)),
                    duration(row["tpot_median_ms"] * 1e3),
                ]
                for row in sorted(run.rows, key=lambda row: row.get("gpus", 1))
                if "over_lora" in row
            ),
        )
        yield source([run])


def training_section(runs: list[Run]) -> Iterator[str]:
    for device, mine in by_device(runs, "train").items():
        yield f"## Training on several devices, {device}\n"
        yield (
            "`phatgoose experts train`, from the command's start to its end. Speedup and "
            "differences are those to the first row. A difference is the norm of what two tensors "
            "are apart over the norm of one, at most.\n"
        )
        for run in mine:
            yield table(
                (
                    *("devices", "experts", "experts in a group", "time", "speedup"),
                    *("files that are equal", "difference"),
                ),
                (
                    [
                        *(str(row["devices"]), str(run.head["experts"]), str(row["together"])),
                        *(f"{row['seconds']:.1f} s", f"{row['speedup']:.2f}"),
                        f"{row['equal_files']} of {row['files']}",
                        f"{row['worst']:.1g}" if row["worst"] else "0",
                    ]
                    for row in run.rows
                ),
            )
            yield source([run])


# ---------------------------------------------------------------- figure


def draw(runs: list[Run], path: Path) -> bool:
    """Time over plain by number of experts at the most tokens that peers ran at."""
    mine = of(runs, "layer", True) or of(runs, "layer", False)
    rows = [row for row in merged(mine, LAYER_KEYS).values() if _drawable(row)]
    tokens = max((r["tokens"] for r in rows if r["contender"] == "arrow"), default=0)
    rows = [row for row in rows if row["tokens"] == tokens]
    if len({row["experts"] for row in rows}) < 2:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes = sorted({row["size"] for row in rows}, key=wide)
    figure, axes = plt.subplots(
        1,
        len(shapes),
        figsize=(5.2 * len(shapes), 5.0),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        for (contender, mode), style in STYLES.items():
            points = sorted(
                (row["experts"], row["over_plain"])
                for row in rows
                if (row["size"], row["contender"], row["mode"]) == (shape, contender, mode)
            )
            if points:
                label = name(contender) + (", CUDA graph" if mode == "graph" else "")
                axis.plot(*zip(*points, strict=True), label=label, **style)
        floors = sorted(
            (row["experts"], row["floor_us"] * row["over_plain"] / row["us"]["p50"])
            for row in rows
            if (row["size"], row["contender"], row["mode"]) == (shape, "phatgoose", "eager")
        )
        axis.plot(*zip(*floors, strict=True), color="0.5", linestyle=":", label="floor")
        axis.set(xscale="log", yscale="log", title=shape, xlabel="experts in the pool")
        ticks = sorted({row["experts"] for row in rows})
        axis.set_xticks(ticks, [str(tick) for tick in ticks], rotation=90)
        axis.minorticks_off()
        axis.axhline(1, color="0.8", linewidth=1, zorder=0)
        axis.grid(axis="y", color="0.92")
        axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g×"))
    axes[0][0].set_ylabel("time over the plain layer")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4
    )
    device = mine[0].head["device"]
    figure.suptitle(f"{tokens} tokens, rank 16, two experts a token, {device}", fontsize=11)
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return True


def _drawable(row: Row) -> bool:
    return "us" in row and not row.get("note") and row["rank"] == 16


STYLES: dict[tuple[str, str], dict[str, Any]] = {
    ("arrow", "eager"): {"color": "#b3432b", "marker": "^"},
    ("r-three", "eager"): {"color": "#d98b2b", "marker": "s"},
    ("mttl", "eager"): {"color": "#7a5ba8", "marker": "v"},
    ("phatgoose", "eager"): {"color": "#1f5f8b", "marker": "o", "linewidth": 2.2},
    ("phatgoose", "graph"): {"color": "#6fa8c9", "marker": "o", "linestyle": "--"},
    ("lora", "eager"): {"color": "#4c8c4a", "marker": "x"},
}


# ---------------------------------------------------------------- main


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "performance.md")
    args = parser.parse_args(arguments)
    runs = load(args.results)
    picture = args.out.with_suffix(".png")
    drawn = draw(runs, picture)
    parts = [
        INTRO,
        *gain_section(runs),
        *target_section(runs),
        *layer_section(runs, picture.name if drawn else None),
        *model_section(runs),
        *gates_section(runs),
        *memory_section(runs),
        *serving_section(runs),
        *training_section(runs),
    ]
    args.out.write_text("\n".join(parts), encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
