"""docs/study.md and its figure, from the results of the study.

    python recipes/study/write.py [--out out/study] [--docs docs]

Results found in OUT are copied to DOCS/study first, so that without OUT the page is written again
from the committed ones. What a person has to say about them is in findings.md beside this file,
where a line `{NAME}` or `{NAME POOL}` stands for a table of tables.py.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

import tables
from phatgoose.files import write_bytes
from tables import Found, Results

FINDINGS = Path(__file__).with_name("findings.md")
COLOURS = {"small": "#0072B2", "large": "#D55E00"}  # told apart by colour-blind people too
DRAWN = (
    "base merged arrow average_activation retrieval phatgoose phatgoose+evidence "
    "phatgoose+prompt_evidence"
).split()
TABLE = re.compile(r"^\{(\w+)(?: (\S+))?\}$")
# What is kept of a phase, and the name that it gets beside the phase's pool.
KEPT = {"results.json": "", "places.json": "places", "far.json": "far"}


def collect(out: Path, docs: Path) -> dict[str, Results]:
    """The results by phase; new ones are kept under docs/study, without what is not read."""
    for new in sorted((out / "results").glob("*/*.json")):
        if new.name in KEPT:
            results = json.loads(new.read_text(encoding="utf-8"))
            results.pop("answers", None)
            pool, _, what = new.parent.name.rpartition("-")
            name = f"{pool}-{KEPT[new.name] or what}"
            keep(docs / "study" / f"{name}.json", results)
    parts: dict[str, list[Results]] = {}
    for path in sorted((out / "memory").glob("*.json")):
        pool = path.stem.rpartition("-part-")[0]
        parts.setdefault(pool, []).append(json.loads(path.read_text(encoding="utf-8")))
    if parts:
        keep(docs / "study" / "training.json", parts)
    found = sorted((docs / "study").glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in found}


def keep(path: Path, results: object) -> None:
    text = json.dumps(results, ensure_ascii=False, separators=(",", ":"))
    write_bytes(path, (text + "\n").encode())


def draw(found: Found, path: Path) -> None:
    """Bars of the main methods: gain recovered on own tasks, and the held-out average."""
    pools = [pool for pool in ("small", "large") if f"{pool}-own" in found]
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    thick = 0.8 / len(pools)
    for number, pool in enumerate(pools):
        own, held = found[f"{pool}-own"], found[f"{pool}-heldout"]
        label = f"{len(own['experts'])} experts"
        for axes, values in zip(grid, (own["recovered_gain"], held["average"]), strict=True):
            for place, method in enumerate(reversed(DRAWN)):
                value = values.get(method)
                if value is None or value["score"] is None:
                    continue
                y, x = place - (number - (len(pools) - 1) / 2) * thick, value["score"]
                if axes is grid[0]:
                    axes.barh(y, x, thick, color=COLOURS[pool], label=label)
                else:  # no bars: their scale does not begin at 0
                    axes.plot(x, y, "o", color=COLOURS[pool])
                line = {"color": "black" if axes is grid[0] else COLOURS[pool], "linewidth": 1}
                axes.plot([value["low"], value["high"]], [y, y], **line)
                label = "_"  # once in the legend
        if base := held["average"].get("base"):
            grid[1].axvline(base["score"], color=COLOURS[pool], linewidth=1, linestyle=":")
    grid[0].set_yticks(range(len(DRAWN)), DRAWN[::-1], fontsize=9)
    grid[0].set_title("tasks of the experts: gain recovered, %", fontsize=10)
    grid[1].set_title("17 tasks that no expert was trained on: average", fontsize=10)
    grid[0].legend(fontsize=8, loc="upper right")
    for axes in grid:
        axes.grid(axis="x", linewidth=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def described(results: Results) -> str:
    """One paragraph on what was compared."""
    roles = [task["role"] for task in results["tasks"].values()]
    settings, versions = results["settings"], results["versions"]
    own, held = roles.count("own"), roles.count("heldout")
    words = [f"{own} tasks of their own"] * bool(own) + [f"{held} without an expert"] * bool(held)
    return (
        f"{len(results['experts'])} experts; {' and '.join(words)}, at most {settings['limit']} "
        f"examples of each, seed {settings['seed']}; {settings['dtype']} on {versions['device']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}."
    )


def page(found: Found) -> Iterator[str]:
    """The findings with their tables."""
    for line in FINDINGS.read_text(encoding="utf-8").splitlines():
        match = TABLE.match(line)
        if match is None:
            yield line
        else:
            make = getattr(tables, match[1])
            yield from make(found, match[2]) if match[2] else make(found)
    yield from ("", "## Every task", "")
    for phase, results in found.items():
        if re.fullmatch(r"(small|large).*-(own|heldout|bbh)", phase):
            yield from ("<details>", f"<summary>{phase}</summary>", "", described(results))
            yield from (f"From [study/{phase}.json](study/{phase}.json).", "")
            role = "own" if phase.endswith("-own") else "heldout"
            yield from (*tables.tasks(results, role), "", "</details>", "")


def write(out: Path, docs: Path) -> None:
    """Write DOCS/study.md, its figure, and the results it is made of."""
    found = collect(out, docs)
    if "small-own" not in found:
        raise SystemExit(f"{out}: holds no results. Run recipes/study/run.py first.")
    draw(found, docs / "study" / "methods.png")
    write_bytes(docs / "study.md", ("\n".join(page(found)).rstrip() + "\n").encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/study"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    given = parser.parse_args()
    write(given.out, given.docs)
