"""Writes an evaluation as Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phatgoose.evaluation.summary import REFERENCE

GONE = "—"
MARK = "†"
Results = Mapping[str, Any]


def table(results: Results) -> str:
    """Write as Markdown what a person reads of results.json."""
    notes: dict[str, None] = {}
    parts = [_head(results), _overview(results, notes)]
    for role, title in (("heldout", "Held-out tasks"), ("own", "The experts' own tasks")):
        names = [name for name, task in results["tasks"].items() if task["role"] == role]
        if names:
            parts.append([f"## {title}", "", *_tasks(results, names, role, notes)])
    parts.append(_notes(results, notes))
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def cell(value: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """Write a score with its interval, or the sign for none."""
    if value is None or value["score"] is None:
        return GONE
    plus = "+" if signed else ""
    return f"{value['score']:{plus}.1f} [{value['low']:{plus}.1f}, {value['high']:{plus}.1f}]"


def _head(results: Results) -> list[str]:
    settings, tasks = results["settings"], results["tasks"].values()
    counts = {role: sum(t["role"] == role for t in tasks) for role in ("heldout", "own")}
    limit = f"at most {settings['limit']}" if settings["limit"] else "all"
    less = ", less what the general adapters " + ", ".join(settings["general"]) + " know"
    return [
        "# Evaluation",
        "",
        f"{len(results['experts'])} experts of base {results['base']['name']}"
        f"{less if settings['general'] else ''}; "
        f"{counts['heldout']} held-out tasks and {counts['own']} of the experts' own, {limit} test "
        f"examples a task, seed {settings['seed']}; {settings['dtype']} on "
        f"{results['versions']['device']}.",
        "",
        "Scores are 0 to 100, with 95% bootstrap intervals over the examples; an average is the "
        "mean of the tasks' scores. Every method but *own*, *best_individual* and *oracle* gets "
        "the examples of all tasks shuffled into one unlabelled stream. *Recovered gain* is "
        "(method - base) / (own - base) on the experts' own tasks, in percent.",
    ]


def _overview(results: Results, notes: dict[str, None]) -> list[str]:
    """Write one row for each method."""
    over = results["average_over"]
    title = "held-out average" if over == "heldout" else "average of own tasks"
    columns: list[tuple[str, Mapping[str, Any], bool]] = [(title, results["average"], False)]
    if results["difference"]:
        columns.append((f"less {REFERENCE}", results["difference"], True))
    if any(task["role"] == "own" for task in results["tasks"].values()):
        if over == "heldout":
            columns.append(("average of own tasks", results["own_average"], False))
        columns.append(("recovered gain, %", results["recovered_gain"], False))
    lines = ["| method | " + " | ".join(name for name, _, _ in columns) + " |"]
    lines.append("|---|" + "--:|" * len(columns))
    for method in results["average"]:
        for _, values, _ in columns:
            _note(notes, method, values.get(method))
        cells = [cell(values.get(method), signed=signed) for _, values, signed in columns]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def _tasks(
    results: Results, names: Sequence[str], role: str, notes: dict[str, None]
) -> Iterator[str]:
    """Write one row for each task. Methods that are not defined on such tasks have no column."""
    methods = [
        m
        for m in results["average"]
        if any(results["results"][name][m]["score"] is not None for name in names)
    ]
    yield "| task | metric | n | " + " | ".join(methods) + " |"
    yield "|---|---|--:|" + "--:|" * len(methods)
    for name in names:
        task, cells = results["tasks"][name], results["results"][name]
        mark = f" {MARK}" if task["contaminated"] else ""
        for method in methods:
            _note(notes, f"{method}, {name}", cells[method])
        row = [f"{name}{mark}", task["metric"], str(task["n"]), *(cell(cells[m]) for m in methods)]
        yield "| " + " | ".join(row) + " |"
    key = "own_average" if role == "own" else "average"
    totals = (cell(results[key][m]) for m in methods)
    yield f"| **average of {len(names)}** | | | " + " | ".join(f"**{t}**" for t in totals) + " |"


def _note(notes: dict[str, None], where: str, value: Mapping[str, Any] | None) -> None:
    if value is not None and value["score"] is None:
        notes[f"{where}: {value['reason']}"] = None


def _notes(results: Results, notes: Mapping[str, None]) -> list[str]:
    lines = []
    marked = {name: t["contaminated"] for name, t in results["tasks"].items() if t["contaminated"]}
    if marked:
        lines += [
            f"{MARK} Not wholly held out: an expert was trained on it, or on a similar skill.",
            "",
        ]
        lines += [
            f"- {name}: " + ", ".join(f"{expert} ({why})" for expert, why in experts.items())
            for name, experts in marked.items()
        ]
        lines.append("")
    if notes:
        lines += [f"{GONE} No score:", "", *(f"- {note}" for note in notes), ""]
    derived = {n: m["derived"] for n, m in results["methods"].items() if m.get("derived")}
    for name, experts in derived.items():
        lines += [f"{name}: experts without gates, with vectors derived from what they have:", ""]
        lines += [f"- {expert}: {source}" for expert, source in experts.items()]
        lines.append("")
    if results["left_out"]:
        lines += ["Methods left out:", ""]
        lines += [f"- {name}: {reason}" for name, reason in results["left_out"].items()]
    return lines
