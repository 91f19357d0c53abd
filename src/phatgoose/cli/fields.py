"""Options as fields: a command is a frozen dataclass, and argparse is told what its fields say."""

import argparse
import inspect
import operator
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from phatgoose.errors import ConfigError

BOUNDS: tuple[tuple[str, str, Callable[[Any, Any], bool]], ...] = (
    ("least", "at least", operator.ge),
    ("above", "above", operator.gt),
    ("below", "below", operator.lt),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a command was asked; the base of all commands and of the groups they share."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is None:
                continue
            for bound, words, holds in BOUNDS:
                limit = each.metadata.get(bound)
                if limit is not None and not holds(value, limit):  # NaN is within no bounds
                    raise ConfigError(f"{flag(each.name)} must be {words} {limit}, got {value}.")


@dataclass(frozen=True)
class Command:
    """One command: its words, its options, and the function that carries it out."""

    words: str  # "experts merge"
    options: type[Options]  # whose docstring is the help text
    run: str  # "module:function" in phatgoose.cli; it takes the options
    epilog: str | None = None


def option(
    help: str,
    *,
    default: Any = MISSING,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    **how: Any,
) -> Any:
    """A field `some_name` that is the option --some-name; required, if it has no default.

    Its type says how it is read. A number may be at least `least`, and is above `above` and below
    `below`. What else argparse is to be told is in `how`.
    """
    bounds = {"least": least, "above": above, "below": below}
    return field(default=default, metadata={"help": help, "how": how, **bounds})


def argument(help: str, *, default: Any = MISSING, **how: Any) -> Any:
    """A field that is given by its position."""
    return field(default=default, metadata={"help": help, "how": how, "positional": True})


def the_rest() -> Any:
    """A field that takes every option which the command does not know."""
    return field(default=(), metadata={"the rest": True})


def flag(name: str) -> str:
    """A field's name as it is typed."""
    return f"--{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser, options: type[Options]) -> None:
    """Tell a parser every option of a command: its own first, then those of groups it shares."""
    hints = get_type_hints(options)
    groups: dict[str | None, Any] = {None: parser}
    for owner, own in _by_owner(options):
        title = vars(owner).get("TITLE")
        if own and title not in groups:
            groups[title] = parser.add_argument_group(title)
        for each in own:
            _add(groups[title], each, hints[each.name])


def read_options(
    options: type[Options], found: argparse.Namespace, unknown: list[str]
) -> tuple[Options, list[str]]:
    """A command's dataclass from what was typed, and the words that nobody takes."""
    values = {
        each.name: getattr(found, each.name) for each in fields(options) if "help" in each.metadata
    }
    rest = takes_the_rest(options)
    if rest is not None:
        return options(**values, **{rest: tuple(unknown)}), []
    return options(**values), unknown


def takes_the_rest(options: type[Options]) -> str | None:
    """The field that takes every option which the command does not know, if there is one."""
    return next((each.name for each in fields(options) if "the rest" in each.metadata), None)


def _by_owner(options: type[Options]) -> Iterator[tuple[type, list[Field[Any]]]]:
    """The fields that are typed, by the class that brought each in."""
    owners = options.__mro__
    of = {name: owner for owner in owners for name in inspect.get_annotations(owner)}
    typed = [each for each in fields(options) if "help" in each.metadata]
    for owner in owners:
        yield owner, [each for each in typed if of[each.name] is owner]


def _add(group: Any, each: Field[Any], hint: Any) -> None:
    how = {**_by_type(hint, each.default), **each.metadata["how"]}
    if each.default is not MISSING:
        how["default"] = each.default
    if each.metadata.get("positional"):
        action = group.add_argument(each.name, **how)
    else:
        required = {"required": True} if each.default is MISSING else {}
        action = group.add_argument(flag(each.name), **how, **required)
    # Set afterwards, for some versions of Python add words to a switch's help.
    action.help = _help(each)


def _by_type(hint: Any, default: Any) -> dict[str, Any]:
    """What argparse has to know of a field's type."""
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        if len(kinds) > 1:  # then `how` says how it is read
            return {}
        (hint,) = kinds
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction if default is True else "store_true"}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if issubclass(get_origin(hint) or hint, Mapping):  # then `how` says how it is read
        return {}
    if issubclass(get_origin(hint) or hint, Sequence) and hint is not str:
        return {"nargs": "+", "type": get_args(hint)[0]}
    return {"type": hint}


def _help(each: Field[Any]) -> str:
    """The help text, with the default where there is one to tell."""
    text: str = each.metadata["help"]
    told = each.default not in (MISSING, None, ()) and not isinstance(each.default, bool)
    default = " ".join(each.default) if isinstance(each.default, tuple) else each.default
    return (f"{text} (default: {default})" if told else text).replace("%", "%%")
