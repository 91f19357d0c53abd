"""Tables of docs/study.md, each from the committed results of some phases."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from data import PLACES
from phatgoose.evaluation.report import GONE, cell
from plan import CONTROLS, OWN

Results = Mapping[str, Any]
Found = Mapping[str, Results]  # by phase
TOP = "base phatgoose phatgoose+evidence phatgoose+prompt_evidence retrieval merged".split()
NEEDS = {  # what each owner gives, for the first table
    "base": "nothing",
    "phatgoose": "adapter, gate",
    "phatgoose+evidence": "adapter, gate, mean prompt",
    "phatgoose+prompt_evidence": "adapter, gate, mean prompt",
    "retrieval": "adapter, up to 1,000 prompts",
    "merged": "adapter",
}
SEEDS = ("small", "small-1", "small-2")


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def head(*names: str, left: int = 1) -> Iterator[str]:
    yield row(*names)
    yield "|" + "---|" * left + "--:|" * (len(names) - left)


def score(value: Mapping[str, Any] | None) -> str:
    """A score without its interval."""
    return GONE if not value or value["score"] is None else f"{value['score']:.1f}"


def top(found: Found) -> Iterator[str]:
    """Six rows: what routing recovers, and what it is worth on tasks without an expert."""
    pools = [pool for pool in ("small", "large") if f"{pool}-own" in found]
    counts = [len(found[f"{pool}-own"]["experts"]) for pool in pools]
    columns = [f"gain recovered, {count} experts" for count in counts]
    columns += [f"held-out average, {count} experts" for count in counts]
    yield from head("method", "each owner provides", *columns, left=2)
    for method in TOP:
        gains = [percent(found[f"{pool}-own"]["recovered_gain"].get(method)) for pool in pools]
        gains = ["0%"] * len(pools) if method == "base" else gains
        scores = [score(found[f"{pool}-heldout"]["average"].get(method)) for pool in pools]
        yield row(f"`{method}`", NEEDS[method], *gains, *scores)


def percent(value: Mapping[str, Any] | None) -> str:
    return GONE if not value or value["score"] is None else f"{value['score']:.0f}%"


def methods(found: Found, pool: str) -> Iterator[str]:
    """Every method of a pool, on own tasks and on held-out ones."""
    own, held = found[f"{pool}-own"], found[f"{pool}-heldout"]
    far, bbh = found.get(f"{pool}-far"), found.get(f"{pool}-bbh")
    columns = ["own tasks", "gain recovered, %", "held out", "less `phatgoose`"]
    columns += ["the unlike ones: less `phatgoose`"] * bool(far) + ["BBH"] * bool(bbh)
    yield from head("method", *columns)
    names = [m for m in dict.fromkeys([*own["own_average"], *held["average"]]) if m not in HIDDEN]
    for method in names:
        cells = [
            cell(own["own_average"].get(method)),
            cell(own["recovered_gain"].get(method)),
            cell(held["average"].get(method)),
            cell(held["difference"].get(method), signed=True),
        ]
        cells += [cell(far["difference"].get(method), signed=True)] if far else []
        cells += [cell(bbh["average"].get(method))] if bbh else []
        yield row(f"`{method}`", *cells)


HIDDEN = {*CONTROLS, "few", "oracle"}  # of the table of methods: they have one of their own


def seeds(found: Found) -> Iterator[str]:
    """Mean over seeds, and the lowest and highest of them."""
    pools = [p for p in SEEDS if f"{p}-own" in found and f"{p}-heldout" in found]
    yield from head("method", "gain recovered, %", "held out", "held out, less `phatgoose`")
    for method in OWN:
        if method == "own":
            continue
        gains = [found[f"{p}-own"]["recovered_gain"].get(method) for p in pools]
        scores = [found[f"{p}-heldout"]["average"].get(method) for p in pools]
        less = [found[f"{p}-heldout"]["difference"].get(method) for p in pools]
        yield row(f"`{method}`", spread(gains), spread(scores), spread(less, signed=True))


def spread(values: Sequence[Mapping[str, Any] | None], *, signed: bool = False) -> str:
    known = [value["score"] for value in values if value and value["score"] is not None]
    if not known or len(known) < len(values):
        return GONE
    sign = "+" if signed else ""
    low, high = min(known), max(known)
    return f"{mean(known):{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def controls(found: Found) -> Iterator[str]:
    """What should do worse if routing matters, on held-out tasks."""
    pools = [pool for pool in ("small", "large") if f"{pool}-heldout" in found]
    counts = [len(found[f"{pool}-heldout"]["experts"]) for pool in pools]
    columns = [f"{count} experts{what}" for count in counts for what in ("", ", less `phatgoose`")]
    yield from head("held out", *columns)
    for method in ("base", "phatgoose", "phatgoose+prompt_evidence", *CONTROLS, "few", "oracle"):
        cells = []
        for pool in pools:
            held = found[f"{pool}-heldout"]
            cells.append(cell(held["average"].get(method)))
            cells.append(cell(held["difference"].get(method), signed=True))
        if any(text != GONE for text in cells):
            yield row(method if method in HIDDEN else f"`{method}`", *cells)


def contexts(found: Found) -> Iterator[str]:
    """The same examples alone, after another task, and after two others."""
    places = found["small-places"]
    yield from head("method", *(f"asked {place}" for place in PLACES))
    for method in places[PLACES[0]]["average"]:
        cells = [cell(places[place]["average"].get(method)) for place in PLACES]
        yield row(f"`{method}`", *cells)


def settings(found: Found) -> Iterator[str]:
    """Variants on validation sets."""
    pools = [pool for pool in ("small", "large") if f"{pool}-validation" in found]
    columns = []
    for pool in pools:
        count = len(found[f"{pool}-validation"]["experts"])
        columns += [f"{count} experts: gain recovered, %"]
        columns += ["tasks without an expert"] if pool == "small" else []
    yield from head("variant", *columns)
    names = dict.fromkeys(m for p in pools for m in found[f"{p}-validation"]["own_average"])
    for method in names:
        cells = []
        for pool in pools:
            results = found[f"{pool}-validation"]
            part = method.endswith(" experts")  # whose own tasks are fewer
            gain = of_part(results, method) if part else results["recovered_gain"].get(method)
            cells.append(cell(gain) if not isinstance(gain, str) else gain)
            if pool == "small":
                cells.append(GONE if part else cell(results["average"].get(method)))
        yield row(method, *cells)


def of_part(results: Results, method: str) -> str:
    """The gain that a part of the pool recovers, over the tasks of its experts."""
    about = results["methods"].get(method)
    if about is None:
        return GONE
    totals = {
        kind: sum(results["results"][name][kind]["score"] for name in about["experts"])
        for kind in (method, "base", "own")
    }
    gain = totals["own"] - totals["base"]
    return f"{100 * (totals[method] - totals['base']) / gain:.1f}" if gain else GONE


def tasks(results: Results, role: str) -> Iterator[str]:
    """The score of every method on every task."""
    names = [name for name, task in results["tasks"].items() if task["role"] == role]
    listed = [
        method
        for method in results["methods"]
        if any(results["results"][name][method]["score"] is not None for name in names)
    ]
    yield from head("task", "metric", "n", *listed, left=2)
    for name in names:
        task, scores = results["tasks"][name], results["results"][name]
        mark = " †" if task["contaminated"] else ""
        cells = [score(scores[method]) for method in listed]
        yield row(f"{name}{mark}", task["metric"], str(task["n"]), *cells)


def training(found: Found) -> Iterator[str]:
    """What the pools took to train."""
    yield from head("pool", "processes", "seconds of all together", "most memory of one, GB")
    for pool, parts in found["training"].items():
        seconds = sum(part["seconds"] for part in parts)
        most = max(part.get("allocated", 0) for part in parts) / 1e9
        yield row(pool, str(len(parts)), f"{seconds:.0f}", f"{most:.1f}" if most else GONE)
