"""Reads the tasks of an evaluation, and chooses which of their examples are asked."""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from phatgoose.errors import ConfigError, PhatgooseError, TaskFormatError
from phatgoose.evaluation.batches import Remembering, encode_within, is_seq2seq, longest_input
from phatgoose.evaluation.evaluate import grade
from phatgoose.evaluation.suites import SUITES, load_suite
from phatgoose.reading import read_json
from phatgoose.tasks import (
    SEPARATOR,
    Conversation,
    Example,
    one_turn,
    read_examples,
    split_file,
    task_folders,
)

INDEX = "INDEX.json"
SPARE_TOKENS, BOUND_STEP = 4, 32  # answers may be this much longer than a task's longest target
Role = Literal["own", "heldout"]


@dataclass(frozen=True)
class EvalTask:
    """The examples of one task to answer."""

    name: str
    role: Role  # "own": the pool has an expert of this name
    metric: str
    lines: Sequence[int]  # which of the test split's examples, from 0
    examples: Sequence[Example]
    max_new_tokens: int  # where answers are generated
    contaminated: Mapping[str, str] = field(default_factory=dict)  # by expert: what it has seen
    unanswerable: str | None = None  # why no method can be asked, if none can

    @property
    def hash(self) -> str:
        """Hash all that the answers and their scores depend on."""
        asked = [self.metric, self.max_new_tokens, [asdict(example) for example in self.examples]]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


@dataclass(frozen=True)
class Item:
    """One example in a stream of many tasks."""

    task: EvalTask
    place: int  # among the task's examples

    @property
    def example(self) -> Example:
        return self.task.examples[self.place]


@dataclass(frozen=True)
class _Source:
    """A task before its examples are chosen."""

    name: str
    examples: list[Example]
    metric: str | None = None
    near: Sequence[str] = ()  # training tasks that practise the same skill, by the index


def read_tasks(
    sources: Sequence[str | Path],
    experts: Sequence[str],
    model: Any,
    tokenizer: Any,
    *,
    limit: int | None = None,
    seed: int = 0,
    training: Mapping[str, Sequence[Example]] | None = None,
    cards: Mapping[str, str] | None = None,
    chat: bool = False,
) -> list[EvalTask]:
    """Read the tasks that `sources` name, each with a seeded subset of its test split.

    Args:
        sources: task folders, folders of them, or names of published suites (`suites.SUITES`).
        experts: names of the pool's experts; a task of such a name is that expert's own.
        limit: examples per task (None: all).
        training: what experts were trained on, where it is known, by the expert's name.
        cards: the experts' model cards; one that names a held-out task as its data contaminates it.
        chat: whether prompts that are texts are a user's turns; see `tasks.parse_row`.

    Raises TaskFormatError for a source without tasks, an empty split or a bad line (a target that
    is not among its choices, say), ConfigError for a name twice or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}.")
    found: dict[str, _Source] = {}
    for source in _sources(sources, chat=chat):
        if source.name in found:
            raise ConfigError(f"{source.name}: two tasks of this name. Rename or leave out one.")
        found[source.name] = source
    seen = {
        name: {example.prompt for example in examples}
        for name, examples in (training or {}).items()
    }
    tasks = []
    for name, source in found.items():
        if not source.examples:
            tasks.append(_without_examples(source))
            continue
        count = min(limit or len(source.examples), len(source.examples))
        chosen = sorted(random.Random(f"{seed} {name}").sample(range(len(source.examples)), count))
        examples = [source.examples[line] for line in chosen]
        own = name in experts
        tasks.append(
            _task(
                model,
                tokenizer,
                name=name,
                role="own" if own else "heldout",
                metric=source.metric or _metric(examples),
                lines=chosen,
                examples=examples,
                contaminated={} if own else _contamination(source, experts, seen, cards or {}),
            )
        )
    return tasks


def _sources(given: Sequence[str | Path], *, chat: bool) -> Iterator[_Source]:
    for source in given:
        if str(source) in SUITES:
            for name, examples, metric in load_suite(str(source)):
                yield _Source(name, list(map(_as_chat, examples)) if chat else examples, metric)
            continue
        for folder in task_folders([source], "test"):
            path = split_file(folder, "test")
            assert path is not None
            folder = folder.resolve()
            record = _record(folder)
            yield _Source(
                folder.name,
                read_examples(path, chat=chat),
                record.get("metric"),
                record.get("near_task") or (),
            )


def _as_chat(example: Example) -> Example:
    return one_turn(example.prompt.removesuffix(SEPARATOR), example.target, example.choices)


def _record(folder: Path) -> dict[str, Any]:
    """Read what an INDEX.json beside or above a task folder says of it, if there is one."""
    path = next((p / INDEX for p in [folder, *folder.parents][:3] if (p / INDEX).is_file()), None)
    if path is None:
        return {}
    records = read_json(path, error=TaskFormatError)
    if not isinstance(records, list) or not all(map(_is_record, records)):
        raise TaskFormatError(
            f"{path}: is no list of records, each with texts for name, split and metric and a list "
            "of names for near_task, as far as it has them. Correct it."
        )
    named = [r for r in records if r.get("name") == folder.name]
    of_split = [r for r in named if r.get("split") == folder.parent.name]
    return next(iter(of_split or named), {})


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict):
        return False
    near = record.get("near_task") or []
    texts = [record.get(key) or "" for key in ("name", "split", "metric")]
    return isinstance(near, list) and all(isinstance(text, str) for text in [*texts, *near])


def _metric(examples: Sequence[Example]) -> str:
    return "accuracy" if all(e.choices is not None for e in examples) else "exact_match"


def _contamination(
    source: _Source,
    experts: Sequence[str],
    seen: Mapping[str, set[str]],
    cards: Mapping[str, str],
) -> dict[str, str]:
    """Find experts that know a held-out task from their training, and say how."""
    found = {name: "similar skill" for name in source.near if name in experts}
    for name, card in cards.items():
        if f"`{source.name}`" in card:
            found[name] = "named in its model card"
    for name, prompts in seen.items():
        common = sum(example.prompt in prompts for example in source.examples)
        if common and name in experts:
            found[name] = f"{common} of {len(source.examples)} prompts in its training data"
    return found


def _without_examples(source: _Source) -> EvalTask:
    """Make a task of a set that the Hub does not hold."""
    reason = "the Hub does not hold this set; give it as a folder instead"
    return EvalTask(source.name, "heldout", source.metric or "accuracy", [], [], 0, {}, reason)


def _task(model: Any, tokenizer: Any, **fields: Any) -> EvalTask:
    examples = fields["examples"]
    # A metric that does not fit, or whose package is missing, is better known now than later.
    grade([""] * len(examples), examples, fields["metric"])
    room, seq2seq = longest_input(model, tokenizer), is_seq2seq(model)
    tokenizer = Remembering(tokenizer)
    longest = max(len(tokenizer(e.target, add_special_tokens=False)["input_ids"]) for e in examples)
    # Rounded up, so that tasks of the mixed stream share batches, which go on until their bound.
    bound = -(-(longest + SPARE_TOKENS) // BOUND_STEP) * BOUND_STEP
    reason = _unanswerable(tokenizer, examples, bound=bound, room=room, seq2seq=seq2seq)
    return EvalTask(**fields, max_new_tokens=bound, unanswerable=reason)


def _unanswerable(
    tokenizer: Any, examples: Sequence[Example], *, bound: int, room: int, seq2seq: bool
) -> str | None:
    """Say why some example does not fit the model, so that a score would mean nothing."""
    if not seq2seq and bound + 1 >= room and any(e.choices is None for e in examples):
        return f"answers of {bound} tokens leave no room for a prompt in {room} tokens"
    for example in examples:
        if isinstance(example, Conversation):
            if (example.answer or {}).get("tool_calls"):
                return f"an answer calls tools, which no metric knows: {example.prompt[:40]!r}"
            try:
                example.asked(tokenizer)
            except PhatgooseError as error:
                return str(error)
        for choice in example.choices or ():
            if len(tokenizer(choice, add_special_tokens=False)["input_ids"]) >= room:
                return f"a choice is longer than the {room} tokens the model reads: {choice[:40]!r}"
            try:
                encode_within(tokenizer, example, choice, max_length=room, seq2seq=seq2seq)
            except PhatgooseError as error:
                return str(error)
    return None
