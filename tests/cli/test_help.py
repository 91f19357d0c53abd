"""Help and usage errors: instant, and without torch."""

import argparse
import json
import subprocess
import sys

import pytest

import phatgoose
from phatgoose.cli.main import EXIT_CODES, build_parser

COMMANDS = [
    "",
    "demo",
    "generate",
    "trace",
    "eval",
    "analyze",
    "gate",
    "train",
    "base",
    "base fetch",
    "experts",
    "experts list",
    "experts verify",
    "experts train",
    "experts gate",
    "experts derive",
    "experts merge",
    "experts import",
    "experts push",
    "experts pull",
    "serve",
]
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "numpy",
    "matplotlib",
    "huggingface_hub",
    "starlette",
    "vllm",
)
# Prints help for every command in turn, then which heavy modules that has loaded.
ALL_HELP = f"""
import json, sys
from phatgoose.cli.main import main
codes = []
for words in {COMMANDS!r}:
    try:
        main([*words.split(), "--help"])
    except SystemExit as stopped:
        codes.append(stopped.code)
print(json.dumps([codes, [name for name in {HEAVY!r} if name in sys.modules]]), file=sys.stderr)
"""


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_has_help(run, words):
    result = run(*words.split(), "--help")
    assert result.code == 0
    assert result.out.startswith(" ".join(["usage: phatgoose", *words.split()]))
    assert result.err == ""


def test_help_lists_every_command():
    assert set(COMMANDS) == {"", *_commands(build_parser())}


def test_help_loads_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", ALL_HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr) == [[0] * len(COMMANDS), []]


def test_help_tells_the_exit_codes(run):
    assert EXIT_CODES in run("--help").out


@pytest.mark.parametrize("module", ["phatgoose", "phatgoose.cli"])
def test_the_module_runs_and_tells_its_version(module):
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, phatgoose.__version__)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "fly",
        "experts",
        "experts fly",
        "experts verify",
        "experts train --tasks tasks",
        "experts train --out pool",
        "experts train --tasks tasks --out pool --together all",
        "experts gate adapter",
        "experts gate --tasks tasks",
        "experts import best.pt --out x",
        "experts merge one two",
        "experts merge --out x",
        "experts merge one --out x --rank two",
        "experts push folder",
        "experts pull owner/name",
        "generate",
        "generate hello --top-k two",
        "generate hello --scale loud",
        "generate hello --nonsense",
        "trace",
        "trace one two",
        "eval --out x",
        "eval --tasks tasks",
        "eval --tasks tasks --out x --limit few",
        "analyze",
        "analyze --tasks x --limit two",
        "gate adapter",
        "gate --data data.jsonl",
        "train --data data.jsonl",
        "train --out x",
        "train --data data.jsonl --out x --save-dtype float8",
        "serve --top-k all",
        "serve --port http",
    ],
)
def test_wrong_usage(run, words):
    result = run(*words.split())
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("usage: phatgoose")
    assert "error: " in result.err


def _commands(parser, before=""):
    """The names of all commands and nouns under a parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield f"{before}{name}"
                yield from _commands(below, f"{before}{name} ")
