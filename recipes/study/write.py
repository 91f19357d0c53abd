"""docs/study.md and its figures, from the results of the study.

    python recipes/study/write.py [--out out/study] [--docs docs]

Results found in OUT are copied to DOCS/study first, so that without OUT the page is written again
from the committed ones. What a person has to say about them is in findings.md beside this file.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from phatgoose.evaluation.report import GONE, cell
from phatgoose.files import write_bytes

POOLS = {"default": "default pool", "large": "larger pool"}
PARTS = {"report": "results.json", "choose": "results.json", "unseen": "unseen-half.json"}
PARTS["own"] = "results.json"  # of `phatgoose eval` on the experts' own tasks alone
FOLDERS = {"report": "report", "choose": "choose", "unseen": "report", "own": "own"}
FINDINGS = Path(__file__).with_name("findings.md")
COLOURS = {"default": "#0072B2", "large": "#D55E00"}  # told apart by colour-blind people too
STYLES = {"phatgoose": "-", "phatgoose+evidence": "--"}  # of lines over the size of the pool
Results = Mapping[str, Any]


def collect(out: Path, docs: Path) -> dict[tuple[str, str], Results]:
    """The results by pool and part; new ones are kept under docs/study."""
    found = {}
    for pool in POOLS:
        for part, name in PARTS.items():
            kept = docs / "study" / f"{pool}-{part}.json"
            new = out / pool / FOLDERS[part] / name
            if new.exists():
                results = json.loads(new.read_text(encoding="utf-8"))
                results.pop("answers", None)  # files that are not kept
                text = json.dumps(results, ensure_ascii=False, separators=(",", ":"))
                write_bytes(kept, (text + "\n").encode())
            if kept.exists():
                found[pool, part] = json.loads(kept.read_text(encoding="utf-8"))
    return found


# ---------------------------------------------------------------- tables


def main_table(found: Mapping[tuple[str, str], Results], pool: str) -> Iterator[str]:
    report, unseen = found[pool, "report"], found[pool, "unseen"]
    yield (
        "| method | held-out average | less phatgoose | half no setting was chosen on | "
        "own tasks | recovered gain, % |"
    )
    yield "|---|--:|--:|--:|--:|--:|"
    for method in report["average"]:
        cells = [
            cell(report["average"].get(method)),
            cell(report["difference"].get(method), signed=True),
            cell(unseen["average"].get(method)),
            cell(report["own_average"].get(method)),
            cell(report["recovered_gain"].get(method)),
        ]
        yield f"| {method} | " + " | ".join(cells) + " |"
    reasons: dict[str, list[str]] = {}
    for method, reason in {**report["failed"], **report["left_out"]}.items():
        reasons.setdefault(reason, []).append(method)
    for reason, methods in reasons.items():
        yield f"\n{reason[0].upper()}{reason[1:]}: {', '.join(methods)}."


def own_table(results: Results) -> Iterator[str]:
    yield "| method | own tasks | less phatgoose | recovered gain, % |"
    yield "|---|--:|--:|--:|"
    for method in results["own_average"]:
        cells = [
            cell(results["own_average"][method]),
            cell(results["difference"].get(method), signed=True),
            cell(results["recovered_gain"].get(method)),
        ]
        yield f"| {method} | " + " | ".join(cells) + " |"


def settings_table(results: Results) -> Iterator[str]:
    yield "| variant | own tasks (validation) | recovered gain, % | held-out (the other half) |"
    yield "|---|--:|--:|--:|"
    for method in results["average"]:
        own, gain = results["own_average"].get(method), results["recovered_gain"].get(method)
        gone = ", " in method and method.endswith("experts")  # a part of the pool: see the figure
        cells = [cell(None if gone else own), cell(None if gone else gain)]
        yield f"| {method} | " + " | ".join([*cells, cell(results["average"][method])]) + " |"


def task_table(results: Results, role: str) -> Iterator[str]:
    names = [name for name, task in results["tasks"].items() if task["role"] == role]
    methods = [
        method
        for method in results["average"]
        if any(results["results"][name][method]["score"] is not None for name in names)
    ]
    yield "| task | metric | n | " + " | ".join(methods) + " |"
    yield "|---|---|--:|" + "--:|" * len(methods)
    for name in names:
        task, scores = results["tasks"][name], results["results"][name]
        cells = [
            GONE if scores[m]["score"] is None else f"{scores[m]['score']:.1f}" for m in methods
        ]
        mark = " †" if task["contaminated"] else ""
        yield f"| {name}{mark} | {task['metric']} | {task['n']} | " + " | ".join(cells) + " |"


def described(results: Results) -> str:
    """One paragraph on what was compared."""
    roles = [task["role"] for task in results["tasks"].values()]
    settings, versions = results["settings"], results["versions"]
    ranks = len(results["experts"])
    return (
        f"{ranks} experts; {roles.count('own')} tasks of their own and {roles.count('heldout')} "
        f"held-out ones, at most {settings['limit']} examples of each, seed {settings['seed']}; "
        f"{settings['dtype']} on {versions['device']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, peft {versions['peft']}."
    )


# ---------------------------------------------------------------- figures


def forest(axes: Axes, values: Mapping[str, Any], *, colour: str, title: str, unit: str) -> None:
    """Scores with their intervals, best on top."""
    known = {name: v for name, v in values.items() if v["score"] is not None}
    names = sorted(known, key=lambda name: known[name]["score"])
    for place, name in enumerate(names):
        value = known[name]
        axes.plot([value["low"], value["high"]], [place, place], color=colour, linewidth=2)
        axes.plot(value["score"], place, "o", color=colour, markersize=5)
    if "phatgoose" in known:
        axes.axvline(known["phatgoose"]["score"], color="grey", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(unit, fontsize=9)
    axes.grid(axis="x", linewidth=0.3)


def draw_main(found: Mapping[tuple[str, str], Results], path: Path) -> None:
    pools = [pool for pool in POOLS if (pool, "report") in found]
    figure = Figure(figsize=(11, 5.2 * len(pools)), layout="constrained")
    grid = figure.subplots(len(pools), 2, squeeze=False)
    for row, pool in zip(grid, pools, strict=True):
        report = found[pool, "report"]
        title = f"{POOLS[pool]}, {len(report['experts'])} experts"
        gain = {m: v for m, v in report["recovered_gain"].items() if m != "own"}
        unit = "recovered gain, % (own expert: 100, base: 0), 95% interval"
        forest(row[0], gain, colour=COLOURS[pool], title=f"Own tasks: {title}", unit=unit)
        unit = "average score, 0 to 100, 95% interval"
        title = f"Held-out tasks: {title}"
        forest(row[1], report["average"], colour=COLOURS[pool], title=title, unit=unit)
    save(figure, path)


CURVES = {
    "experts per token (top_k)": {
        "1": "top_k 1",
        "2": "phatgoose",
        "4": "top_k 4",
        "all": "top_k all",
    },
    "temperature": {
        "0.3": "temperature 0.3",
        "0.5": "temperature 0.5",
        "1": "phatgoose",
        "2": "temperature 2.0",
    },
    "gate steps": {str(n): f"{n} gate steps" for n in (10, 30, 100, 300)},
    "strength of evidence": {
        "0": "phatgoose",
        **{str(n): f"evidence x {n}" for n in (1, 2, 4, 8, 16)},
    },
    "strength of adapter evidence": {
        "0": "phatgoose",
        **{str(n): f"adapter evidence x {n}" for n in (1, 2, 4, 8, 16)},
    },
}


def draw_settings(found: Mapping[tuple[str, str], Results], path: Path) -> None:
    """Recovered gain and held-out average over each knob, and over the size of the pool."""
    figure = Figure(figsize=(13, 11), layout="constrained")
    grid = figure.subplots(4, 3)
    rows = [("recovered_gain", "recovered gain, %"), ("average", "held-out average")]
    for number, (title, points) in enumerate(CURVES.items()):
        for offset, (key, unit) in enumerate(rows):
            axes = grid[2 * (number // 3) + offset][number % 3]
            for pool in POOLS:
                if (pool, "choose") in found:
                    curve(axes, found[pool, "choose"][key], points, pool)
            axes.set_title(title if not offset else "", fontsize=10)
            axes.set_xlabel(title if offset else "", fontsize=9)
            axes.set_ylabel(unit, fontsize=9)
            axes.grid(linewidth=0.3)
    for offset in range(2):
        axes = grid[2 + offset][2]
        for pool in POOLS:
            if (pool, "choose") in found:
                sizes(axes, found[pool, "choose"], pool, gain=not offset)
        axes.set_title("" if offset else "size of the pool", fontsize=10)
        axes.set_xlabel("experts, log scale" if offset else "", fontsize=9)
        axes.set_ylabel(rows[offset][1], fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks([2, 4, 8, 16, 32, 64], ["2", "4", "8", "16", "32", "64"])
        axes.grid(linewidth=0.3)
    handles, labels = grid[0][0].get_legend_handles_labels()
    for router, style in STYLES.items():
        handles.append(Line2D([], [], color="black", linestyle=style))
        labels.append(f"{router} (size of the pool)")
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    save(figure, path)


def curve(axes: Axes, values: Mapping[str, Any], points: Mapping[str, str], pool: str) -> None:
    known = {
        label: values[name]
        for label, name in points.items()
        if name in values and values[name]["score"] is not None
    }
    labels = list(points)
    places = [labels.index(label) for label in known]
    scores = [value["score"] for value in known.values()]
    low = [v["score"] - v["low"] for v in known.values()]
    high = [v["high"] - v["score"] for v in known.values()]
    style = {"color": COLOURS[pool], "marker": "o", "capsize": 2, "label": POOLS[pool]}
    axes.errorbar(places, scores, yerr=[low, high], **style)
    axes.set_xticks(range(len(labels)), labels)


def sizes(axes: Axes, results: Results, pool: str, *, gain: bool) -> None:
    """By the pool's size; the gain is over the tasks of the experts in it."""
    whole = {"phatgoose": "phatgoose", "phatgoose+evidence": "evidence x 4"}
    for router, style in STYLES.items():
        members = {
            len(about["experts"]): (method, list(about["experts"]))
            for method, about in results["methods"].items()
            if method.startswith(f"{router}, ")
        }
        if whole[router] in results["methods"]:
            members[len(results["experts"])] = (whole[router], list(results["experts"]))
        places = sorted(members)
        if gain:
            scores = [recovered(results, *members[size]) for size in places]
        else:
            scores = [results["average"][members[size][0]]["score"] for size in places]
        axes.plot(places, scores, style, marker="o", color=COLOURS[pool])


def recovered(results: Results, method: str, names: Sequence[str]) -> float:
    """(method - base) / (own - base) over these tasks, in percent; NaN where own is base."""
    totals = {
        kind: sum(results["results"][name][kind]["score"] for name in names)
        for kind in (method, "base", "own")
    }
    gain = totals["own"] - totals["base"]
    return 100 * (totals[method] - totals["base"]) / gain if gain else float("nan")


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------- the page


def write(out: Path, docs: Path) -> None:
    """Write DOCS/study.md, its figures, and the results it is made of."""
    found = collect(out, docs)
    if not any(part == "report" for _, part in found):
        raise SystemExit(f"{out}: holds no results. Run recipes/study/run.py first.")
    draw_main(found, docs / "study" / "methods.png")
    chosen = any(part == "choose" for _, part in found)
    if chosen:
        draw_settings(found, docs / "study" / "settings.png")
    parts = [FINDINGS.read_text(encoding="utf-8").rstrip(), "", "![](study/methods.png)", ""]
    for pool, title in POOLS.items():
        if (pool, "report") in found:
            parts += [f"## All methods, {title}", "", described(found[pool, "report"])]
            parts += [f"From [study/{pool}-report.json](study/{pool}-report.json).", ""]
            parts += [*main_table(found, pool), ""]
    for pool, title in POOLS.items():
        if (pool, "own") in found:
            parts += [f"## Own tasks alone, {title}", "", described(found[pool, "own"])]
            parts += [f"From [study/{pool}-own.json](study/{pool}-own.json), by", ""]
            methods = ",".join(found[pool, "own"]["own_average"])
            limit = found[pool, "own"]["settings"]["limit"]
            parts += ["```sh", "phatgoose eval --tasks OWN_TASKS --train-tasks TASKS \\"]
            parts += [f"    --methods {methods} \\", f"    --limit {limit} --out OUT", "```", ""]
            parts += [*own_table(found[pool, "own"]), ""]
    if chosen:
        parts += ["## Settings", "", "![](study/settings.png)", ""]
    for pool, title in POOLS.items():
        if (pool, "choose") in found:
            parts += [f"### {title.capitalize()}", "", described(found[pool, "choose"])]
            parts += [f"From [study/{pool}-choose.json](study/{pool}-choose.json).", ""]
            parts += [*settings_table(found[pool, "choose"]), ""]
    parts += ["## Every task", ""]
    for pool, title in POOLS.items():
        for role, what in (("heldout", "held-out tasks"), ("own", "the experts' own tasks")):
            if (pool, "report") in found:
                parts += ["<details>", f"<summary>{title.capitalize()}: {what}</summary>", ""]
                parts += [*task_table(found[pool, "report"], role), "", "</details>", ""]
    write_bytes(docs / "study.md", "\n".join(parts).encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/study"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    given = parser.parse_args()
    write(given.out, given.docs)
