"""demo, generate, trace."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phatgoose.cli.fields import Command, argument, option
from phatgoose.cli.options import ROUTER, AnswerOptions, MethodOptions, RoutedOptions


@dataclass(frozen=True, kw_only=True)
class Demo(RoutedOptions):
    """Answer prompts of several skills with the pool in the package."""

    out: Path = option("folder to draw pictures in", default=Path("phatgoose-demo"))


@dataclass(frozen=True, kw_only=True)
class Generate(AnswerOptions, RoutedOptions, MethodOptions):
    """Answer prompts by a router, or by another method."""

    prompt: Sequence[str] = argument("one or more prompts, answered in one batch")
    router: str | None = option(  # type: ignore[assignment]  # a method may stand for it
        "what answers: a router's name, or base, single:NAME, retrieval, merged, peft_ties, "
        f"multitask and so on (docs/routers.md has all of them); without it, {ROUTER}, or weights "
        "where --weights says some",
        default=None,
    )


@dataclass(frozen=True, kw_only=True)
class Trace(AnswerOptions, RoutedOptions):
    """Answer one prompt, and show which experts each token used."""

    prompt: str = argument("the prompt")
    out: Path = option(
        "folder to write trace.html and trace.png to", default=Path("phatgoose-trace")
    )


COMMANDS = (
    Command("demo", Demo, run="inference:demo"),
    Command("generate", Generate, run="inference:generate"),
    Command("trace", Trace, run="inference:trace"),
)
