"""Every error of ours, under one base class.

A message tells who, what was found, what was wanted and what to do, in one line. It may quote a
stranger's file, so it is made fit for a terminal and a log where it is read.
"""

from phatgoose.text import visible

LONGEST = 4000  # characters of a message; the way out is at its end


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line, to be quoted in one of ours."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class PhatgooseError(Exception):
    """Base class of all errors raised by phatgoose."""

    # Not in __init__: torch.compile gives an error's own words only where it can make the error.
    def __str__(self) -> str:
        return _shown(super().__str__())


def _shown(message: str) -> str:
    message = visible(message)
    if len(message) <= LONGEST:
        return message
    return f"{message[: LONGEST // 2]} [...] {message[-LONGEST // 3 :]}"


class ConfigError(PhatgooseError, ValueError):
    """A setting is outside what it may be."""


class ExpertFormatError(PhatgooseError):
    """A file of an expert is missing, unreadable, or not what the format says."""


class UnsupportedAdapterError(PhatgooseError):
    """The adapter uses a PEFT feature that would not be computed exactly."""


class IncompatibleExpertError(PhatgooseError):
    """An expert does not fit the base model, the pool, or its own gates."""


class ExpertNotFoundError(PhatgooseError):
    """No folder and no reachable Hub repository goes by this name."""


class BaseNotFoundError(ExpertNotFoundError):
    """There is no way to a base model from here."""


class MissingGateError(PhatgooseError):
    """The router needs a gate that the expert does not have."""


class UntrainedAdapterError(PhatgooseError):
    """The adapter's B matrices are all zero, so a gate would get no gradient."""


class TaskFormatError(PhatgooseError):
    """A task or data file is missing, unreadable, or has a bad line."""


class RoutingError(PhatgooseError):
    """The model cannot be routed as asked."""


class TrainingError(PhatgooseError):
    """Training cannot go on: no data left, or the loss is not finite."""
