"""Methods times tasks over one loaded base, written to a folder; goes on where it stopped."""

import hashlib
import platform
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import phatgoose
from phatgoose.errors import ConfigError
from phatgoose.evaluation.answering import Answering
from phatgoose.evaluation.eval_tasks import EvalTask, Item
from phatgoose.evaluation.methods import Bench, Method, pool_hashes
from phatgoose.evaluation.plots import draw
from phatgoose.evaluation.report import table
from phatgoose.evaluation.settings import RunSettings
from phatgoose.evaluation.summary import summarise
from phatgoose.experts import identify_base
from phatgoose.files import write_bytes, write_json
from phatgoose.locks import claimed
from phatgoose.pool import ExpertPool
from phatgoose.tasks import Conversation


def run_evaluation(
    model: Any,
    tokenizer: Any,
    pool: ExpertPool,
    *,
    methods: Sequence[Method],
    tasks: Sequence[EvalTask],
    out: Path,
    settings: RunSettings | None = None,
    left_out: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Answer every task by every method, write `out`, and return what results.json holds.

    The examples of all tasks are shuffled into one stream, which no method is told the tasks of
    (but those defined by them). `out` receives results.json, table.md, pictures, and every answer
    as JSON lines under answers/METHOD. What is finished there is not computed again; files that are
    damaged or of other settings are. A method that cannot serve its pool leaves marked cells, with
    the reason.

    Args:
        model: the plain base, not routed. It comes back as it was.
        left_out: methods that were asked for and are not possible, and why; noted in the results.

    Raises ConfigError for two methods of one name, no tasks, or where not one method could answer;
    the reasons are in the message. Out of memory is a ConfigError too, and what is finished stays.
    """
    evaluation = Evaluation(
        model, tokenizer, pool, methods=methods, tasks=tasks, out=out, settings=settings
    )
    evaluation.answer()
    return evaluation.finish(left_out)


class Evaluation:
    """`run_evaluation` in its parts, so that several processes can share one folder.

    Each makes the same evaluation and does other `jobs()`; then one of them calls `answer()`, which
    finds the answers in the folder, and `finish()`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pool: ExpertPool,
        *,
        methods: Sequence[Method],
        tasks: Sequence[EvalTask],
        out: Path,
        settings: RunSettings | None = None,
    ) -> None:
        settings = settings or RunSettings()
        names = [method.name for method in methods]
        if len(set(names)) < len(names) or not names:
            raise ConfigError(f"methods: wanted different names, got {', '.join(names) or 'none'}.")
        asked = [task for task in tasks if task.unanswerable is None]
        if not asked:
            why = "; ".join(f"{t.name}: {t.unanswerable}" for t in tasks) or "none given"
            raise ConfigError(f"tasks: none can be asked ({why}).")
        self.methods, self.tasks, self.out, self.settings = methods, tasks, Path(out), settings
        self.model = model
        self.sizes = settings.sizes(model.device.type)
        rest = settings.share_prompts, self.sizes["tokens"], self.sizes["rows"]
        bench = Bench(model, tokenizer, pool, *rest)
        self.identity = _identify(model, tokenizer, pool)
        stream = [Item(task, place) for task in asked for place in range(len(task.examples))]
        random.Random(settings.seed).shuffle(stream)
        self._run = Answering(
            bench,
            stream,
            out=self.out,
            common={
                "phatgoose": phatgoose.__version__,
                "base": self.identity["base"]["weights"],
                "device": model.device.type,
                "share_prompts": settings.share_prompts,
                **_template(tokenizer, asked),
            },
            size=self.sizes["part"],
            progress=settings.progress,
        )

    def jobs(self) -> dict[str, int]:
        """What can be answered independently of each other: names, and their numbers of examples.

        A method that chooses by the scores of single experts is one job for each of these.
        """
        return {name: len(items) for name, (_, items) in self._run.jobs(self.methods).items()}

    def do(self, job: str) -> None:
        """Answer one of `jobs()`, into the folder."""
        self._run.do(*self._run.jobs(self.methods)[job])

    def answer(self) -> None:
        """Answer by every method what is not in the folder yet."""
        self._run.answer(self.methods)

    @property
    def failed(self) -> dict[str, str]:
        """The methods that could not answer, and why."""
        return self._run.failed

    def summary(self, tasks: Sequence[EvalTask] | None = None) -> dict[str, Any]:
        """The scores, averages, differences and gains over some of the tasks (None: all)."""
        names = [method.name for method in self.methods]
        tasks = self.tasks if tasks is None else tasks
        reasons = _reasons(tasks, self.methods, self._run.failed)
        return summarise(tasks, names, self._run.scores(), reasons, seed=self.settings.seed)

    def finish(
        self, left_out: Mapping[str, str] | None = None, *, pictures: bool = True
    ) -> dict[str, Any]:
        """Write results.json, table.md and pictures; return the results."""
        run, tasks = self._run, self.tasks
        names = [method.name for method in self.methods]
        failed = {name: run.failed[name] for name in names if name in run.failed}
        if len(failed) == len(names):
            why = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
            raise ConfigError(f"methods: none could answer ({why}).")
        results = {
            "settings": {
                "seed": self.settings.seed,
                "limit": self.settings.limit,
                "general": list(self.settings.general),
                "share_prompts": self.settings.share_prompts,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                **self.sizes,
            },
            "versions": _versions(self.model),
            **self.identity,
            "tasks": {task.name: _describe(task) for task in tasks},
            "methods": {name: run.described[name] for name in names if name in run.described},
            "failed": failed,
            "left_out": dict(left_out or {}),
            **self.summary(),
            "answers": [chunk.path.relative_to(self.out).as_posix() for chunk in run.chunks],
        }
        # Processes may share a folder; of those that end at once, the last writes all of these.
        with claimed(self.out / ".results.lock", str(self.out), wait=True):
            write_json(self.out / "results.json", results)
            write_bytes(self.out / "table.md", table(results).encode())
            if pictures:
                draw(results, self.out)
        return results


def _template(tokenizer: Any, tasks: Sequence[EvalTask]) -> dict[str, str]:
    """The chat template, where an answer depends on it."""
    chats = any(isinstance(e, Conversation) for task in tasks for e in task.examples)
    return {"chat_template": str(tokenizer.chat_template)} if chats else {}


def _reasons(
    tasks: Sequence[EvalTask], methods: Sequence[Method], failed: Mapping[str, str]
) -> dict[tuple[str, str], str]:
    """Why a method has no score on a task, where it has none."""
    found = {}
    for task in tasks:
        for method in methods:
            words = "held-out tasks" if task.role == "own" else "the experts' own tasks"
            if task.unanswerable:
                found[task.name, method.name] = task.unanswerable
            elif method.name in failed:
                found[task.name, method.name] = failed[method.name]
            elif task.role not in method.roles:
                found[task.name, method.name] = f"defined on {words} only"
    return found


def _describe(task: EvalTask) -> dict[str, Any]:
    return {
        "role": task.role,
        "metric": task.metric,
        "n": len(task.examples),
        "hash": task.hash,
        "contaminated": dict(task.contaminated),
        "unanswerable": task.unanswerable,
    }


def _identify(model: Any, tokenizer: Any, pool: ExpertPool) -> dict[str, Any]:
    """The base and the experts by content."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        weights.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    base = {**identify_base(model, tokenizer).to_json(), "weights": weights.hexdigest()}
    return {"base": base, "experts": pool_hashes(pool)}


def _versions(model: Any) -> dict[str, str]:
    on_gpu = model.device.type == "cuda"
    name = torch.cuda.get_device_name(model.device) if on_gpu else platform.machine()
    return {
        "phatgoose": phatgoose.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "device": f"{model.device.type} ({name})",
    }
