"""lm_eval with our model, from its own command line and from Python, against our own evaluator."""

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import phatgoose
from phatgoose import lm_eval_hook
from phatgoose.default import tiny
from phatgoose.errors import ConfigError, PhatgooseError
from phatgoose.evaluation import evaluate, score_choices
from phatgoose.evaluation.harness import PhatgooseLM
from phatgoose.lm_eval_hook import register
from phatgoose.models import load_base
from phatgoose.tasks import read_examples
from tests.models import make_model, mixed_targets, save_experts

EXAMPLES = Path(__file__).parents[2] / "docs" / "lm_eval"
TASKS = f"{EXAMPLES / 'choices.yaml'},{EXAMPLES / 'text.yaml'}"
COMMAND = Path(sys.executable).with_name("lm_eval")
# Of the default pool's tasks, with answers of one and of several tokens.
KINDS = ["abbreviation", "some other thing", "description", "person", "place", "number"]
ASPECTS = ["praise", "criticise", "simply mention it"]
QUESTIONS = (
    ('Is the asker of "What is caffeine?" looking for one of these?', "description", KINDS),
    ('Is the asker of "Who wrote Emma?" looking for one of these?', "person", KINDS),
    ('Is the asker of "How many legs has a crab?" looking for one of these?', "number", KINDS),
    ('Is the asker of "What does NATO stand for?" looking for these?', "abbreviation", KINDS),
    ('Did this guest mention the menu?\n"The menu changes."', "simply mention it", ASPECTS),
    ('Did this guest praise the waiter?\n"The waiter was lovely."', "praise", ASPECTS),
)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, from here on the current one, with choices.jsonl and text.jsonl."""
    monkeypatch.chdir(tmp_path)
    cache = str(tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    rows = [{"inputs": i, "targets": t, "choices": c} for i, t, c in QUESTIONS]
    Path("choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    demo = tiny.DEMO.read_text(encoding="utf-8").splitlines()
    Path("text.jsonl").write_text("\n".join(demo[:3]) + "\n", encoding="utf-8")
    return tmp_path


def arguments(router: str) -> list[str]:
    return [
        *("--model", "phatgoose", "--model_args"),
        f"base={tiny.BASE},experts={tiny.EXPERTS},router={router},top_k=2",
        *("--tasks", TASKS, "--batch_size", "4", "--device", "cpu"),
        *("--output_path", "out", "--log_samples"),
    ]


@pytest.mark.slow  # lm_eval reads the 13,000 files of its own tasks first
def test_routed_from_the_command_line(data: Path) -> None:
    assert COMMAND.exists(), "pip install 'phatgoose[eval]'"
    run = subprocess.run(
        [COMMAND, *arguments("phatgoose")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    model, tokenizer = load_base(tiny.BASE, device="cpu")
    phatgoose.route(model, phatgoose.ExpertPool.load(tiny.expert_folders()), top_k=2)
    assert_equal_to_ours(data, model, tokenizer)
    with phatgoose.restrict(model, []), pytest.raises(AssertionError):  # so the pool was there
        assert_equal_to_ours(data, model, tokenizer)


def test_base_from_the_command_line(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", quick)  # without its own tasks: ten seconds less
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments("base")])
    cli_evaluate()
    assert_equal_to_ours(data, *load_base(tiny.BASE, device="cpu"))


def assert_equal_to_ours(data: Path, model: Any, tokenizer: Any) -> None:
    """lm_eval's log-likelihoods, answers and scores, against the model called directly."""
    examples = read_examples("choices.jsonl")
    means = score_choices(model, tokenizer, examples)
    for sample, row in zip(samples(data, "choices"), means, strict=True):
        sums = [float(total) for ((total, _),) in sample["resps"]]
        asked = [sample["arguments"][f"gen_args_{n}"] for n in range(len(sums))]
        direct = [log_likelihood(model, tokenizer, a["arg_0"], a["arg_1"]) for a in asked]
        assert sums == pytest.approx(direct, abs=1e-4)
        counts = sample["doc"]["tokens"]
        ranked = [(s - sums[-1]) / n for s, n in zip(sums[:-1], counts, strict=True)]
        assert ranked == pytest.approx(row, abs=1e-4)
        assert len(set(counts)) > 1
    scores, texts = ours(model, tokenizer)
    assert outcome(data) == scores
    written = [sample["resps"][0][0] for sample in samples(data, "text")]
    assert [text.strip() for text in written] == texts


def ours(model: Any, tokenizer: Any) -> tuple[dict[str, float], list[str]]:
    """The scores of our own evaluator, and what the model wrote."""
    answers = {
        "choices": evaluate(model, tokenizer, read_examples("choices.jsonl"), "accuracy"),
        "text": evaluate(
            model, tokenizer, read_examples("text.jsonl"), "exact_match", max_new_tokens=48
        ),
    }
    scores = {task: sum(a.score for a in some) / len(some) for task, some in answers.items()}
    return scores, [answer.prediction for answer in answers["text"]]


def outcome(data: Path) -> dict[str, float]:
    (path,) = (data / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    return {
        "choices": results["phatgoose_choices"]["acc,none"],
        "text": results["phatgoose_text"]["exact_match,none"],
    }


def samples(data: Path, task: str) -> list[dict[str, Any]]:
    (path,) = (data / "out").rglob(f"samples_phatgoose_{task}_*.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: int(row["doc_id"]))


def log_likelihood(model: Any, tokenizer: Any, context: str, answer: str) -> float:
    """log p(answer | context), by one forward over the one sequence."""
    context, answer = spaces_moved(context, answer)
    whole = tokenizer(context + answer, return_tensors="pt").input_ids
    start = len(tokenizer(context).input_ids)
    with torch.no_grad():
        log_p = model(whole).logits[0, :-1].log_softmax(-1)
    places = range(start, whole.shape[1])
    return math.fsum(float(log_p[place - 1, whole[0, place]]) for place in places)


@pytest.fixture
def folders(tmp_path: Path, tokenizer: Any) -> Callable[[str], tuple[Path, list[Path]]]:
    """folders("llama"): a tiny base with its tokenizer, and three experts."""

    def save(family: str) -> tuple[Path, list[Path]]:
        model, base = make_model(family), tmp_path / family / "base"
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        return base, save_experts(tmp_path / family, model, mixed_targets(family, 3))

    return save


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, some, index) for index, some in enumerate(arguments)]


PAIRS = [("ab", "c"), ("ab", "d"), ("what is it?\n", "x1y2"), ("a", "b"), ("long " * 8, "tail end")]


@pytest.mark.parametrize(("family", "batch_size"), [("llama", 4), ("llama", "auto"), ("t5", 4)])
def test_answers_are_scored_as_if_alone(
    folders: Callable[..., Any], family: str, batch_size: int | str
) -> None:
    base, experts = folders(family)
    found = {}
    for router in ("phatgoose", "base"):
        lm = PhatgooseLM(
            base=str(base),
            experts=";".join(map(str, experts)),
            router=router,
            device="cpu",
            batch_size=batch_size,
            max_batch_size=2,
        )
        found[router] = [total for total, _ in lm.loglikelihood(requests("loglikelihood", *PAIRS))]
        model, tokenizer = load_base(base, device="cpu")
        if router == "phatgoose":
            phatgoose.route(model, phatgoose.ExpertPool.load(experts))
        direct = log_likelihood if family == "llama" else log_likelihood_of_decoder
        expected = [direct(model, tokenizer, *pair) for pair in PAIRS]
        assert found[router] == pytest.approx(expected, abs=1e-4)
    assert found["phatgoose"] != pytest.approx(found["base"], abs=1e-2)


def spaces_moved(context: str, answer: str) -> tuple[str, str]:
    """lm_eval counts white space at the end of a context to the answer."""
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + answer


def log_likelihood_of_decoder(model: Any, tokenizer: Any, context: str, answer: str) -> float:
    context, answer = spaces_moved(context, answer)
    ids = tokenizer(context, return_tensors="pt").input_ids
    wanted = tokenizer(answer, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        log_p = model(input_ids=ids, labels=wanted).logits[0].log_softmax(-1)
    return float(log_p.gather(-1, wanted[0].unsqueeze(-1)).sum())


def test_generates_as_the_model_does(folders: Callable[..., Any], tokenizer: Any) -> None:
    base, experts = folders("llama")
    lm = PhatgooseLM(base=str(base), experts=experts, top_k=1, device="cpu", batch_size=3)
    prompts = ["a", "some longer prompt", "ab: ", "x" * 90]
    settings = {"until": [], "do_sample": False, "max_gen_toks": 5}
    found = lm.generate_until(requests("generate_until", *((p, settings) for p in prompts)))
    model, _ = load_base(base, device="cpu")
    phatgoose.route(model, phatgoose.ExpertPool.load(experts), top_k=1)
    for prompt, text in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids[:, -(64 - 5) :]
        wanted = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert text == tokenizer.decode(wanted, skip_special_tokens=True)


def test_bare_base_is_lm_evals_own_model(folders: Callable[..., Any]) -> None:
    base, experts = folders("llama")
    asked = requests("loglikelihood", *PAIRS)
    wanted = HFLM(pretrained=str(base), device="cpu", dtype="float32").loglikelihood(asked)
    for bare in ({"experts": "none"}, {"experts": None}, {"experts": experts, "router": "base"}):
        assert PhatgooseLM(base=str(base), device="cpu", **bare).loglikelihood(asked) == wanted
    rolling = requests("loglikelihood_rolling", ("a text of more than sixty-four tokens " * 3,))
    lm = PhatgooseLM(base=str(base), device="cpu", experts="none")
    own = HFLM(pretrained=str(base), device="cpu", dtype="float32")
    assert lm.loglikelihood_rolling(rolling) == own.loglikelihood_rolling(rolling)


def test_from_python(folders: Callable[..., Any], tmp_path: Path) -> None:
    base, experts = folders("llama")
    rows = [{"q": "ab", "a": "cd"}, {"q": "x", "a": "y"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "rows.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "perplexity"}],
    }
    lm = PhatgooseLM(base=str(base), experts=experts[:2], device="cpu", scale="unit", top_k=1)
    results = lm_eval.simple_evaluate(
        lm, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    model, tokenizer = load_base(base, device="cpu")
    pool = phatgoose.ExpertPool.load(experts[:2])
    phatgoose.route(model, pool, top_k=1, scale="unit")
    mean = sum(log_likelihood(model, tokenizer, r["q"], r["a"]) for r in rows) / len(rows)
    assert results["results"]["tiny"]["perplexity,none"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert results["config"]["phatgoose"] == {
        "version": phatgoose.__version__,
        "base": str(base),
        "router": "phatgoose",
        "experts": pool.names,
        "top_k": 1,
        "scale": "unit",
    }


def test_installing_registers_the_model() -> None:
    for group, wanted in (("lm_eval.models", PhatgooseLM), ("torch.backends", register)):
        (found,) = entry_points(group=group, name="phatgoose")
        assert found.load() is wanted
    assert get_model("phatgoose") is PhatgooseLM
    assert f"{PhatgooseLM.__module__}:{PhatgooseLM.__name__}" == lm_eval_hook.MODEL


def test_arguments_go_before_flags(folders: Callable[..., Any]) -> None:
    base, experts = folders("llama")
    flags = {"batch_size": 2, "max_batch_size": None, "device": "cuda:7"}
    text = f"base={base},experts={experts[0]}; {experts[2]},top_k=1,device=cpu,null_score=none"
    lm = PhatgooseLM.create_from_arg_string(text, flags)
    assert lm.device.type == "cpu"
    assert lm.batch_size == 2
    assert lm.get_model_info()["phatgoose"]["experts"] == [experts[0].name, experts[2].name]


def test_lm_evals_default_device_is_no_order(
    folders: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base, _ = folders("llama")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("phatgoose.models.best_device", lambda: "cpu")
    monkeypatch.setattr("phatgoose.evaluation.harness.best_device", lambda: "cpu")
    assert PhatgooseLM(base=str(base), experts="none", device="cuda:0").device.type == "cpu"
    assert "the device is cpu" in caplog.text
    with pytest.raises(ConfigError, match="cuda:1"):
        PhatgooseLM(base=str(base), experts="none", device="cuda:1")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"routr": "arrow", "pretrained": "x"}, "there is no pretrained, routr"),
        ({"router": "roulette"}, "no router is called 'roulette'"),
        ({"experts": "one;;two"}, "has an empty name"),
        ({"experts": []}, "has an empty name"),
        ({"experts": "no/such/folder/here"}, "no/such/folder/here"),
        ({"dtype": "float31"}, "'float31' is none"),
        ({"dtype": "int8"}, "'int8' is none"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"scale": "huge"}, "scale must be one of"),
        ({"experts": "default"}, "was made for another base"),
    ],
)
def test_bad_arguments(folders: Callable[..., Any], wrong: dict[str, Any], says: str) -> None:
    base, experts = folders("llama")
    with pytest.raises(PhatgooseError, match=says):
        PhatgooseLM(**{"base": str(base), "experts": experts, "device": "cpu", **wrong})


def test_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="runs in 2 processes"):
        PhatgooseLM()


def test_answers_that_cannot_be_scored(folders: Callable[..., Any]) -> None:
    base, _ = folders("llama")
    lm = PhatgooseLM(base=str(base), experts="none", device="cpu")
    for answer in ("", "x" * 65):
        with pytest.raises(ConfigError, match=f"an answer of {len(answer)} tokens"):
            lm.loglikelihood(requests("loglikelihood", ("ab", answer)))
