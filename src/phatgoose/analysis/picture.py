"""A trace as a picture."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phatgoose.analysis.view import STREAMS, Passage, View, look
from phatgoose.files import write_bytes
from phatgoose.nn import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 12.0  # inches
_TOKENS = 80  # that fit side by side
_PROMPTS = 24  # rows of the first panel


def save_picture(
    trace: Trace,
    tokenizer: Any,
    path: str | Path,
    *,
    title: str = "Routing",
    labels: Sequence[str] | None = None,
) -> None:
    """Write a PNG of heat maps: experts by sequence (if several), by layer, and by token.

    Shares of the routing weight, in %. The last panel has the first sequence (of an
    encoder-decoder: of each side), up to 80 tokens of it.
    """
    from matplotlib.figure import Figure

    view = look(trace, tokenizer, labels)
    first = {p.stream: p for p in reversed(view.passages) if p.tokens}
    several = len(view.passages) > len(first)
    layer_height = min(0.24, 7 / len(view.layers))
    heights = [layer_height * len(view.layers) + 0.1]
    heights += [0.19 * len(view.columns) + 0.1] * len(first)
    if several:
        heights.insert(0, 0.27 * min(len(view.passages), _PROMPTS) + 0.1)
    figure = Figure((_WIDTH, sum(heights) + 1.6 * len(heights) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=14, fontweight="bold", parse_math=False)
    axes = list(figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0])
    if several:
        _by_sequence(axes.pop(0), view)
    _by_layer(axes.pop(0), view)
    for axis, passage in zip(axes, reversed(first.values()), strict=True):
        _by_token(axis, view, passage)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script the font lacks shows as boxes
        figure.savefig(buffer, format="png", dpi=120)
    write_bytes(Path(path), buffer.getvalue())


def _by_sequence(axis: "Axes", view: View) -> None:
    passages = view.passages[:_PROMPTS]
    streams = {passage.stream for passage in passages}
    names = [
        p.label + (f" ({STREAMS[p.stream]})" if len(streams) > 1 else "") for p in passages
    ]
    shares = [p.shares.mean(0).tolist() for p in passages]
    more = f" (first {_PROMPTS} of {len(view.passages)})" if len(view.passages) > _PROMPTS else ""
    _heat(axis, shares, rows=names, columns=view.columns, title="Experts of each sequence" + more)
    _slant(axis)
    _numbers(axis, shares)


def _by_layer(axis: "Axes", view: View) -> None:
    shares = view.by_layer.tolist()
    _heat(axis, shares, rows=view.layers, columns=view.columns, title="Experts in each layer")
    _slant(axis)
    axis.set_ylabel("layer")
    if len(view.layers) <= 16:
        _numbers(axis, shares)


def _by_token(axis: "Axes", view: View, passage: Passage) -> None:
    count = min(len(passage.tokens), _TOKENS)
    part = f", first {count} of {len(passage.tokens)} tokens" if count < len(passage.tokens) else ""
    _heat(
        axis,
        passage.shares[:count].T.tolist(),
        rows=view.columns,
        columns=[token.text for token in passage.tokens[:count]],
        title=f"Experts of each token of “{passage.label}” ({STREAMS[passage.stream]}{part})",
    )
    axis.tick_params(axis="x", rotation=90)


def _heat(
    axis: "Axes", shares: list[list[float]], *, rows: list[str], columns: list[str], title: str
) -> None:
    percent = [[100 * share for share in row] for row in shares]
    largest = max((max(row) for row in percent), default=0) or 1
    image = axis.pcolormesh(percent, cmap="Blues", vmin=0, vmax=largest, edgecolor="w", lw=0.5)
    axis.invert_yaxis()
    small = {"fontsize": 8.5, "parse_math": False}
    axis.set_xticks([i + 0.5 for i in range(len(columns))], columns, **small)
    axis.set_yticks([i + 0.5 for i in range(len(rows))], rows, **small)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, loc="left", fontsize=11, parse_math=False)
    bar = axis.figure.colorbar(image, ax=axis, pad=0.01, aspect=18, fraction=0.03)
    bar.set_label("share of weight, %", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _slant(axis: "Axes") -> None:
    axis.tick_params(axis="x", rotation=40)
    for text in axis.get_xticklabels():
        text.set(ha="right", rotation_mode="anchor")


def _numbers(axis: "Axes", shares: list[list[float]]) -> None:
    largest = max(map(max, shares))
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if share >= 0.01:
                colour = "white" if share > 0.6 * largest else "#222222"
                axis.text(
                    x + 0.5, y + 0.52, f"{100 * share:.0f}", ha="center", va="center",
                    fontsize=7.5, color=colour,
                )  # fmt: skip
