"""demo, generate, trace."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import phatgoose
from phatgoose import analysis
from phatgoose.cli.arguments.inference import Demo, Generate, Trace
from phatgoose.cli.fields import flag
from phatgoose.cli.loading import load
from phatgoose.cli.methods import base_of, load_pool, method_inputs, tell_found, training_examples
from phatgoose.cli.options import ROUTER, AnswerOptions, RoutedOptions
from phatgoose.default import smollm2, tiny
from phatgoose.errors import ConfigError
from phatgoose.evaluation import (
    Routed,
    answer_prompts,
    generate_text,
    is_method,
    is_router,
    make_method,
    method_names,
)
from phatgoose.models import DEFAULT, TINY
from phatgoose.pool import ExpertPool
from phatgoose.routers import derivations, make_router
from phatgoose.tasks import SEPARATOR, Example, one_turn

WITH_EVIDENCE = "phatgoose+prompt_evidence"
LONGEST = 64  # tokens of an answer in the demo


def demo(asked: Demo) -> None:
    """Answer one prompt of several skills, in one batch, with and without the pool.

    By the published router, and by the same with evidence of the prompt; see `routers.evidence`.
    """
    pool_of = tiny if (asked.base or DEFAULT) == TINY else smollm2
    rows = [json.loads(line) for line in pool_of.DEMO.read_text(encoding="utf-8").splitlines()]
    model, tokenizer, pool = routed_model(asked)
    prompts = [row["inputs"] + SEPARATOR for row in rows]
    with phatgoose.restrict(model, []):
        base = generate_text(model, tokenizer, prompts, max_new_tokens=LONGEST)
    with phatgoose.record(model) as trace:
        routed = generate_text(model, tokenizer, prompts, max_new_tokens=LONGEST)
    answers = [
        {**row, "base": b, "routed": r, "experts": e}
        for row, b, r, e in zip(rows, base, routed, _leading(trace, len(rows)), strict=True)
    ]
    ways = {"base": "base", "routed": "routed"}
    if asked.router == "phatgoose" and all("prompt_mean" in e.signatures for e in pool):
        phatgoose.unroute(model)
        phatgoose.route(model, pool, WITH_EVIDENCE, **asked.routing())
        texts = generate_text(model, tokenizer, prompts, max_new_tokens=LONGEST)
        answers = [{**a, "evidence": text} for a, text in zip(answers, texts, strict=True)]
        ways["evidence"] = "+ evidence"
    title = f"One batch of {len(rows)} prompts through {len(pool)} experts"
    labels = [row["task"] for row in rows]
    pictures = _pictures(trace, tokenizer, asked.out, "routing", title, labels)
    if asked.json:
        print(json.dumps({"answers": answers, "files": pictures}, ensure_ascii=False))
        return
    print(f"{len(pool)} experts of one base model. No prompt names its expert.\n")
    _print_demo(answers, ways)
    print(analysis.render_text(trace, tokenizer, tokens=False))
    print("\nPictures: " + ", ".join(pictures))


def _print_demo(answers: Sequence[Mapping[str, Any]], ways: Mapping[str, str]) -> None:
    """Each prompt with its answers, then how many equal the reference."""
    for answer in answers:
        print("\n".join(f"  | {line}" for line in answer["inputs"].splitlines()))
        for key, name in {**ways, "targets": "reference"}.items():
            mark = " *" if key in ways and answer[key] == answer["targets"] else ""
            print(f"  {name:>10}: {_one_line(answer[key])}{mark}")
        shares = ", ".join(f"{name} {share:.0%}" for name, share in answer["experts"].items())
        print(f"  {'experts':>10}: {shares} (its own: {answer['task']})\n")
    right = [
        f"{name} {sum(answer[key] == answer['targets'] for answer in answers)}"
        for key, name in ways.items()
    ]
    print(f"Equal to the reference (*): {', '.join(right)} of {len(answers)}.")
    if "evidence" in ways:
        print(
            f"With evidence of the prompt: --router {WITH_EVIDENCE}. Experts and pictures: routed."
        )
    print()


def generate(asked: Generate) -> None:
    """Answer prompts by a router, or by any other method of an evaluation."""
    prompts, name = _prompts(asked.prompt, asked), method_name(asked)
    pool = load_pool(asked)
    training = training_examples(asked.train_tasks, pool, chat=asked.chat)
    model, tokenizer = load(base_of(asked, pool), asked)
    inputs = method_inputs(asked, pool, model, tokenizer, training=training, chat=asked.chat)
    method, knobs = make_method(name, inputs), asked.routing()
    if isinstance(method, Routed):
        method = replace(method, options=knobs)
    elif knobs:
        raise ConfigError(
            f"--router {method.name}: does not route tokens, so {', '.join(map(flag, knobs))} "
            "would change nothing. Leave it out, or choose a router."
        )
    answers = answer_prompts(
        model, tokenizer, pool, prompts, method, max_new_tokens=asked.max_new_tokens
    )
    if isinstance(method, Routed):
        _tell_derived(name, pool)
    tell_found(method)
    if asked.json:
        rows = [{"prompt": p, "answer": a} for p, a in zip(asked.prompt, answers, strict=True)]
        print(json.dumps(rows, ensure_ascii=False))
    else:
        print("\n".join(answers))


def method_name(asked: Generate) -> str:
    """What answers. Raises ConfigError for weights that would change nothing."""
    if asked.weights is None:
        return asked.router or ROUTER
    if asked.router not in (None, "weights"):
        raise ConfigError(
            f"--weights: fix the mixture, so --router {asked.router} would not be asked. Leave one "
            "of the two out."
        )
    return "weights"


def trace(asked: Trace) -> None:
    """Answer one prompt, print which experts each token used, and draw it."""
    prompts = _prompts([asked.prompt], asked)
    model, tokenizer, _ = routed_model(asked)
    with phatgoose.record(model) as trace:
        (answer,) = generate_text(model, tokenizer, prompts, max_new_tokens=asked.max_new_tokens)
    title = "Which experts each token used"
    pictures = _pictures(trace, tokenizer, asked.out, "trace", title, None)
    if asked.json:
        summary = analysis.summarise(trace)
        print(json.dumps({"answer": answer, "files": pictures, **summary}, ensure_ascii=False))
        return
    print(answer + "\n")
    print(analysis.render_text(trace, tokenizer))
    print("\nPictures: " + ", ".join(pictures))


def routed_model(asked: RoutedOptions) -> tuple[Any, Any, ExpertPool]:
    """The base that routes among the experts as the options say, its tokenizer, and the pool."""
    _check_routes(asked.router)
    pool = load_pool(asked)
    model, tokenizer = load(base_of(asked, pool), asked)
    phatgoose.route(model, pool, asked.router, **asked.routing())
    _tell_derived(asked.router, pool)
    return model, tokenizer, pool


def _check_routes(name: str) -> None:
    """Raise ConfigError for a method that is no router: there would be no routing to show."""
    if is_method(name) and not is_router(name):
        raise ConfigError(
            f"--router {name}: does not route tokens, so there is nothing to show; only generate "
            f"and eval take it. Choose a router: {', '.join(filter(is_router, method_names()))}."
        )


def _tell_derived(router: str, pool: ExpertPool) -> None:
    derived = derivations(make_router(router), pool)
    if derived:
        experts = ", ".join(f"{name} ({source})" for name, source in derived.items())
        print(
            f"phatgoose: {router}: without gates, so with vectors derived from what they have: "
            f"{experts}",
            file=sys.stderr,
        )


def _prompts(given: Sequence[str], asked: AnswerOptions) -> list[Example]:
    if not all(given):
        raise ConfigError("prompt: is empty. Give some text.")
    if asked.chat and asked.raw:
        raise ConfigError("--raw gives the prompt as it is, and --chat as a turn. Leave one out.")
    if asked.chat:
        return [one_turn(prompt) for prompt in given]
    return [Example(prompt if asked.raw else prompt + SEPARATOR, "") for prompt in given]


def _pictures(
    trace: Any, tokenizer: Any, out: Path, name: str, title: str, labels: list[str] | None
) -> list[str]:
    png, html = out / f"{name}.png", out / f"{name}.html"
    analysis.save_picture(trace, tokenizer, png, title=title, labels=labels)
    analysis.save_html(trace, tokenizer, html, title=title, labels=labels)
    return [str(png), str(html)]


def _leading(trace: Any, rows: int, count: int = 3) -> list[dict[str, float]]:
    """The largest expert shares of each sequence."""
    return [
        {trace.names[i]: round(float(shares[i]), 3) for i in shares.topk(count).indices.tolist()}
        for shares in (trace.shares(sequence=row) for row in range(rows))
    ]


def _one_line(text: str) -> str:
    return " / ".join(text.split("\n"))[:200] or "(nothing)"
