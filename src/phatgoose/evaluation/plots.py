"""Draws an evaluation: averages and recovered gains by method, with intervals."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phatgoose.evaluation.summary import REFERENCE
from phatgoose.files import write_bytes

REFERENCES = ("base", "own", "oracle", "best_individual", "multitask")  # no ways to use a pool
COLOURS = f"red: {REFERENCE}; blue: other ways to use a pool; grey: references"
Results = Mapping[str, Any]


def draw(results: Results, out: Path) -> list[Path]:
    """Write average.png, and recovered-gain.png if a gain is known."""
    over = results["average_over"]
    tasks = [name for name, task in results["tasks"].items() if not task["unanswerable"]]
    counts = {r: sum(results["tasks"][t]["role"] == r for t in tasks) for r in ("heldout", "own")}
    what = "held-out tasks" if over == "heldout" else "tasks of the experts"
    made = [
        _forest(
            results["average"],
            out / "average.png",
            title=f"Average score on {counts[over]} {what}",
            label="mean of the tasks' scores, 0 to 100, with 95% interval",
            line=("base", results["average"].get("base")),
        )
    ]
    made.append(
        _forest(
            results["recovered_gain"],
            out / "recovered-gain.png",
            title=f"Gain recovered on {counts['own']} tasks of the experts, served as one stream",
            label="(method − base) / (own expert − base), %, with 95% interval",
            line=("no gain", {"score": 0.0}),
        )
    )
    return [path for path in made if path is not None]


def _forest(
    cells: Mapping[str, Mapping[str, Any]],
    path: Path,
    *,
    title: str,
    label: str,
    line: tuple[str, Mapping[str, Any] | None],
) -> Path | None:
    """Draw a point and its interval for each method, the best on top; None if nothing is known."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = {name: cell for name, cell in cells.items() if cell["score"] is not None}
    if not known:
        path.unlink(missing_ok=True)  # of an earlier run
        return None
    names = sorted(known, key=lambda name: known[name]["score"])
    figure = Figure(figsize=(8, 1.7 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        cell = known[name]
        colour = _colour(name)
        axes.plot([cell["low"], cell["high"]], [place, place], color=colour, linewidth=2.5)
        axes.plot(cell["score"], place, "o", color=colour, markersize=7)
        axes.annotate(
            f"{cell['score']:.1f}",
            (cell["score"], place),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    what, where = line
    if where is not None and where["score"] is not None:
        axes.axvline(where["score"], color="0.6", linestyle="--", linewidth=1, zorder=0)
        axes.annotate(
            what,
            (where["score"], 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -10),
            textcoords="offset points",
            color="0.45",
            fontsize=8,
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.2)
    axes.set_xlabel(f"{label}\n{COLOURS}")
    axes.set_title(title)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})  # the same bytes always
    write_bytes(path, buffer.getvalue())
    return path


def _colour(name: str) -> str:
    if name == REFERENCE:
        return "tab:red"
    return "0.5" if name in REFERENCES else "tab:blue"
