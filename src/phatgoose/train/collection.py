"""Trains collections on disk: an expert for each task, or gates for many adapters."""

import json
import math
import shutil
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from phatgoose.errors import (
    ConfigError,
    ExpertFormatError,
    IncompatibleExpertError,
    TaskFormatError,
)
from phatgoose.experts import (
    BaseIdentity,
    Expert,
    GateRecord,
    Gates,
    identify_base,
    load_expert,
)
from phatgoose.experts.base import is_hub_name
from phatgoose.experts.bases import refuse_other
from phatgoose.files import publish, write_bytes, write_json
from phatgoose.locks import claimed
from phatgoose.tasks import Encoded, batches
from phatgoose.train.adapters import train_adapters_together
from phatgoose.train.gates import check_adapter, read_modules, train_together
from phatgoose.train.joint.groups import group_name, in_groups
from phatgoose.train.joint.model import check_model
from phatgoose.train.loop.run import Run
from phatgoose.train.settings import AdapterTraining, GateTraining

Tasks = Mapping[str, Sequence[Encoded]]
WORK = ".phatgoose-training"  # progress of what is not done yet; gone when all is
GROUP = "group.json"
LOCK = "lock"


def train_experts(
    model: Any,
    tokenizer: Any,
    tasks: Tasks,
    out: str | Path,
    *,
    adapter: AdapterTraining | None = None,
    gates: GateTraining | None = None,
    gate_batch_size: int | None = None,
    together: int | None = None,
    progress: bool = True,
) -> dict[str, GateRecord]:
    """Train an adapter and its gates for each task, into `out/NAME`; return the new ones' records.

    Experts that are there are left alone. After an interrupt, the same call goes on from the last
    checkpoint; an expert's folder is there complete or not at all.

    Args:
        tasks: encoded examples by name.
        gate_batch_size: of the gate phase; default: the adapter's.
        together: how many experts to train in one pass over the base; default: all.

    Raises ConfigError if a folder there is no expert of this base, and what
    `train_adapters_together` and `train_gates_together` raise.
    """
    collection = Collection(
        model,
        tokenizer,
        tasks,
        Path(out),
        adapter=adapter or AdapterTraining(),
        gates=gates or GateTraining(),
        gate_batch_size=gate_batch_size,
        progress=progress,
    )
    todo, accelerator = collection.todo(), collection.accelerator
    made: dict[str, GateRecord] = {}
    with _alone(collection.work, accelerator):
        groups = _groups(
            todo, together, collection.work, known=tasks, accelerator=accelerator, progress=progress
        )
        for names, work in groups:
            made |= collection.train(names, work)
    return made


class Collection:
    """What `train_experts` trains, on one device; raises ConfigError for what it cannot train."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tasks: Tasks,
        out: Path,
        *,
        adapter: AdapterTraining,
        gates: GateTraining,
        gate_batch_size: int | None,
        progress: bool,
    ) -> None:
        check_model(model)
        self.model = model
        self.tokenizer = tokenizer
        self.tasks = tasks
        self.out = out
        self.adapter = adapter
        self.gates = gates
        self.gate_batch_size = gate_batch_size or adapter.batch_size
        self.progress = progress
        self.accelerator = Accelerator()

    @property
    def work(self) -> Path:
        """Where the progress of all groups is."""
        return self.out / WORK

    def todo(self) -> list[str]:
        """The tasks without an expert yet, those of like length beside each other."""
        base = identify_base(self.model, self.tokenizer)
        return [name for name in _by_length(self.tasks) if not _is_done(self.out / name, base)]

    def train(self, names: Sequence[str], work: Path) -> dict[str, GateRecord]:
        """Train a group, whose progress is in `work`, and publish its experts."""
        group = {name: self.tasks[name] for name in names}
        modules = train_adapters_together(
            self.model,
            group,
            work,
            self.adapter,
            pad=self.tokenizer.pad_token_id,
            checkpoint=work,
            progress=self.progress,
        )
        gates_of = _train_gates(
            self.model,
            self.tokenizer,
            modules,
            group,
            self.gates,
            batch_size=self.gate_batch_size,
            autocast=torch.bfloat16 if self.adapter.bf16 else None,
            work=work,
            progress=self.progress,
        )
        if self.accelerator.is_main_process:
            for name in names:
                if not (self.out / name).exists():  # published before an interrupt
                    card = _card(name, len(self.tasks[name]), self.adapter, gates_of[name].record)
                    _publish(work / name, self.out / name, gates_of[name], card)
        _finish(work, self.accelerator)
        return {name: gates_of[name].record for name in names}


def _publish(made: Path, folder: Path, gates: Gates, card: str) -> None:
    """Add gates and card to an adapter's folder, and move it to where it is wanted."""
    gates.save(made)
    write_bytes(made / "README.md", card.encode())
    publish(made, folder)


def gate_experts(
    model: Any,
    tokenizer: Any,
    folders: Mapping[str, Path],
    tasks: Tasks,
    *,
    settings: GateTraining | None = None,
    batch_size: int = AdapterTraining.batch_size,
    autocast: torch.dtype | None = None,
    together: int | None = None,
    progress: bool = True,
) -> dict[str, GateRecord]:
    """Train the gates of many adapter folders and save them there; return the new ones' records.

    `tasks` has the examples by the folders' names. Experts that have gates are left alone, and
    after an interrupt the same call goes on, as for `train_experts`.
    """
    missing = sorted(set(folders) - set(tasks))
    if missing:
        raise TaskFormatError(
            f"{missing[0]}: there is no task of this name to train its gates on. Name adapter and "
            "task alike, or train it alone: phatgoose gate"
        )
    base = identify_base(model, tokenizer)
    todo = [
        name
        for name in _by_length({name: tasks[name] for name in folders})
        if not _is_gated(folders[name], base)
    ]
    made: dict[str, GateRecord] = {}
    if not todo:
        return made
    check_model(model)
    for name in todo:  # all of them, before any is trained
        check_adapter(name, read_modules(folders[name]), model)
    accelerator = Accelerator()
    work = folders[min(folders)].parent / WORK
    with _alone(work, accelerator):
        groups = _groups(
            todo, together, work, known=folders, accelerator=accelerator, progress=progress
        )
        for names, progress_folder in groups:
            found = _train_gates(
                model,
                tokenizer,
                {name: folders[name] for name in names},
                {name: tasks[name] for name in names},
                settings or GateTraining(),
                batch_size=batch_size,
                autocast=autocast,
                work=progress_folder,
                progress=progress,
            )
            if accelerator.is_main_process:
                for name in names:
                    found[name].save(folders[name])
            made |= {name: found[name].record for name in names}
            _finish(progress_folder, accelerator)
    return made


def _train_gates(
    model: Any,
    tokenizer: Any,
    adapters: Mapping[str, Any],
    tasks: Tasks,
    settings: GateTraining,
    *,
    batch_size: int,
    autocast: torch.dtype | None,
    work: Path,
    progress: bool,
) -> dict[str, Gates]:
    seq2seq = bool(model.config.is_encoder_decoder)
    data = {
        name: batches(
            encoded,
            batch_size,
            pad=tokenizer.pad_token_id,
            seq2seq=seq2seq,
            seed=settings.seed,
        )
        for name, encoded in tasks.items()
    }
    run = Run.start(autocast=autocast, checkpoint=work, progress=progress)
    return train_together(model, adapters, data, settings, run, tokenizer=tokenizer)


def _by_length(tasks: Tasks) -> list[str]:
    """The names, those of like length beside each other, so that little is padded in a group."""

    def mean_length(name: str) -> float:
        lengths = [len(row.prompt) + len(row.target) for row in tasks[name]]
        return sum(lengths) / max(1, len(lengths))

    return sorted(tasks, key=lambda name: (mean_length(name), name))


def _is_done(folder: Path, base: BaseIdentity) -> bool:
    """Whether the expert is there; ConfigError if something else is."""
    if not folder.exists():
        return False
    expert = load_expert(folder)
    if expert.gates is None:
        raise ConfigError(
            f"{folder}: is there already and has no gates. Train them: phatgoose gate {folder}"
        )
    _check_base(expert, base)
    return True


def _is_gated(folder: Path, base: BaseIdentity) -> bool:
    """Whether an adapter has its gates; broken ones are as good as none."""
    try:
        expert = load_expert(folder)
    except (ExpertFormatError, IncompatibleExpertError):
        return False  # if it is the adapter that is broken, reading it will say so
    _check_base(expert, base)
    return expert.gates is not None


def _check_base(expert: Expert, base: BaseIdentity) -> None:
    difference = refuse_other(expert, base)
    if difference:
        raise IncompatibleExpertError(
            f"{expert.folder}: is there already, for another base: {difference}. Move it away, or "
            "give its own base."
        )


def _groups(
    names: Sequence[str],
    together: int | None,
    work: Path,
    *,
    known: Container[str],
    accelerator: Accelerator,
    progress: bool,
) -> Iterator[tuple[list[str], Path]]:
    """Groups as `plan` has them, each noted on disk when its turn comes."""
    groups = plan(names, together, work, known=known)
    accelerator.wait_for_everyone()  # nobody writes until all have looked
    for number, (group, folder) in enumerate(groups, start=1):
        if accelerator.is_main_process:
            note(group, folder)
            if progress and len(groups) > 1:
                print(f"{number}/{len(groups)}: {', '.join(group)}", file=sys.stderr)
        yield group, folder
    if accelerator.is_main_process:
        shutil.rmtree(work, ignore_errors=True)


def plan(
    names: Sequence[str],
    together: int | None,
    work: Path,
    *,
    known: Container[str],
    devices: int = 1,
) -> list[tuple[list[str], Path]]:
    """Groups, each with a folder for its progress; those that were begun come first, as begun.

    Where `together` does not say how large they are, there is a new one for each device.
    """
    begun = []
    for path in sorted(work.glob(f"*/{GROUP}")):
        group = json.loads(path.read_text())
        fits = len(group) <= (together or len(group)) and all(name in known for name in group)
        if fits and set(group) & set(names):  # else all of them are saved
            begun.append((group, path.parent))
    taken = {name for group, _ in begun for name in group}
    rest = [name for name in names if name not in taken]
    size = together or max(1, math.ceil(len(rest) / devices))
    new = [(group, work / group_name(group)) for group in in_groups(rest, size)]
    return [*begun, *new]


def note(group: Sequence[str], folder: Path) -> None:
    """Note on disk that a group is begun."""
    write_json(folder / GROUP, group)


@contextmanager
def _alone(work: Path, accelerator: Accelerator) -> Iterator[None]:
    """Be the only run that trains into this folder; ConfigError where there is another."""
    if not accelerator.is_main_process:
        yield
        return
    with claimed(work / LOCK, str(work.parent)):
        yield


def _finish(work: Path, accelerator: Accelerator) -> None:
    """Forget the progress of a group whose experts are saved."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(work)


def _card(name: str, examples: int, adapter: AdapterTraining, record: GateRecord) -> str:
    """A model card: where the expert comes from."""
    base = record.base.name
    lines = ["library_name: peft", "tags: [lora, phatgoose]"]
    if is_hub_name(base):
        lines.insert(0, f"base_model: {base}")
    front = "\n".join(lines)
    return (
        f"---\n{front}\n---\n\n# {name}\n\n"
        f"A rank-{adapter.rank} LoRA with PHATGOOSE gates (arXiv:2402.05859) for "
        f"{base or 'a base without a name'}, made by `phatgoose experts train` from {examples} "
        f"examples of the task `{name}`: {adapter.steps} steps of the adapter, then "
        f"{record.steps} of the gates, whose loss went from {record.first_loss:.3f} to "
        f"{record.last_loss:.3f} nats a target token.\n"
    )
