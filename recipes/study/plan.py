"""What the study trains and measures, what matters most first.

A *pool* is trained by `phatgoose experts train`, in parts that are trained beside each other. A
*phase* is one pool on some tasks, one `Evaluation`. Each of their steps has a rank: the lower, the
earlier it is done.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SHIPPED = (  # the experts in the package; recipes/default_pool.py says why these
    "banking77 disfl_qa e2e_nlg policy_qa proc_change_case proc_pluralise proc_reverse_words "
    "proc_where_is restaurant_aspects restaurant_slots snips subjectivity trec_question_type "
    "ud_pos wiki_split wnut_ner"
).split()
ATTENTION = "--target-modules q_proj k_proj v_proj o_proj"
SMALL = f"--rank 8 --alpha 16 --learning-rate 1e-3 {ATTENTION}"
LARGE = "--rank 16 --alpha 32 --learning-rate 1e-3"
STEPS = "--steps 300 --batch-size 16 --gate-steps 100"

# In the order of the tables.
ROUTERS = (
    "phatgoose phatgoose+evidence phatgoose+prompt_evidence retrieval average_activation merged "
    "arrow prompt_evidence"
).split()
OWN = ["base", "own", *ROUTERS]
HELDOUT = ["base", *ROUTERS]
MORE = "evidence adapter_evidence adapter_prompt_evidence spectr lag uniform peft_ties".split()
CONTROLS = ["random adapters", "without the nearest", "without the nearest+prompt_evidence"]
# Of the gates of the small pool, trained anew: name and settings.
GATES = {
    "10 gate steps": "--gate-steps 10 --gate-batch-size 16",
    "30 gate steps": "--gate-steps 30 --gate-batch-size 16",
    "300 gate steps": "--gate-steps 300 --gate-batch-size 16",
    "gate rate 1e-3": "--gate-steps 100 --gate-batch-size 16 --gate-learning-rate 1e-3",
    "gate rate 2e-2": "--gate-steps 100 --gate-batch-size 16 --gate-learning-rate 2e-2",
    "gate batch 64": "--gate-steps 100 --gate-batch-size 64",
}


@dataclass(frozen=True)
class Pool:
    """Experts that are trained alike."""

    name: str
    rank: int  # of its training
    parts: int  # processes that it is trained in
    settings: str
    tasks: str = "train"  # the folder of data/ that holds them
    names: tuple[str, ...] = ()  # of its tasks; none: all there are
    signatures: bool = True  # whether mean prompts and average activations are measured too
    gates_of: str = ""  # a pool whose adapters it has, with gates of its own


@dataclass(frozen=True)
class Phase:
    """A pool on the tasks of some folders of data/."""

    name: str
    pool: str
    tasks: str  # folder of data/
    limit: int  # examples a task
    methods: dict[str, int] = field(default_factory=dict)  # and the rank of each
    names: tuple[str, ...] = ()  # of its tasks; none: all there are


def ranked(rank: int, *methods: str) -> dict[str, int]:
    return dict.fromkeys(methods, rank)


def pools() -> Iterator[Pool]:
    shipped = tuple(SHIPPED)
    yield Pool("small", 0, 4, f"{SMALL} {STEPS}", names=shipped)
    yield Pool("large", 2, 10, f"{LARGE} {STEPS}")
    yield Pool("small-1", 4, 4, f"{SMALL} {STEPS} --seed 1", names=shipped)
    few = f"{SMALL} --steps 60 --batch-size 16 --gate-steps 1"
    yield Pool("few", 5, 2, few, tasks="few", signatures=False)
    for name, settings in GATES.items():
        yield Pool(name, 8, 1, settings, names=shipped, signatures=False, gates_of="small")
    yield Pool("small-2", 9, 4, f"{SMALL} {STEPS} --seed 2", names=shipped)
    yield Pool("large-1", 12, 10, f"{LARGE} {STEPS} --seed 1")


def phases(variants: dict[str, int], fewer: dict[str, int]) -> Iterator[Phase]:
    """`variants` are the settings to choose from on validation sets; `fewer`, of the large pool."""
    shipped = tuple(SHIPPED)
    more = ranked(7, *MORE)
    controls = {**ranked(5, *CONTROLS), **ranked(5, "few", "oracle")}
    yield Phase("small-own", "small", "test", 100, ranked(1, *OWN) | more, names=shipped)
    held = ranked(1, *HELDOUT) | controls | more
    yield Phase("small-heldout", "small", "heldout", 80, held)
    own = ranked(3, *OWN, "adapter_prompt_evidence", "random adapters", "evidence")
    held = ranked(3, *HELDOUT, "adapter_prompt_evidence", "random adapters", "evidence")
    nearest = ranked(6, *CONTROLS[1:])
    yield Phase("large-own", "large", "test", 40, own)
    yield Phase("large-heldout", "large", "heldout", 80, held | nearest)
    yield Phase("large-bbh", "large", "bbh", 40, ranked(4, *held))
    for number, rank in ((1, 4), (2, 10)):
        pool = f"small-{number}"
        yield Phase(f"{pool}-own", pool, "test", 100, ranked(rank, *OWN), names=shipped)
        yield Phase(f"{pool}-heldout", pool, "heldout", 80, ranked(rank, *HELDOUT))
    contexts = ranked(6, "base", "own", *ROUTERS, "evidence")
    yield Phase("small-contexts", "small", "contexts", 25, contexts)
    yield Phase("small-validation", "small", "validation", 25, variants)
    yield Phase("large-validation", "large", "validation", 10, fewer)
    yield Phase("small-bbh", "small", "bbh", 40, ranked(11, *HELDOUT))
    yield Phase("large-1-own", "large-1", "test", 40, ranked(13, *OWN))
    yield Phase("large-1-heldout", "large-1", "heldout", 80, ranked(13, *HELDOUT))


def experts_of(out: Path, pool: str) -> list[Path]:
    """The folders of a pool's experts, by name."""
    found = (out / "pools" / pool).glob("part-*/[!.]*")
    return sorted((path for path in found if path.is_dir()), key=lambda path: path.name)
