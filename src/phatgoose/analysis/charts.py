"""Holds what the figures of task analyses share: colours, names, axes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from phatgoose.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which the colour-blind can tell apart. https://jfly.uni-koeln.de/color/
ORACLE = "#D55E00"  # the right expert, in every figure
BLUE, GREEN, PURPLE, INK, FAINT = "#0072B2", "#009E73", "#CC79A7", "#222222", "#999999"
MAP = "Blues"
TEXT: dict[str, Any] = {"fontsize": 8.5, "parse_math": False}
_LONGEST = 26  # characters of a name


def cut(name: str, longest: int = _LONGEST) -> str:
    """Cut a name so that it fits beside an axis."""
    name = visible(name)
    return name if len(name) <= longest else name[: longest - 1] + "…"


def plain(axis: "Axes", title: str, *, x: str = "", y: str = "") -> None:
    """Draw title, units and light lines of a chart."""
    axis.set_title(title, loc="left", fontsize=10.5, parse_math=False)
    axis.set_xlabel(x, **TEXT)
    axis.set_ylabel(y, **TEXT)
    axis.tick_params(labelsize=8.5, length=2)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#E5E5E5", lw=0.6)
    axis.set_axisbelow(True)


def heat(axis: "Axes", title: str) -> None:
    """Draw the title of a heat map, which needs no frame."""
    axis.set_title(title, loc="left", fontsize=10.5, parse_math=False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def frame(axis: "Axes", corner: tuple[float, float], width: float, height: float) -> None:
    """Make the frame that marks the Oracle in a heat map."""
    from matplotlib.patches import Rectangle

    axis.add_patch(
        Rectangle(corner, width, height, fill=False, ec=ORACLE, lw=1.6, clip_on=False, zorder=3)
    )


def centres(names: Sequence[Any]) -> list[float]:
    return [i + 0.5 for i in range(len(names))]


def layer_ticks(axis: "Axes", layers: Sequence[str], most: int = 24) -> None:
    """Put layers along x, centred on whole numbers. If there are many, only some are named."""
    step = -(-len(layers) // most)
    at = range(0, len(layers), step)
    style: dict[str, Any] = {}
    if max(map(len, layers)) > 3:
        style = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(list(at), [cut(layers[i], 14) for i in at], parse_math=False, **style)
    axis.set_xlim(-0.4, len(layers) - 0.6)


def spans(layers: Sequence[str]) -> list[tuple[int, int]]:
    """Return first and last + 1 of each stack's layers. No line may run on to the next."""
    stacks = [layer.rpartition(" ")[0] if layer[-1:].isdecimal() else layer for layer in layers]
    breaks = [i for i in range(1, len(stacks)) if stacks[i] != stacks[i - 1]]
    return list(pairwise([0, *breaks, len(layers)]))
