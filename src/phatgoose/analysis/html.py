"""Shows a trace as one web page that needs nothing else."""

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from phatgoose.analysis.summary import layers, shares, token_weights
from phatgoose.analysis.view import Passage, View, look
from phatgoose.files import write_bytes
from phatgoose.nn import Trace

_NAMED = 3  # experts named for a token, and for each of its layers


def render_html(
    trace: Trace,
    tokenizer: Any,
    *,
    title: str = "Routing",
    labels: Sequence[str] | None = None,
) -> str:
    """Make one page of the experts' shares, a heat map by layer, and each sequence.

    A sequence has its text and a heat map of experts by token. Each token has the colour and number
    of its leading expert, and shows its experts by layer on demand. The page asks no other host for
    anything, follows the reader's light or dark setting, and works with the keyboard.
    """
    view = look(trace, tokenizer, labels)
    page = Template((files(__package__) / "page.html").read_text(encoding="utf-8"))
    count = sum(len(passage.tokens) for passage in view.passages)
    facts = (
        f"{count} tokens in {len(view.passages)} sequences, {len(trace.names)} experts, "
        f"{len(view.layers)} layers with {len(trace.experts)} routed modules, "
        f"up to {trace.top_k} experts per token and module."
    )
    return page.substitute(
        title=escape(title),
        facts=facts,
        colours=_colours(view),
        legend=_legend(view),
        layers=_table(view, view.layers, view.by_layer, "layer"),
        sequences=_sequences(view),
        passages="\n".join(_passage(view, number) for number in range(len(view.passages))),
        data=_data(trace, view),
    )


def save_html(
    trace: Trace,
    tokenizer: Any,
    path: str | Path,
    *,
    title: str = "Routing",
    labels: Sequence[str] | None = None,
) -> None:
    """Write the page of `render_html` to a file."""
    write_bytes(Path(path), render_html(trace, tokenizer, title=title, labels=labels).encode())


def _colours(view: View) -> str:
    pairs = map(view.colours, range(len(view.columns)))
    return "\n".join(f".c{i} {{ background: {b}; color: {f}; }}" for i, (b, f) in enumerate(pairs))


def _legend(view: View) -> str:
    return "\n".join(
        f'<li><span class="chip c{i}">{view.mark(i)}</span><b>{escape(name)}</b>'
        f"<i>{100 * share:.1f}%</i></li>"
        for i, (name, share) in enumerate(zip(view.columns, view.shares.tolist(), strict=True))
    )


def _passage(view: View, number: int) -> str:
    passage = view.passages[number]
    heads = [token.text for token in passage.tokens]
    return (
        f"<section><h3>{number + 1}. {escape(view.heading(passage))}</h3>\n"
        f'<div class="text">{_text(view, passage, number)}</div>\n'
        f"<details{' open' * (number == 0)}><summary>Experts of each token</summary>\n"
        f"{_table(view, heads, passage.shares, 'token')}\n</details></section>"
    )


def _text(view: View, passage: Passage, number: int) -> str:
    """Make each token a button, so that it can have the focus. The Tab key stops at one of them."""
    parts = []
    for i, token in enumerate(passage.tokens):
        column = view.column[passage.leaders[i]]
        text = escape(token.text).replace("␣", "<s>␣</s>").replace("↵", "<s>↵</s>")
        name = escape(f"{view.names[passage.leaders[i]]} {100 * passage.largest[i]:.0f}%")
        parts.append(
            f'<button type="button" class="c{column}" data-p="{number}" data-i="{i}" '
            f'tabindex="{-1 if i else 0}" title="{name}"><span>{text}</span>'
            f"<sub>{view.mark(column)}</sub></button>" + "<br>" * token.text.endswith("↵")
        )
    return "".join(parts)


def _sequences(view: View) -> str:
    if len(view.passages) == 1:
        return ""
    heads = [str(number) for number in range(1, len(view.passages) + 1)]
    values = torch.stack([passage.shares.mean(0) for passage in view.passages])
    table = _table(view, heads, values, "sequence")
    return f"<section><h2>Experts in each sequence</h2>\n{table}</section>"


def _table(view: View, heads: list[str], values: Float[Tensor, "n C"], what: str) -> str:
    """Make a heat map, experts down, `heads` across. The darkest cell is the largest share."""
    largest = float(values[:, : view.shown].max()) or 1.0
    up = ' class="up"' if max(map(len, heads)) > 3 else ""
    top = "".join(f'<th scope="col"{up}>{escape(head)}</th>' for head in heads)
    rows = []
    for i, name in enumerate(view.columns):
        cell = _cell if i < view.shown else _plain  # a sum would outshine every single expert
        cells = "".join(cell(share, largest) for share in values[:, i].tolist())
        chip = f'<span class="chip c{i}">{view.mark(i)}</span>'
        rows.append(f'<tr><th scope="row">{escape(name)} {chip}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Experts by {what}"><table>'
        f"<caption>Share of the routing weight of each {what}, %; "
        f"the strongest colour is {100 * largest:.0f}%.</caption>\n"
        f'<thead><tr><th scope="col">expert</th>{top}</tr></thead>\n'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(share: float, largest: float) -> str:
    percent, strength = round(100 * share), round(100 * share / largest)
    if not strength:
        return "<td></td>"
    dark = ' class="h"' if strength > 70 else ""
    return f'<td{dark} style="--v:{strength}">{percent or ""}</td>'


def _plain(share: float, _: float) -> str:
    return f'<td class="sum">{round(100 * share) or ""}</td>'


def _data(trace: Trace, view: View) -> str:
    """List the first experts and their shares, in %, for each token and layer in turn."""
    by_stream: dict[str, tuple[list[str], list[list[list[int]]]]] = {}
    for stream in {passage.stream for passage in view.passages}:
        names, tops = [], []
        for name, modules in layers(trace).items():
            if any(trace.streams[module] == stream for module in modules):
                top = shares(token_weights(trace, stream, modules)).topk(
                    min(_NAMED, len(trace.names) + 1)
                )
                used = zip(top.indices.tolist(), (100 * top.values).round().tolist(), strict=True)
                tops.append([_pairs(*row) for row in used])
                names.append(name)
        by_stream[stream] = names, [list(token) for token in zip(*tops, strict=True)]
    data = {
        "names": view.names,
        "layers": [[f"layer {name}" for name in by_stream[p.stream][0]] for p in view.passages],
        "passages": [[by_stream[p.stream][1][row] for row in p.rows] for p in view.passages],
    }
    # Inside <script> only "<" could end the block.
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _pairs(experts: list[int], percents: list[float]) -> list[int]:
    return [n for e, p in zip(experts, percents, strict=True) if p for n in (e, int(p))]
