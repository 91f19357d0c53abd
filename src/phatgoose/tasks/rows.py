"""Rows of files and data sets as examples, in the forms in which people have them.

- `{"inputs": "...", "targets": "..."}`, a prompt and its answer, with `"choices": [...]` where the
  answer is one of a few; the two are joined by a newline;
- `{"prompt": "...", "completion": "..."}`, joined as they are, or both as lists of messages;
- `{"messages": [{"role": "...", "content": "..."}, ...]}`, or ShareGPT's `conversations` with
  `from` and `value`: an example for each answer of the assistant;
- `{"instruction": "...", "input": "...", "output": "..."}`, Alpaca's, in its published prompt;
- `{"text": "..."}`, learnt as a whole.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

from phatgoose.errors import TaskFormatError
from phatgoose.tasks.chat import Conversation, conversations, one_turn
from phatgoose.tasks.example import Example

SEPARATOR = "\n"  # between `inputs` and `targets`
CHATS = ("messages", "conversations")
# Which fields a row has to have, by form; the first form of which it has all counts.
FORMS = (
    ("inputs", "targets"),
    ("prompt", "completion"),
    *((name,) for name in CHATS),
    ("instruction", "output"),
    ("text",),
)
WANTED = (
    "inputs and targets, or prompt and completion, or messages, or instruction and output, or text"
)
# github.com/tatsu-lab/stanford_alpaca, as the `text` of its data set has it.
ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
PAIRED = ", paired with an input that provides further context"


def parse_row(row: Any, where: str, *, chat: bool = False) -> list[Example]:
    """The examples of one row; `where` names it in a TaskFormatError.

    There is one, or one for each answer in a conversation. `chat` makes a user's turn of a prompt
    that is a text, and the assistant's of its answer.
    """
    if not isinstance(row, dict):
        raise TaskFormatError(f"{where}: holds {type(row).__name__}, a JSON object is wanted.")
    for form in FORMS:
        values = [row.get(name) for name in form]
        # A data set of mixed rows has every field in each of them, empty where it is not used.
        if not all(name in row for name in form) or values.count(None) == len(values):
            continue
        if form[0] in CHATS or (form[0] == "prompt" and any(isinstance(v, list) for v in values)):
            return _conversations(row, form, where)
        _want_text(row, where, *form)
        return [_texts(row, form, where, chat=chat)]
    raise TaskFormatError(
        f"{where}: has the fields {', '.join(sorted(map(str, row))) or '(none)'}; wanted {WANTED}."
    )


def _texts(row: dict[str, Any], form: tuple[str, ...], where: str, *, chat: bool) -> Example:
    if form == ("text",):
        if chat:
            raise TaskFormatError(
                f"{where}: is a text without a prompt, which makes no turns of a chat. Leave out "
                "--chat, or give prompt and completion."
            )
        return Example("", row["text"])
    prompt, target = (row[name] for name in form)
    choices = _choices(row, target, where, form[1])
    if form[0] == "instruction":
        prompt = _alpaca(row, where, chat=chat)
    if chat:
        return one_turn(prompt, target, choices)
    return Example(prompt + SEPARATOR * (form[0] == "inputs"), target, choices)


def _alpaca(row: dict[str, Any], where: str, *, chat: bool) -> str:
    instruction, given = row["instruction"], row.get("input") or ""
    if not isinstance(given, str):
        raise TaskFormatError(f"{where}: input is a {type(given).__name__}, text is wanted.")
    if chat:
        return f"{instruction}\n{given}" if given else instruction
    return ALPACA.format(
        instruction=instruction,
        paired=PAIRED if given else "",
        input=f"### Input:\n{given}\n\n" if given else "",
    )


def _conversations(row: dict[str, Any], form: tuple[str, ...], where: str) -> list[Example]:
    parts = [row[name] for name in form]
    if not all(isinstance(part, list) for part in parts):
        kinds = " and ".join(f"{n} is a {type(row[n]).__name__}" for n in form)
        wanted = "a list of messages is wanted" if len(form) == 1 else "texts or lists are wanted"
        raise TaskFormatError(f"{where}: {kinds}; {wanted}.")
    settings = row.get("chat_template_kwargs")
    begun = len(parts[0]) if len(parts) > 1 else 0
    try:
        found = list(
            conversations(
                list(chain(*parts)), begun=begun, tools=row.get("tools"), settings=settings
            )
        )
    except ValueError as error:
        raise TaskFormatError(f"{where}: {form[-1]} {error}.") from None
    if not found:
        raise TaskFormatError(
            f"{where}: {form[-1]} holds no assistant's turn after a user's, so there is no answer "
            "to learn. Add it, or remove the row."
        )
    return list(_chosen(found, row, where, form[-1]))


def _chosen(
    found: list[Conversation], row: dict[str, Any], where: str, name: str
) -> Iterator[Example]:
    """With the row's choices, which are those of its only answer."""
    if row.get("choices") is not None and len(found) > 1:
        raise TaskFormatError(
            f"{where}: has choices, and {len(found)} answers in {name}; with choices there may be "
            "one. Give the answer to choose a row of its own."
        )
    for each in found:
        yield replace(each, choices=_choices(row, each.target, where, "the answer"))


def _want_text(row: dict[str, Any], where: str, *fields: str) -> None:
    for field in fields:
        if not isinstance(row[field], str):
            kind = type(row[field]).__name__
            raise TaskFormatError(f"{where}: {field} is a {kind}, text is wanted.")


def _choices(row: dict[str, Any], target: str, where: str, name: str) -> tuple[str, ...] | None:
    choices = row.get("choices")
    if choices is None:
        return None
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise TaskFormatError(f"{where}: choices is not a list of texts.")
    if target not in choices:
        raise TaskFormatError(f"{where}: {name} is {target!r}, which is not in choices.")
    return tuple(choices)
