"""Draws one example, token by token and layer by layer."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from phatgoose.analysis.charts import INK, ORACLE, TEXT, centres, cut, heat
from phatgoose.analysis.picture import write_figure
from phatgoose.analysis.summary import layers, shares, token_weights
from phatgoose.analysis.tasks import SENTENCE, TaskAnalysis
from phatgoose.analysis.tokens import token_table
from phatgoose.analysis.view import GREY, LIGHT, STREAMS
from phatgoose.nn import Stream

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 14.0  # inches
_COLOURS = [colour for colour in LIGHT if colour != "#EE8866"][:7]  # too near the Oracle's


def draw_sentence(analysis: TaskAnalysis, tokenizer: Any, path: str | Path) -> None:
    """Write a PNG of one example: the expert with most weight at each token and layer.

    Tokens go along x (the last 80 of a longer example), layers along y. The stronger the colour,
    the larger that expert's share. The Oracle's colour is the same in every figure. The seven other
    experts that lead most often have a colour each, and the rest are grey. An encoder-decoder has a
    panel for each side.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    streams: list[Stream] = [s for s in ("encoder", "decoder") if s in analysis.sentence.tokens]
    given = {stream: _by_layer(analysis, stream) for stream in streams}
    colours = _colours(analysis, given)
    heights = [0.24 * len(names) + 1.1 for names, _ in given.values()]
    figure = Figure((_WIDTH, sum(heights) + 1.3), layout="constrained")
    figure.suptitle(
        f"{cut(analysis.name, 40)}: the leading expert of each token in each layer of one example",
        fontsize=13, fontweight="bold", parse_math=False,
    )  # fmt: skip
    axes = figure.subplots(len(streams), height_ratios=heights, squeeze=False)[:, 0]
    for axis, stream in zip(axes, streams, strict=True):
        _panel(axis, analysis, tokenizer, stream, given[stream], colours)
    names = [*analysis.experts, "no expert"]
    handles = [
        Patch(color=colour, label=cut(names[i]) + " (Oracle)" * (names[i] == analysis.oracle))
        for i, colour in colours.items()
    ]
    leaders = {i for _, part in given.values() for i in part.argmax(-1).flatten().tolist()}
    if leaders - colours.keys():
        handles.append(Patch(color=GREY, label="any other"))
    figure.legend(handles=handles, loc="outside lower left", ncols=5, fontsize=8.5, frameon=False)
    write_figure(figure, path)


def _by_layer(analysis: TaskAnalysis, stream: Stream) -> tuple[list[str], Float[Tensor, "L N E+1"]]:
    """Return the layers that see this stream, and the shares of its tokens there."""
    trace = analysis.sentence
    mine = {
        name: modules
        for name, modules in layers(trace).items()
        if any(trace.streams[module] == stream for module in modules)
    }
    table = [shares(token_weights(trace, stream, modules)) for modules in mine.values()]
    return list(mine), torch.stack(table)[:, -SENTENCE:]


def _colours(
    analysis: TaskAnalysis, given: dict[Stream, tuple[list[str], Float[Tensor, "L N E+1"]]]
) -> dict[int, str]:
    """Colour the Oracle, then the experts that lead most often."""
    count = len(analysis.experts)
    leading = sum(
        torch.bincount(part.argmax(-1).flatten(), minlength=count + 1) for _, part in given.values()
    )
    assert isinstance(leading, Tensor)
    colours: dict[int, str] = {}
    if analysis.oracle is not None:
        colours[analysis.experts.index(analysis.oracle)] = ORACLE
    left = iter(_COLOURS)
    for index in leading.argsort(descending=True, stable=True).tolist():
        if index not in colours and leading[index] and (colour := next(left, None)):
            colours[index] = colour
    return colours


def _panel(
    axis: "Axes",
    analysis: TaskAnalysis,
    tokenizer: Any,
    stream: Stream,
    given: tuple[list[str], Float[Tensor, "L N E+1"]],
    colours: dict[int, str],
) -> None:
    from matplotlib.colors import to_rgb

    names, part = given
    share, leader = part.max(-1)
    palette = torch.tensor([to_rgb(colours.get(i, GREY)) for i in range(part.shape[-1])])
    # From a third of the colour, so that it can still be told, to all of it.
    strength = (0.33 + 0.67 * share / share.max().clamp_min(1e-12)).unsqueeze(-1)
    image = 1 - strength * (1 - palette[leader].double())
    axis.imshow(image.numpy(), aspect="auto", extent=(0, part.shape[1], len(names), 0))
    for x in range(1, part.shape[1]):
        axis.axvline(x, color="white", lw=0.5)
    for y in range(1, len(names)):
        axis.axhline(y, color="white", lw=0.5)
    tokens = [t for t in token_table(analysis.sentence, tokenizer) if t.stream == stream]
    left = len(tokens) - part.shape[1]
    heat(axis, "")
    axis.set_xticks(
        centres(tokens[left:]), [cut(t.text, 14) for t in tokens[left:]], rotation=90, **TEXT
    )
    axis.set_yticks(centres(names), names, **TEXT)
    axis.set_ylabel("layer", fontsize=9)
    side = f"{STREAMS[stream]}, " if len(analysis.sentence.tokens) > 1 else ""
    before = f"{left} tokens before are not shown; " if left else ""
    heading = f"{side}{before}full colour: {100 * float(share.max()):.0f}% of the weight"
    border = analysis.prompt - left
    if not analysis.sentence.tokens.keys() - {"decoder"} and 0 < border < part.shape[1]:
        axis.axvline(border, color=INK, lw=2)
        heading += "; black line: the answer begins"
    axis.set_title(heading, loc="left", fontsize=9.5, parse_math=False)
