"""Draws one task: where its tokens go by module, and what comes of that."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from phatgoose.analysis import charts
from phatgoose.analysis.picture import write_figure
from phatgoose.analysis.tally import Place
from phatgoose.analysis.tasks import TaskAnalysis
from phatgoose.analysis.view import STREAMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

_WIDTH = 14.0  # inches
_ROWS = 64  # experts with a row of their own
_COLUMNS = 128  # modules side by side


def draw_task(analysis: TaskAnalysis, path: str | Path) -> None:
    """Write a PNG of a task's routing: experts by module, and four charts below.

    A heat map has the share of each expert at each module, a panel for each kind of module, layers
    along x; experts are sorted by share, the Oracle's row is framed. Below: the Oracle's share by
    layer on prompt and answer tokens (where there is no Oracle: that of the most used expert),
    how many experts a token uses, and the sum and maximum of its weights.
    """
    from matplotlib.figure import Figure

    rows, left_out = _shown(analysis)
    bands = _bands(analysis.places)
    height = max(1.6, len(rows) * (0.2 if len(rows) <= 24 else 0.135)) + 0.75
    figure = Figure((_WIDTH, 0.9 + height * len(bands) + 3.0), layout="constrained")
    figure.suptitle(_headline(analysis), fontsize=13, fontweight="bold", parse_math=False)
    parts: Any = figure.subfigures(len(bands) + 1, 1, height_ratios=[height] * len(bands) + [3.0])
    part = analysis.by_module()
    largest = 100 * float(part[:, rows].max())
    wide = max(sum(max(len(panel), 2) for panel in panels) for panels in bands)
    for number, (band, panels) in enumerate(zip(parts[:-1], bands, strict=True)):
        _by_module(
            band,
            analysis,
            rows,
            panels=panels,
            part=part,
            largest=largest,
            wide=wide,
            left_out=left_out if not number else 0,
        )
    agreement, distinct, scale = parts[-1].subplots(1, 3, width_ratios=[1.2, 1, 1.2])
    subject = analysis.oracle or analysis.experts[rows[0]]
    _agreement(agreement, analysis, subject)
    _distinct(distinct, analysis)
    _scale(scale, analysis)
    write_figure(figure, path)


def _headline(analysis: TaskAnalysis) -> str:
    counts = analysis.tokens.max(1).values.tolist()
    facts = f"{analysis.examples} examples, {counts[0]:,} prompt and {counts[1]:,} answer tokens"
    where = f"{charts.cut(analysis.name, 40)}: which experts its tokens use ({facts})"
    if analysis.oracle is None:
        return f"{where}\nno Oracle expert is known"
    share = float(analysis.shares()[analysis.experts.index(analysis.oracle)])
    return (
        f"{where}\nOracle {charts.cut(analysis.oracle, 40)}: {100 * share:.1f}% of the weight, "
        f"rank {analysis.rank(analysis.oracle)} of {len(analysis.experts)}"
    )


def _shown(analysis: TaskAnalysis) -> tuple[list[int], int]:
    """Choose the experts with a row, the most used first. No expert is last, if it has a share."""
    share = analysis.shares()
    order = share[:-1].argsort(descending=True, stable=True).tolist()
    rows = order[:_ROWS]
    if analysis.oracle is not None:
        oracle = analysis.experts.index(analysis.oracle)
        if oracle not in rows:
            rows[-1] = oracle
    left_out = len(order) - len(rows)
    return rows + [len(order)] * bool(share[-1] > 0), left_out


def _bands(places: Sequence[Place]) -> list[list[list[int]]]:
    """Bands of panels of modules of one kind: a stack starts a band, so does what is too wide."""
    bands: list[list[list[int]]] = []
    wide = 0
    for stack, members in groupby(range(len(places)), key=lambda i: places[i].stack):
        panels: dict[str, list[int]] = {}
        for index in members:
            panels.setdefault(places[index].kind, []).append(index)
        if not bands or stack != 2:  # a module in no layer needs no band of its own
            bands.append([])
            wide = 0
        for panel in panels.values():
            if bands[-1] and wide + len(panel) > _COLUMNS:
                bands.append([])
                wide = 0
            bands[-1].append(panel)
            wide += len(panel)
    return bands


def _by_module(
    figure: "SubFigure",
    analysis: TaskAnalysis,
    rows: list[int],
    *,
    panels: list[list[int]],
    part: Float[Tensor, "M E+1"],
    largest: float,
    left_out: int,
    wide: int,
) -> None:
    names = [*analysis.experts, "no expert"]
    widths = [max(len(panel), 2) for panel in panels]
    if wide > sum(widths):  # cells of all bands are of one size
        widths.append(wide - sum(widths))
    axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    axes = axes[: len(panels)]
    for axis, panel in zip(axes, panels, strict=True):
        image = axis.pcolormesh(
            100 * part[panel][:, rows].T.numpy(),
            cmap=charts.MAP,
            vmin=0,
            vmax=largest,
            ec="white",
            lw=0.3,
        )
        charts.heat(axis, "")
        axis.set_title(charts.cut(analysis.places[panel[0]].kind, 18), **charts.TEXT)
        layers = [analysis.places[index].layer.rpartition(" ")[2] for index in panel]
        step = -(-len(panel) // 8)
        if analysis.places[panel[0]].stack == 2:
            layers = [""]
        axis.set_xticks(
            charts.centres(layers)[::step], layers[::step], fontsize=7.5, parse_math=False
        )
        axis.set_yticks([])  # shared ones would be laid out for each panel
        axis.invert_yaxis()
    size = 8.5 if len(rows) <= 24 else 7.5
    axes[0].set_yticks(
        charts.centres(rows), [charts.cut(names[i]) for i in rows], fontsize=size, parse_math=False
    )
    if analysis.oracle is not None:
        oracle = rows.index(analysis.experts.index(analysis.oracle))
        for axis, panel in zip(axes, panels, strict=True):
            charts.frame(axis, (0, oracle), len(panel), 1)
        axes[0].get_yticklabels()[oracle].set(color=charts.ORACLE, fontweight="bold")
    stack = analysis.places[panels[0][0]].layer.rpartition(" ")[0]
    more = f"; {left_out} less used experts are not shown" if left_out else ""
    figure.supxlabel(f"{stack} layer{more}".strip(), fontsize=8.5)
    bar = figure.colorbar(image, ax=axes, pad=0.008, fraction=0.02, aspect=25)
    bar.set_label("share of routing weight, %", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _agreement(axis: "Axes", analysis: TaskAnalysis, subject: str) -> None:
    what = "the Oracle" if analysis.oracle else f"the most used expert, {charts.cut(subject, 18)}"
    layers, index = list(analysis.layers), analysis.experts.index(subject)
    for part, colour, mark in (("prompt", charts.BLUE, "o"), ("answer", charts.GREEN, "s")):
        share = 100 * analysis.by_layer(part)[:, index]  # type: ignore[arg-type]
        _line(axis, layers, share, colour, mark, f"{part} tokens")
    chance = 100 / len(analysis.experts)
    axis.axhline(chance, color=charts.FAINT, ls=":", lw=1.2, label="chance")
    charts.plain(axis, f"Weight to {what}", x="layer", y="share, %")
    axis.set_ylim(bottom=0)
    charts.layer_ticks(axis, layers, 12)
    axis.legend(fontsize=7.5, frameon=False)


def _distinct(axis: "Axes", analysis: TaskAnalysis) -> None:
    """Draw histograms, one line for each stream of tokens."""
    colours = {"decoder": charts.BLUE, "encoder": charts.GREEN, "cross": charts.PURPLE}
    several = len(analysis.distinct) > 1
    for stream, counts in analysis.distinct.items():
        percent = (100 * counts / counts.sum()).numpy()
        label = f"{STREAMS[stream]}, " if several else ""
        axis.stairs(
            percent, torch.arange(len(counts) + 1).numpy() - 0.5, fill=not several,
            color=colours[stream], lw=1.4,
            label=f"{label}mean {analysis.distinct_mean(stream):.1f}",
        )  # fmt: skip
    used = torch.stack(list(analysis.distinct.values())).sum(0).nonzero().flatten()
    axis.set_xlim(int(used.min()) - 1, int(used.max()) + 1)
    charts.plain(
        axis,
        "Experts a token uses",
        x=f"of {len(analysis.experts)}, over all modules",
        y="tokens, %",
    )
    axis.legend(fontsize=7.5, frameon=False, handlelength=1)


def _scale(axis: "Axes", analysis: TaskAnalysis) -> None:
    layers = list(analysis.layers)
    mean, spread = analysis.scale_by_layer()
    for column, name, colour, mark in (
        (0, "sum", charts.BLUE, "o"),
        (1, "maximum", charts.GREEN, "s"),
    ):
        low, high = mean[:, column] - spread[:, column], mean[:, column] + spread[:, column]
        axis.fill_between(
            range(len(layers)), low.numpy(), high.numpy(), color=colour, alpha=0.18, lw=0
        )
        _line(axis, layers, mean[:, column], colour, mark, name)
    axis.axhline(1, color=charts.FAINT, ls=":", lw=1.2, label="one adapter, as trained")
    charts.plain(
        axis, "Effective scale of a module", x="layer (band: ± 1 s.d. of tokens)", y="weight"
    )
    axis.set_ylim(0, max(1.1, 1.05 * float((mean + spread).max())))
    charts.layer_ticks(axis, layers, 12)
    axis.legend(fontsize=7.5, frameon=False, loc="lower right")


def _line(
    axis: "Axes", layers: list[str], y: Float[Tensor, " L"], colour: str, mark: str, label: str
) -> None:
    """Draw a line over layers, broken between stacks."""
    for number, (start, end) in enumerate(charts.spans(layers)):
        axis.plot(
            range(start, end), y[start:end].numpy(), color=colour, marker=mark, ms=3.5, lw=1.6,
            label=label if not number else None,
        )  # fmt: skip
