"""Conversations: turns and the answer to them, as the tokenizer's chat template writes them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phatgoose.errors import ConfigError, first_line
from phatgoose.reading import parse_json
from phatgoose.tasks.example import Example

Message = Mapping[str, Any]
ASSISTANT = "assistant"
ASKING = ("user", "tool")  # whose turns an assistant answers
ROLES = {"human": "user", "gpt": ASSISTANT}  # ShareGPT's, by the names that templates know
SHOWN = 40  # characters of a conversation in an error


@dataclass(frozen=True)
class Conversation(Example):
    """An example whose prompt is all turns before an assistant's, which is its target.

    `prompt` holds the turns' plain texts, for what compares prompts; a model reads what the
    tokenizer's chat template makes of `turns`.
    """

    turns: tuple[Message, ...] = ()
    answer: Message | None = None  # None in a prompt without a reference
    tools: tuple[Any, ...] = ()
    settings: Mapping[str, Any] | None = None  # of the template, like enable_thinking

    def asked(self, tokenizer: Any) -> str:
        """What a model is to go on from. Raises as `texts`."""
        return self._written(tokenizer, self.turns, add_generation_prompt=True)

    def texts(self, tokenizer: Any, answer: str | None = None) -> tuple[str, str]:
        """What is read before the answer, and the answer with all that ends it.

        Some templates begin an answer that is asked for as they do not begin a given one, with an
        empty thought for example. The answer then starts where the two part.

        Raises ConfigError where there is no template, it refuses the conversation, or it does not
        write the turns before the answer as it does without the answer.
        """
        last = {"role": ASSISTANT, "content": answer} if answer is not None else self.answer
        asked = self.asked(tokenizer)
        before = self._written(tokenizer, self.turns, add_generation_prompt=False)
        whole = self._written(tokenizer, (*self.turns, last or {}), add_generation_prompt=False)
        start = _alike(asked, whole)
        if start < _alike(asked, before):
            raise ConfigError(
                f"{self._who()}: the chat template writes the turns before an answer in another "
                "way once the answer is there, so that the two cannot be told apart. Give the "
                "texts themselves, as prompt and completion."
            )
        return asked[:start], whole[start:]

    def _written(self, tokenizer: Any, turns: Sequence[Message], **how: Any) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"{self._who()}: is a conversation, and the tokenizer of "
                f"{getattr(tokenizer, 'name_or_path', '') or 'the base'} has no chat template. "
                "Give it one, or give the texts themselves, as prompt and completion."
            )
        try:
            text: str = tokenizer.apply_chat_template(
                [dict(turn) for turn in turns],
                tools=list(self.tools) or None,
                tokenize=False,
                **how,
                **(self.settings or {}),
            )
        except Exception as error:  # templates raise what they like
            raise ConfigError(
                f"{self._who()}: the chat template refuses the conversation "
                f"({first_line(error)}). Correct its turns, or give the texts themselves, as "
                "prompt and completion."
            ) from error
        return text

    def _who(self) -> str:
        return repr(self.prompt[:SHOWN])


def _alike(one: str, other: str) -> int:
    """With how many characters both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def one_turn(prompt: str, target: str = "", choices: tuple[str, ...] | None = None) -> Conversation:
    """A prompt as a user's only turn, and its answer as the assistant's."""
    answer = {"role": ASSISTANT, "content": target}
    return Conversation(
        prompt, target, choices, turns=({"role": "user", "content": prompt},), answer=answer
    )


def conversations(
    messages: Any,
    *,
    begun: int = 0,
    tools: Any = None,
    settings: Any = None,
) -> Iterator[Conversation]:
    """An example for each answer among messages, from number `begun` on.

    An answer is an assistant's turn after a user's or a tool's; other turns of the assistant, and
    those of weight 0, are only read.

    Raises ValueError, which says what is wrong, for all that is no conversation.
    """
    turns = list(_turns(messages))
    if not isinstance(settings, dict | None):
        raise ValueError("has chat_template_kwargs that are no object")
    common = Conversation("", "", tools=_tools(tools), settings=settings)
    for place, turn in enumerate(turns):
        asked = place > 0 and turns[place - 1]["role"] in ASKING
        given = messages[place].get("weight")
        if place < begun or turn["role"] != ASSISTANT or not asked or given == 0:
            continue
        texts = [each["content"] for each in turns[:place]]
        yield replace(
            common,
            prompt="\n".join(filter(None, texts)),
            target=turn["content"],
            turns=tuple(turns[:place]),
            answer=turn,
        )


def _turns(messages: Any) -> Iterator[Message]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"is {'an empty' if messages == [] else 'no'} list of messages")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise ValueError(f"has a {type(message).__name__} as message {number}, not an object")
        turn = {key: value for key, value in message.items() if value is not None}
        if "role" not in turn:  # ShareGPT's
            turn = {"role": turn.pop("from", None), "content": turn.pop("value", None), **turn}
        if not isinstance(turn["role"], str):
            raise ValueError(f"has no role in message {number}")
        turn["role"] = ROLES.get(turn["role"], turn["role"])
        calls = turn.get("tool_calls", [])
        if not isinstance(calls, list):
            raise ValueError(f"has tool_calls in message {number} that are no list")
        if turn.get("content") is None and not calls:
            raise ValueError(f"has no content in message {number}, of role {turn['role']}")
        if calls:
            turn["tool_calls"] = [_call(call, number) for call in calls]
        turn["content"] = _text(turn.get("content"), number)
        turn.pop("weight", None)
        yield turn


def _text(content: Any, number: int) -> str:
    """A message's text; that of several parts is one after the other."""
    if content is None:
        return ""  # templates add it to other texts
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"has a {type(content).__name__} as the content of message {number}")
    parts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"has a part of type {kind} in message {number}; only text is read")
        parts.append(text)
    return "".join(parts)


def _call(call: Any, number: int) -> dict[str, Any]:
    """A tool call, its arguments as an object: OpenAI has them as JSON, templates write it."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"has a tool call without a function's name in message {number}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except ValueError as error:
            raise ValueError(
                f"has a tool call in message {number} whose arguments are not JSON ({error})"
            ) from None
        function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _tools(tools: Any) -> tuple[Any, ...]:
    """Schemas of tools; data sets often hold them as JSON, for their types differ."""
    if isinstance(tools, str) and tools:
        try:
            tools = parse_json(tools)
        except ValueError as error:
            raise ValueError(f"has tools that are not JSON ({error})") from None
    if tools and not isinstance(tools, list):
        raise ValueError(f"has a {type(tools).__name__} as tools, a list is wanted")
    return tuple(tools or ())
