"""What each command can be asked: no more than dataclasses, so that help loads nothing heavy."""

from phatgoose.cli.arguments import (
    about,
    analysis,
    base,
    collection,
    evaluation,
    experts,
    inference,
    serving,
    training,
)
from phatgoose.cli.fields import Command

# In the order of `phatgoose --help`.
COMMANDS: tuple[Command, ...] = (
    *inference.COMMANDS,
    *evaluation.COMMANDS,
    *analysis.COMMANDS,
    *training.COMMANDS,
    *experts.COMMANDS,
    *collection.COMMANDS,
    *base.COMMANDS,
    *serving.COMMANDS,
    *about.COMMANDS,
)
NOUNS = {
    "base": "Fetch the default base model.",
    "experts": "List, verify, train, gate, derive, merge, convert, import, push or pull experts.",
}
