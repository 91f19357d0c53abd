"""Draws a trace as a picture."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from phatgoose.analysis.view import GREY, Passage, View, look
from phatgoose.files import write_bytes
from phatgoose.nn import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 12.0  # inches
_TOKENS = 80  # that fit side by side
_SEQUENCES = 24  # rows of the first panel
_NUMBERED = 32  # more rows are too low for numbers


def save_picture(
    trace: Trace,
    tokenizer: Any,
    path: str | Path,
    *,
    title: str = "Routing",
    labels: Sequence[str] | None = None,
) -> None:
    """Write a PNG of heat maps: experts by sequence (if several), by layer, and by token.

    Shares are of the routing weight, in %. The last panel has up to 80 tokens of the first
    sequence. An encoder-decoder has one such panel for each side.
    """
    from matplotlib.figure import Figure

    view = look(trace, tokenizer, labels)
    first = list({p.stream: p for p in reversed(view.passages)}.values())[::-1]
    several = view.passages[:_SEQUENCES] if len(view.passages) > len(first) else []
    heights = [0.27 * len(several)] if several else []
    heights += [min(0.24 * len(view.layers), 8.0)]
    heights += [0.19 * len(view.columns)] * len(first)
    figure = Figure((_WIDTH, sum(heights) + 1.5 * len(heights) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=14, fontweight="bold", parse_math=False)
    axes = iter(figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0])
    if several:
        _by_sequence(next(axes), view, several)
    _heat(next(axes), view, view.by_layer, heads=view.layers, title="Experts in each layer")
    for passage in first:
        _by_token(next(axes), view, passage)
    write_figure(figure, path)


def write_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure as PNG, atomically."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script the font lacks shows as boxes
        figure.savefig(buffer, format="png", dpi=120)
    write_bytes(Path(path), buffer.getvalue())


def _by_sequence(axis: "Axes", view: View, passages: list[Passage]) -> None:
    left = len(view.passages) - len(passages)
    title = "Experts of each sequence" + (f" ({left} more are not shown)" if left else "")
    shares = torch.stack([passage.shares.mean(0) for passage in passages])
    _heat(axis, view, shares, heads=[view.heading(passage) for passage in passages], title=title)


def _by_token(axis: "Axes", view: View, passage: Passage) -> None:
    heads = [token.text for token in passage.tokens[:_TOKENS]]
    left = len(passage.tokens) - len(heads)
    title = f"Experts of each token: {view.heading(passage)}" + (
        f" ({left} more are not shown)" if left else ""
    )
    _heat(axis, view, passage.shares[:_TOKENS], heads=heads, title=title, across=True)


def _heat(
    axis: "Axes",
    view: View,
    shares: Float[Tensor, "n C"],
    *,
    heads: list[str],
    title: str,
    across: bool = False,
) -> None:
    """Put experts in columns, with numbers; or, if `heads` go across, in rows.

    The sum of all other experts is grey: it would outshine every single one.
    """
    percent = 100 * shares.clone()
    largest = float(percent[:, : view.shown].max()) or 1.0
    if not across and len(heads) <= _NUMBERED:
        _numbers(axis, percent, largest, view.shown)
    percent[:, view.shown :] = torch.nan
    image = axis.pcolormesh(
        (percent.T if across else percent).numpy(),
        cmap="Blues", vmin=0, vmax=largest, edgecolor="white", lw=0.6,
    )  # fmt: skip
    axis.set_facecolor(GREY)
    axis.invert_yaxis()
    below, beside = (heads, view.columns) if across else (view.columns, heads)
    style: dict[str, Any] = {"fontsize": 8.5, "parse_math": False}
    slant = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(_centres(below), below, **({"rotation": 90} if across else slant), **style)
    axis.set_yticks(_centres(beside), beside, **style)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, loc="left", fontsize=11, parse_math=False)
    bar = axis.figure.colorbar(image, ax=axis, pad=0.01, fraction=0.02, aspect=1.6 * len(beside))
    bar.set_label("share of weight, %", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _centres(names: list[str]) -> list[float]:
    return [i + 0.5 for i in range(len(names))]


def _numbers(axis: "Axes", percent: Float[Tensor, "n C"], largest: float, shown: int) -> None:
    for y, row in enumerate(percent.tolist()):
        for x, value in enumerate(row):
            if value >= 0.5:
                dark = x < shown and value > 0.6 * largest
                axis.text(
                    x + 0.5, y + 0.52, f"{value:.0f}", ha="center", va="center", fontsize=7.5,
                    color="white" if dark else "#222222",
                )  # fmt: skip
