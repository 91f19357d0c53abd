"""Tasks as files of examples, rows as examples, and examples as token ids."""

from phatgoose.tasks.chat import Conversation, one_turn
from phatgoose.tasks.example import Example
from phatgoose.tasks.files import (
    LONGEST_LINE,
    MOST_BLANK,
    load_examples,
    read_examples,
    split_file,
    task_folders,
)
from phatgoose.tasks.rows import SEPARATOR, parse_row
from phatgoose.tasks.tokens import (
    IGNORED,
    Encoded,
    batches,
    collate,
    encode,
    encode_example,
    encode_prompt,
    within,
)

__all__ = [
    "IGNORED",
    "LONGEST_LINE",
    "MOST_BLANK",
    "SEPARATOR",
    "Conversation",
    "Encoded",
    "Example",
    "batches",
    "collate",
    "encode",
    "encode_example",
    "encode_prompt",
    "load_examples",
    "one_turn",
    "parse_row",
    "read_examples",
    "split_file",
    "task_folders",
    "within",
]
