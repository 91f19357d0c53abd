"""Task analyses against sums over traces of one example at a time, in plain Python."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn
from transformers import PreTrainedTokenizerFast

import phatgoose
from phatgoose.analysis import (
    TaskAnalysis,
    analyse_tasks,
    describe,
    draw_entropy,
    draw_overview,
    draw_sentence,
    draw_task,
    save_analyses,
)
from phatgoose.analysis.summary import layers
from phatgoose.analysis.tally import SEGMENTS, places
from phatgoose.errors import ConfigError, RoutingError
from phatgoose.evaluation import own_share
from phatgoose.tasks import Example, encode

NAMES = ["a", "b", "c", "d"]
TASKS = {
    "b": [Example("a prompt: ", "abc"), Example("b", "its answer"), Example("cd ef", "g")],
    "other": [Example("one more", "an answer"), Example("x", "y")],
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"null_score": 0.1, "temperature": 0.5},
    {"scale": "unit", "top_k": 3, "null_score": 0.0},
]


class Plain:
    """One task's routing, token by token."""

    def __init__(self, model: nn.Module, tokenizer: Any, examples: list[Example]) -> None:
        self.shares: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self.tokens: Counter[tuple[str, str]] = Counter()
        self.scales: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.distinct: dict[str, Counter[int]] = defaultdict(Counter)
        self.layers: dict[str, list[str]] = {}
        seq2seq = model.config.is_encoder_decoder
        for example in examples:
            ids = encode(tokenizer, example.prompt, example.target, max_length=99, seq2seq=seq2seq)
            prompt, answer = torch.tensor([ids.prompt]), torch.tensor([ids.target[:-1]])
            with torch.no_grad(), phatgoose.record(model) as trace:
                if seq2seq:
                    start = torch.full((1, 1), model.config.decoder_start_token_id)
                    model(prompt, decoder_input_ids=torch.cat([start, answer], dim=1))
                else:
                    model(torch.cat([prompt, answer], dim=1))
            self.layers = layers(trace)
            self._add(trace, prompt.shape[1], seq2seq)

    def _add(self, trace: Any, length: int, seq2seq: bool) -> None:
        for stream, table in trace.tokens.items():
            for n, position in enumerate(table.position.tolist()):
                part = "prompt" if position < length else "answer"
                if seq2seq and stream == "decoder":
                    part = "answer" if position else "start"
                used = set()
                for module in (m for m in trace.experts if trace.streams[m] == stream):
                    experts = trace.experts[module][n].tolist()
                    weights = trace.weights[module][n].tolist()
                    for expert, weight in zip(experts, weights, strict=True):
                        name = trace.names[expert] if expert >= 0 else "none"
                        self.shares[part, module][name] += weight / sum(weights)
                        if expert >= 0 and weight > 0:
                            used.add(expert)
                    mine = [w for e, w in zip(experts, weights, strict=True) if e >= 0] or [0.0]
                    self.scales[module].append((sum(mine), max(mine)))
                    self.tokens[part, module] += 1
                self.distinct[stream][len(used)] += 1

    def share(self, modules: list[str], parts: tuple[str, ...] = SEGMENTS) -> list[float]:
        """Of each expert, and last of none; all NaN where there are no tokens."""
        keys = [(part, module) for part in parts for module in modules]
        count = sum(self.tokens[key] for key in keys)
        return [
            sum(self.shares[key][name] for key in keys) / count if count else math.nan
            for name in [*NAMES, "none"]
        ]


@pytest.fixture(params=["llama", "t5"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_numbers(
    kind: str,
    settings: dict[str, Any],
    routed: Callable[..., nn.Module],
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = routed(kind, NAMES, **settings)
    for budget in (1, 40, 1000):
        analyses = analyse_tasks(model, byte_tokenizer, TASKS, max_tokens_per_batch=budget)
        assert list(analyses) == list(TASKS)
        for name, analysis in analyses.items():
            _check(analysis, Plain(model, byte_tokenizer, TASKS[name]))
    described = describe(analyses["b"])
    assert json.loads(json.dumps(described, allow_nan=False)) == described


def _check(analysis: TaskAnalysis, plain: Plain) -> None:
    near = lambda values: pytest.approx(values, abs=2e-5, nan_ok=True)  # noqa: E731
    modules = [place.module for place in analysis.places]
    assert modules == [m for members in plain.layers.values() for m in members]
    assert list(analysis.layers) == list(plain.layers)
    assert analysis.shares().tolist() == near(plain.share(modules))
    for part in SEGMENTS:
        assert analysis.shares(part).tolist() == near(plain.share(modules, (part,)))
        for row, members in zip(analysis.by_layer(part), plain.layers.values(), strict=True):
            assert row.tolist() == near(plain.share(members, (part,)))
    for row, module in zip(analysis.by_module(), modules, strict=True):
        assert row.tolist() == near(plain.share([module]))
    mean, deviation = analysis.scale_by_layer()
    for index, members in enumerate(plain.layers.values()):
        share = plain.share(members)
        bits = -sum(p * math.log2(p) for p in share if p)
        assert float(analysis.entropy_by_layer()[index]) == near(bits)
        for column in (0, 1):
            values = [pair[column] for module in members for pair in plain.scales[module]]
            middle = sum(values) / len(values)
            assert float(mean[index, column]) == near(middle)
            spread = math.sqrt(sum((v - middle) ** 2 for v in values) / len(values))
            assert float(deviation[index, column]) == pytest.approx(spread, abs=2e-4)
    assert set(analysis.distinct) == set(plain.distinct)
    for stream, counts in analysis.distinct.items():
        assert counts.tolist() == [plain.distinct[stream][n] for n in range(len(NAMES) + 1)]
        given = plain.distinct[stream]
        average = sum(n * count for n, count in given.items()) / sum(given.values())
        assert analysis.distinct_mean(stream) == near(average)
    none = plain.share(modules)[-1] > 0
    assert analysis.most_entropy == near(math.log2(len(NAMES) + none))


def test_it_agrees_with_the_diagnosis_of_one_expert(
    kind: str, routed: Callable[..., nn.Module], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = routed(kind, NAMES)
    analysis = analyse_tasks(model, byte_tokenizer, TASKS)["b"]
    own = own_share(model, byte_tokenizer, TASKS["b"], "b")
    inside = [i for i, p in enumerate(analysis.places) if p.stream in ("encoder", "decoder")]
    for part, expected in (("prompt", own.prompt), ("answer", own.answer)):
        row = SEGMENTS.index(part)
        found = analysis.weights[row, inside, 1].sum() / analysis.tokens[row, inside].sum()
        assert float(found) == pytest.approx(expected, abs=1e-5)
    assert analysis.sentence.names == NAMES
    assert len(next(iter(analysis.sentence.tokens.values())).ids) > 0


def test_the_oracle(
    routed: Callable[..., nn.Module], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = routed("llama", NAMES)
    found = analyse_tasks(model, byte_tokenizer, TASKS)
    assert (found["b"].oracle, found["other"].oracle) == ("b", None)
    found = analyse_tasks(model, byte_tokenizer, TASKS, oracle={"b": "a", "other": "d"})
    assert (found["b"].oracle, found["other"].oracle) == ("a", "d")
    order = found["b"].shares()[:-1].argsort(descending=True).tolist()
    assert [found["b"].rank(NAMES[i]) for i in order] == [1, 2, 3, 4]
    with phatgoose.restrict(model, ["c"]):
        alone = analyse_tasks(model, byte_tokenizer, TASKS)["other"]
    assert alone.shares().tolist() == [0, 0, 1, 0, 0]
    assert alone.entropy_by_layer().tolist() == [0, 0]


def test_what_cannot_be_analysed(
    routed: Callable[..., nn.Module], byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = routed("llama", NAMES)
    with pytest.raises(ConfigError, match="other: its oracle is to be z, which is not in the pool"):
        analyse_tasks(model, byte_tokenizer, TASKS, oracle={"other": "z"})
    with pytest.raises(ConfigError, match="empty: has no examples"):
        analyse_tasks(model, byte_tokenizer, {"empty": []})
    with pytest.raises(ConfigError, match="nothing of the prompt"):
        analyse_tasks(model, byte_tokenizer, {"mute": [Example("", "x")]})
    with pytest.raises(ConfigError, match="no task was analysed"):
        save_analyses({}, byte_tokenizer, tmp_path)
    with pytest.raises(RoutingError, match="does not route"):
        analyse_tasks(phatgoose.unroute(model), byte_tokenizer, TASKS)


def test_places() -> None:
    names = [
        "lm_head",
        "decoder.block.0.layer.1.EncDecAttention.q",
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.2.DenseReluDense.wi",
        "encoder.block.10.layer.0.SelfAttention.q",
        "encoder.block.9.layer.0.SelfAttention.q",
    ]
    found = [(p.layer, p.kind, p.stack) for p in places(dict.fromkeys(names, "decoder"))]
    assert found == [
        ("encoder 9", "q", 0),
        ("encoder 10", "q", 0),
        ("decoder 0", "EncDecAttention.q", 1),
        ("decoder 0", "SelfAttention.q", 1),
        ("decoder 0", "wi", 1),
        ("lm_head", "lm_head", 2),
    ]


@pytest.mark.parametrize(
    ("kind", "names", "settings"),
    [
        ("llama", NAMES, {"null_score": 0.1}),
        ("t5", [f"{i}_$x_^{'long' * 9}" for i in range(70)], {}),
    ],
)
def test_pictures(
    kind: str,
    names: list[str],
    settings: dict[str, Any],
    routed: Callable[..., nn.Module],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model = routed(kind, names, **settings)
    tasks = {"other": TASKS["other"], "$long_^": [Example("much " * 40, "an 犬")]}
    found = analyse_tasks(model, byte_tokenizer, tasks, oracle={"other": names[-1]})
    files = save_analyses(found, byte_tokenizer, tmp_path / "new", settings={"limit": 3})
    assert sorted(files) == sorted(p for p in (tmp_path / "new").rglob("*") if p.is_file())
    numbers = json.loads(files[0].read_text())
    assert (numbers["settings"], numbers["experts"]) == ({"limit": 3}, names)
    assert numbers["tasks"] == {name: describe(analysis) for name, analysis in found.items()}
    for file in files[1:]:
        pixels = imread(file)
        height, width = pixels.shape[:2]
        assert 500 < width < 2000 and 250 < height < 4000, file
        assert len(np.unique((255 * pixels[..., :3]) @ (1, 256, 65536))) > 50, file


def test_pictures_of_many_tasks_and_of_one(
    routed: Callable[..., nn.Module], byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = routed("llama", NAMES)
    many = {f"task {i}": [Example("x" * (1 + i % 3), "y")] for i in range(30)}
    found = analyse_tasks(model, byte_tokenizer, many)
    draw_overview(found, tmp_path / "many.png")
    draw_entropy(found, tmp_path / "lines.png")
    one = {"task 3": found["task 3"]}
    draw_overview(one, tmp_path / "one.png")
    draw_entropy(one, tmp_path / "line.png")
    draw_task(one["task 3"], tmp_path / "task.png")
    draw_sentence(one["task 3"], byte_tokenizer, tmp_path / "tokens.png")
    sizes = {path.stem: imread(path).shape[:2] for path in tmp_path.iterdir()}
    assert sizes["many"][0] > 1.5 * sizes["one"][0]
    assert all(height > 250 and width > 500 for height, width in sizes.values())
