"""Draws all tasks: which find their expert, and how evenly layers use the pool."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from phatgoose.analysis import charts
from phatgoose.analysis.picture import write_figure
from phatgoose.analysis.tasks import TaskAnalysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUMBERED = 24  # more columns are too narrow for numbers
_COLUMNS = 80  # experts with a column of their own
_NAMED = 6  # lines that can be told apart
_LINES = (charts.BLUE, "#E69F00", charts.GREEN, charts.PURPLE, "#56B4E9", charts.INK)


def draw_overview(analyses: Mapping[str, TaskAnalysis], path: str | Path) -> None:
    """Write a PNG of tasks by experts: the share of routing weight, each task's Oracle framed.

    Tasks are sorted by the share of their Oracle. Those without one come last, by their largest
    share. Experts stand in the order of the tasks whose Oracle they are. So the diagonal is dark
    where tokens find their expert.
    """
    from matplotlib.figure import Figure

    rows = sorted(analyses.values(), key=_found, reverse=True)
    shares = 100 * torch.stack([row.shares() for row in rows])
    names = [*rows[0].experts, "no expert"]
    columns = _columns(rows, names, shares.sum(0).tolist())
    left_out = len(names) - 1 - len([c for c in columns if c < len(names) - 1])
    small = len(rows) > _NUMBERED or len(columns) > _NUMBERED
    cell_width, cell_height = (0.16, 0.15) if small else (0.44, 0.27)
    width, height = max(5.0, cell_width * len(columns)), max(1.0, cell_height * len(rows))
    figure = Figure((width + 3.6, height + 2.6), layout="constrained")
    axis = figure.add_subplot()
    # Where all experts are used alike, nothing is to look dark.
    largest = max(float(shares[:, columns].max()), 4 * 100 / (len(names) - 1))
    image = axis.pcolormesh(
        shares[:, columns].numpy(),
        cmap=charts.MAP,
        vmin=0,
        vmax=largest,
        ec="white",
        lw=0.3 if small else 0.6,
    )
    charts.heat(axis, "")
    figure.suptitle("Do tokens find their expert?", fontsize=13, fontweight="bold")
    axis.set_title(_verdict(rows), loc="left", fontsize=9.5, parse_math=False)
    style = {**charts.TEXT, "fontsize": 7.5 if small else 8.5}
    axis.set_yticks(charts.centres(rows), [charts.cut(row.name) for row in rows], **style)
    axis.set_xticks(
        charts.centres(columns), [charts.cut(names[c]) for c in columns],
        rotation=90 if small else 45, rotation_mode="anchor",
        ha="right", va="center" if small else "top", **style,
    )  # fmt: skip
    axis.set_ylabel("task", fontsize=9)
    axis.set_xlabel(
        "expert" + (f" ({left_out} less used are not shown)" if left_out else ""), fontsize=9
    )
    axis.invert_yaxis()
    for y, row in enumerate(rows):
        if row.oracle is not None:
            charts.frame(axis, (columns.index(names.index(row.oracle)), y), 1, 1)
    if not small:
        _numbers(axis, shares[:, columns].tolist(), largest)
    bar = figure.colorbar(image, ax=axis, pad=0.01, fraction=0.03, aspect=30)
    bar.set_label("share of the task's routing weight, %", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    write_figure(figure, path)


def draw_entropy(analyses: Mapping[str, TaskAnalysis], path: str | Path) -> None:
    """Write a PNG of the entropy of each layer's shares, in bits, a line for each task.

    The top line is the most that there could be, with every expert used alike. Of many tasks the
    three most and the three least even are coloured and named. The rest are grey.
    """
    from matplotlib.figure import Figure

    lines = {name: analysis.entropy_by_layer() for name, analysis in analyses.items()}
    order = sorted(lines, key=lambda name: -float(lines[name].mean()))
    half = _NAMED // 2
    named = order if len(order) <= _NAMED else order[:half] + order[-half:]
    layers = list(next(iter(analyses.values())).layers)
    most = max(analysis.most_entropy for analysis in analyses.values())
    figure = Figure((max(8.0, min(14.0, 0.4 * len(layers) + 4)), 4.6), layout="constrained")
    axis = figure.add_subplot()
    for name in order:
        colour = _LINES[named.index(name)] if name in named else "#CCCCCC"
        for number, (start, end) in enumerate(charts.spans(layers)):
            axis.plot(
                range(start, end), lines[name][start:end].numpy(), color=colour, marker="o",
                ms=3 if name in named else 0, lw=1.8 if name in named else 0.9,
                zorder=3 if name in named else 2,
                label=f"{charts.cut(name)} ({float(lines[name].mean()):.2f})"
                if name in named and not number else None,
            )  # fmt: skip
    if len(named) < len(order):
        axis.plot([], [], color="#CCCCCC", label=f"{len(order) - len(named)} other tasks")
    axis.axhline(most, color=charts.FAINT, ls="--", lw=1.3, label=f"all alike ({most:.2f})")
    charts.plain(
        axis,
        "How evenly each layer's tokens, together, use the pool",
        x="layer",
        y="entropy of shares, bits",
    )
    least = min(float(line.min()) for line in lines.values())
    axis.set_ylim(
        max(0.0, least - 0.15 * (most - least) - 0.1), most + 0.06 * (most - least) + 0.05
    )
    charts.layer_ticks(axis, layers)
    axis.legend(
        title="task (mean, bits)", fontsize=8, title_fontsize=8.5, frameon=False,
        loc="center left", bbox_to_anchor=(1.01, 0.5),
    )  # fmt: skip
    write_figure(figure, path)


def _found(analysis: TaskAnalysis) -> tuple[bool, float]:
    shares = analysis.shares()[:-1]
    if analysis.oracle is None:
        return False, float(shares.max())
    return True, float(shares[analysis.experts.index(analysis.oracle)])


def _columns(rows: list[TaskAnalysis], names: list[str], total: list[float]) -> list[int]:
    """The experts: the tasks' Oracles in the order of the tasks, then others by falling share."""
    none = len(names) - 1
    oracles = dict.fromkeys(names.index(row.oracle) for row in rows if row.oracle is not None)
    others = sorted(set(range(none)) - set(oracles), key=lambda i: -total[i])
    return [*oracles, *others][: max(_COLUMNS, len(oracles))] + [none] * (total[none] > 0)


def _verdict(rows: list[TaskAnalysis]) -> str:
    known = [row for row in rows if row.oracle is not None]
    if not known:
        return "No task's Oracle expert is known."
    first = sum(row.rank(row.oracle) == 1 for row in known if row.oracle is not None)
    mean = sum(_found(row)[1] for row in known) / len(known)
    return (
        f"The Oracle (framed) has most weight for {first} of {len(known)} tasks that have one; its "
        f"mean share is {100 * mean:.0f}%, chance {100 / len(rows[0].experts):.0f}%."
    )


def _numbers(axis: "Axes", values: list[list[float]], largest: float) -> None:
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value >= 0.5:
                axis.text(
                    x + 0.5, y + 0.52, f"{value:.0f}", ha="center", va="center", fontsize=7.5,
                    color="white" if value > 0.6 * largest else charts.INK,
                )  # fmt: skip
