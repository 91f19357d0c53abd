"""Writes task analyses as numbers and pictures into a folder."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from phatgoose.analysis.overview import draw_entropy, draw_overview
from phatgoose.analysis.sentence import draw_sentence
from phatgoose.analysis.summary import entropy, shares
from phatgoose.analysis.task_figure import draw_task
from phatgoose.analysis.tasks import TaskAnalysis
from phatgoose.errors import ConfigError
from phatgoose.files import write_bytes

FILE = "analysis.json"


def save_analyses(
    analyses: Mapping[str, TaskAnalysis],
    tokenizer: Any,
    out: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> list[Path]:
    """Write analysis.json, overview.png, entropy.png, and tasks/NAME.png, tasks/NAME-tokens.png.

    `settings` go into analysis.json as they are. Returns the files. Raises ConfigError where there
    is no analysis.
    """
    if not analyses:
        raise ConfigError("no task was analysed. Give at least one.")
    out = Path(out)
    numbers = {
        "settings": dict(settings or {}),
        "experts": next(iter(analyses.values())).experts,
        "tasks": {name: describe(analysis) for name, analysis in analyses.items()},
    }
    text = json.dumps(numbers, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    files = [out / FILE, out / "overview.png", out / "entropy.png"]
    write_bytes(files[0], (text + "\n").encode())
    draw_overview(analyses, files[1])
    draw_entropy(analyses, files[2])
    bar = tqdm(analyses.items(), desc="draw", unit="task", disable=not progress, leave=None)
    for name, analysis in bar:
        files += [out / "tasks" / f"{name}.png", out / "tasks" / f"{name}-tokens.png"]
        draw_task(analysis, files[-2])
        draw_sentence(analysis, tokenizer, files[-1])
    return files


def describe(analysis: TaskAnalysis) -> dict[str, Any]:
    """Give a task's numbers, ready for JSON. Lists of shares follow the pool's order of experts.

    A share is a part of a token's weight at a module, 0 to 1, mean over tokens and modules; where
    they do not sum to 1, the rest went to no expert. None stands for a part without tokens.

    Returns:
        examples, oracle, tokens: prompt and answer tokens.
        shares, oracle_share, oracle_rank: over everything.
        modules: for each its name, layer, kind, stream, shares and entropy (bits).
        layers: for each its name, shares, entropy, oracle (its share: all, prompt, answer), and
            sum and maximum of a token's weights at a module, each as mean and deviation.
        most_entropy: of a layer or module that uses all alike.
        distinct: by stream, how many tokens used 0, 1, 2, ... different experts.
    """
    oracle = None if analysis.oracle is None else analysis.experts.index(analysis.oracle)
    everything, modules = analysis.shares(), analysis.by_module()
    prompt, answer, _ = analysis.tokens.max(1).values.tolist()
    return {
        "examples": analysis.examples,
        "oracle": analysis.oracle,
        "tokens": {"prompt": prompt, "answer": answer},
        "shares": _numbers(everything[:-1]),
        "oracle_share": None if oracle is None else _number(everything[oracle]),
        "oracle_rank": None if analysis.oracle is None else analysis.rank(analysis.oracle),
        "most_entropy": _number(analysis.most_entropy),
        "modules": [
            {
                "name": place.module,
                "layer": place.layer,
                "kind": place.kind,
                "stream": place.stream,
                "shares": _numbers(modules[index, :-1]),
                "entropy": _number(entropy(shares(modules[index]))),
            }
            for index, place in enumerate(analysis.places)
        ],
        "layers": _layers(analysis, oracle),
        "distinct": {stream: counts.tolist() for stream, counts in analysis.distinct.items()},
    }


def _layers(analysis: TaskAnalysis, oracle: int | None) -> list[dict[str, Any]]:
    by_layer, bits = analysis.by_layer(), analysis.entropy_by_layer()
    parts = {"all": by_layer, "prompt": analysis.by_layer("prompt")}
    parts["answer"] = analysis.by_layer("answer")
    mean, deviation = analysis.scale_by_layer()
    return [
        {
            "name": name,
            "shares": _numbers(by_layer[index, :-1]),
            "entropy": _number(bits[index]),
            "oracle": None
            if oracle is None
            else {part: _number(share[index, oracle]) for part, share in parts.items()},
            **{
                what: {
                    "mean": _number(mean[index, column]),
                    "deviation": _number(deviation[index, column]),
                }
                for column, what in enumerate(("sum", "maximum"))
            },
        }
        for index, name in enumerate(analysis.layers)
    ]


def _numbers(values: Float[Tensor, " n"]) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _number(value: Any) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)
