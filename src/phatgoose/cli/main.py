"""The `phatgoose` command: parse, run, and say by the exit code how it went."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import phatgoose
from phatgoose.cli.arguments import COMMANDS, NOUNS
from phatgoose.cli.fields import Command, Options, add_options, read_options, takes_the_rest
from phatgoose.cli.screen import screened
from phatgoose.errors import PhatgooseError
from phatgoose.text import visible

_PYTHONS_LINE = warnings.formatwarning
EXIT_CODES = """exit codes:
  0    done
  1    bad input or a failure, which one line on stderr tells
  2    wrong usage
  3    `experts verify` found something wrong
  130  interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    try:
        command, asked = parse(argv)
        warnings.formatwarning = _warning_line
        # torch is loaded only from here on, so that help and usage errors are instant.
        module, function = command.run.split(":")
        run = getattr(import_module(f"phatgoose.cli.{module}"), function)
        with nullcontext() if module == "serving" else screened():  # vLLM writes its own colours
            return run(asked) or 0
    except PhatgooseError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away
        return 0
    except OSError as error:
        # Mostly a path on the command line that cannot be read or written.
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _fail(f"{what}. Check the path, its permissions and the space on the disk.", 1)


def parse(argv: Sequence[str] | None = None) -> tuple[Command, Options]:
    """The command that was typed, and its options; argparse exits where they are wrong.

    Raises ConfigError for numbers below what they may be.
    """
    parser = build_parser()
    found, unknown = parser.parse_known_args(argv)
    command: Command = found.command
    asked, unknown = read_options(command.options, found, unknown)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return command, asked


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="phatgoose",
        description="Recycle LoRA adapters: route every token to the experts that fit it.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=phatgoose.__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    nouns = {}
    for command in COMMANDS:
        *noun, verb = command.words.split()
        if noun and noun[0] not in nouns:
            about = NOUNS[noun[0]]
            below = commands.add_parser(noun[0], help=about, description=about)
            nouns[noun[0]] = below.add_subparsers(title="verbs", metavar="VERB", required=True)
        _add_command(nouns[noun[0]] if noun else commands, verb, command)
    return parser


def _add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, command: Command
) -> None:
    about = (command.options.__doc__ or "").strip()
    parser = commands.add_parser(
        name,
        help=about.splitlines()[0],
        description=about.replace("\n    ", "\n"),
        epilog=command.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=takes_the_rest(command.options) is None,
    )
    parser.set_defaults(command=command)
    add_options(parser, command.options)


def _warning_line(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
    """Our own warnings as the one line that an error is; others as Python has them."""
    if category.__module__.startswith("phatgoose."):
        return f"phatgoose: {visible(' '.join(str(message).split()))}\n"
    return _PYTHONS_LINE(message, category, *where, **line)


def _fail(message: str, code: int) -> int:
    print(f"phatgoose: {visible(' '.join(message.split()))}", file=sys.stderr)
    return code
