"""demo, generate, trace."""

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import phatgoose
from phatgoose import analysis, default
from phatgoose.cli.methods import load_pool, method_inputs, training_examples
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
from phatgoose.models import load_base
from phatgoose.nn import RoutingSettings
from phatgoose.pool import ExpertPool
from phatgoose.routers import derivations, make_router
from phatgoose.tasks import SEPARATOR

WITH_EVIDENCE = "phatgoose+prompt_evidence"
ROUTING = ("top_k", "temperature", "scale", "null_score")


def demo(arguments: Namespace) -> None:
    """Answer one prompt of several skills, in one batch, with and without the pool.

    By the published router, and by the same with evidence of the prompt; see `routers.evidence`.
    """
    rows = [json.loads(line) for line in default.DEMO.read_text(encoding="utf-8").splitlines()]
    model, tokenizer, pool = routed_model(arguments)
    prompts = [row["inputs"] + SEPARATOR for row in rows]
    with phatgoose.restrict(model, []):
        base = generate_text(model, tokenizer, prompts, max_new_tokens=48)
    with phatgoose.record(model) as trace:
        routed = generate_text(model, tokenizer, prompts, max_new_tokens=48)
    leading = _leading(trace, len(rows))
    out = Path(arguments.out)
    labels = [row["task"] for row in rows]
    title = f"One batch of {len(rows)} prompts through {len(pool)} experts"
    pictures = _pictures(trace, tokenizer, out, "routing", title, labels)
    answers = [
        {**row, "base": b, "routed": r, "experts": e}
        for row, b, r, e in zip(rows, base, routed, leading, strict=True)
    ]
    ways = {"base": "base", "routed": "routed"}
    if arguments.router == "phatgoose" and all("prompt_mean" in e.signatures for e in pool):
        phatgoose.unroute(model)
        phatgoose.route(model, pool, WITH_EVIDENCE, **_options(arguments))
        found = generate_text(model, tokenizer, prompts, max_new_tokens=48)
        answers = [{**a, "evidence": text} for a, text in zip(answers, found, strict=True)]
        ways["evidence"] = "+ evidence"
    if arguments.json:
        print(json.dumps({"answers": answers, "files": pictures}, ensure_ascii=False))
        return
    print(f"{len(pool)} experts of one small base model. No prompt names its expert.\n")
    for answer in answers:
        print("\n".join(f"  | {line}" for line in answer["inputs"].splitlines()))
        shares = ", ".join(f"{name} {share:.0%}" for name, share in answer["experts"].items())
        for key, name in {**ways, "targets": "reference"}.items():
            mark = " *" if key in ways and answer[key] == answer["targets"] else ""
            print(f"  {name:>10}: {_one_line(answer[key])}{mark}")
        print(f"  {'experts':>10}: {shares}\n")
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
    print(analysis.render_text(trace, tokenizer, tokens=False))
    print("\nPictures: " + ", ".join(pictures))


def generate(arguments: Namespace) -> None:
    """Answer prompts by a router, or by any other method of an evaluation."""
    prompts = _prompts(arguments, arguments.prompt)
    pool = load_pool(arguments)
    training = training_examples(arguments.train_tasks, pool)
    model, tokenizer = load_base(arguments.base or default.BASE, device=arguments.device)
    inputs = method_inputs(arguments, pool, model, tokenizer, training=training)
    method, options = make_method(arguments.router, inputs), _options(arguments)
    if isinstance(method, Routed):
        method = replace(method, options=options)
    elif options:
        raise ConfigError(
            f"--router {method.name}: does not route tokens, so {_flags(options)} would change "
            "nothing. Leave it out, or choose a router."
        )
    answers = answer_prompts(
        model, tokenizer, pool, prompts, method, max_new_tokens=arguments.max_new_tokens
    )
    if isinstance(method, Routed):
        _tell_derived(arguments.router, pool)
    if arguments.json:
        rows = [{"prompt": p, "answer": a} for p, a in zip(arguments.prompt, answers, strict=True)]
        print(json.dumps(rows, ensure_ascii=False))
    else:
        print("\n".join(answers))


def trace(arguments: Namespace) -> None:
    """Answer one prompt, print which experts each token used, and draw it."""
    model, tokenizer, _ = routed_model(arguments)
    prompts = _prompts(arguments, [arguments.prompt])
    with phatgoose.record(model) as trace:
        (answer,) = generate_text(
            model, tokenizer, prompts, max_new_tokens=arguments.max_new_tokens
        )
    title = "Which experts each token used"
    pictures = _pictures(trace, tokenizer, Path(arguments.out), "trace", title, None)
    if arguments.json:
        summary = analysis.summarise(trace)
        print(json.dumps({"answer": answer, "files": pictures, **summary}, ensure_ascii=False))
        return
    print(answer + "\n")
    print(analysis.render_text(trace, tokenizer))
    print("\nPictures: " + ", ".join(pictures))


def routed_model(arguments: Namespace) -> tuple[Any, Any, ExpertPool]:
    """The base that routes among the experts as the options say, its tokenizer, and the pool."""
    _check_routes(arguments.router)
    pool = load_pool(arguments)
    model, tokenizer = load_base(arguments.base or default.BASE, device=arguments.device)
    phatgoose.route(model, pool, arguments.router, **_options(arguments))
    _tell_derived(arguments.router, pool)
    return model, tokenizer, pool


def _options(arguments: Namespace) -> dict[str, Any]:
    """The routing settings that were given; the others are the router's own."""
    return {name: value for name in ROUTING if (value := getattr(arguments, name)) is not None}


def routing_settings(arguments: Namespace) -> dict[str, Any]:
    """All routing settings as they are used, the router's own included."""
    settings = RoutingSettings.of(make_router(arguments.router), **_options(arguments))
    return {name: getattr(settings, name) for name in ROUTING}


def _flags(options: Mapping[str, Any]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in options)


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
        found = ", ".join(f"{name} ({source})" for name, source in derived.items())
        print(
            f"phatgoose: {router}: without gates, so with vectors derived from what they have: "
            f"{found}",
            file=sys.stderr,
        )


def _prompts(arguments: Namespace, given: Sequence[str]) -> list[str]:
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}.")
    if not all(given):
        raise ConfigError("prompt: is empty. Give some text.")
    return list(given) if arguments.raw else [prompt + SEPARATOR for prompt in given]


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
