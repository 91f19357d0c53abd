r"""Which of a config's patterns fits a module's name, in bounded time.

PEFT matches a pattern by `re`, as (.*\.)?(PATTERN)$, and the first that fits wins. `re` goes back
and tries again, for years where a stranger's pattern wants that: (?:[a-z.]+)+! does. So patterns
are compiled here, all of a config together, to one automaton that never goes back. It reads a name
from its end, where PEFT anchors patterns, and remembers where each character led, so that names
that end alike cost little more than one.

Understood, with PEFT's meaning: characters, escaped ones, ".", classes ([0-9], \d, \w, \s),
groups, "|", repeats (* + ? {2,5}, lazy ones too), "^" where an alternative begins and "$" where
one ends. Look-around, references, flags and possessive repeats are refused, and so are patterns
that would need more than `MOST_STATES` or `MOST_WORK`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

MOST_STATES = 250_000  # about the characters of all patterns together
MOST_WORK = 4_000_000  # states looked at while reading names; some seconds
DEEPEST = 32  # groups within groups
_BRACES = re.compile(r"\{(\d{1,4})?(?:(,)(\d{1,4})?)?\}")
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}

Test = Callable[[str], bool]  # of one character


class PatternError(ValueError):
    """A pattern that is not understood, or patterns that need too much; says which and why."""


@dataclass(frozen=True)
class _Repeat:
    of: "_Node"
    least: int
    most: int | None


_Node = Test | list["list[_Node]"] | _Repeat  # a character, alternatives, or a repeat


@dataclass
class _State:
    """Where the automaton may be after some characters, counted from a name's end."""

    moves: tuple[int, ...]  # nodes that wait for a character
    free: int | None  # the first pattern that is complete here
    anchored: int | None  # the same, of those that must begin where the name begins
    next: dict[str, "_State"] = field(default_factory=dict)


class Patterns:
    """The patterns of a config. Raises PatternError where one is not understood."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._tests: list[Test | None] = []  # None: goes on to all targets, for nothing
        self._targets: list[list[int]] = []
        self._complete: dict[int, tuple[int, bool]] = {}  # node: pattern, whether it is anchored
        self._states: dict[frozenset[int], _State] = {}
        self._work = 0
        starts = [n for i, text in enumerate(patterns) for n in self._compile(i, text)]
        self._start = self._state(starts)

    def first(self, name: str) -> int | None:
        """The number of the first pattern that fits `name`, or None.

        Raises PatternError where that would take too long.
        """
        found: list[int] = []
        state = self._start
        for place in range(len(name), -1, -1):
            if state.free is not None and (place == 0 or name[place - 1] == "."):
                found.append(state.free)
            if place == 0:
                found += [] if state.anchored is None else [state.anchored]
            elif not state.moves:
                break
            else:
                c = name[place - 1]
                state = state.next.get(c) or self._step(state, c)
        return min(found, default=None)

    def _step(self, state: _State, c: str) -> _State:
        self._work += len(state.moves)
        if self._work > MOST_WORK:
            raise PatternError("the patterns take too long to match. Write names in full")
        reached = [n for n in state.moves if self._tests[n](c)]  # type: ignore[misc]
        state.next[c] = after = self._state(t for n in reached for t in self._targets[n])
        return after

    def _state(self, nodes: Iterable[int]) -> _State:
        """The state of being at all these nodes, and where they lead for nothing."""
        seen: set[int] = set()
        todo = list(nodes)
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += self._targets[node] if self._tests[node] is None else []
        self._work += len(seen)
        kept = frozenset(n for n in seen if self._tests[n] or n in self._complete)
        if kept not in self._states:
            done = [self._complete[n] for n in kept if n in self._complete]
            self._states[kept] = _State(
                tuple(n for n in kept if self._tests[n]),
                min((i for i, anchored in done if not anchored), default=None),
                min((i for i, anchored in done if anchored), default=None),
            )
        return self._states[kept]

    def _compile(self, number: int, text: str) -> list[int]:
        """The nodes that a pattern is entered by, at a name's end."""
        starts = []
        for anchored, sequence in _Parser(text).pattern():
            end = self._node(None)
            self._complete[end] = (number, anchored)
            starts.append(self._sequence(sequence, end))
        return starts

    def _sequence(self, nodes: "Sequence[_Node]", then: int) -> int:
        for node in nodes:  # the last one compiled is read first
            then = self._one(node, then)
        return then

    def _one(self, node: "_Node", then: int) -> int:
        if isinstance(node, list):
            return self._node(None, *(self._sequence(branch, then) for branch in node))
        if not isinstance(node, _Repeat):
            return self._node(node, then)
        out = then
        if node.most is None:
            out = self._node(None, then)
            self._targets[out].append(self._one(node.of, out))
        for _ in range((node.most or node.least) - node.least):
            out = self._node(None, self._one(node.of, out), then)
        for _ in range(node.least):
            out = self._one(node.of, out)
        return out

    def _node(self, test: Test | None, *targets: int) -> int:
        if len(self._tests) >= MOST_STATES:
            raise PatternError("the patterns are too long together. Write names in full")
        self._tests.append(test)
        self._targets.append(list(targets))
        return len(self._tests) - 1


class _Parser:
    """One pattern; `at` is the character that comes next."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    def pattern(self) -> "list[tuple[bool, list[_Node]]]":
        """The alternatives: whether each begins with "^", and what it is made of."""
        found = []
        while True:
            anchored = self._take("^")
            sequence = self._sequence()
            self._take("$")
            found.append((anchored, sequence))
            if self._at == len(self._text):
                return found
            if not self._take("|"):
                raise self._not_understood()

    def _sequence(self) -> "list[_Node]":
        nodes: list[_Node] = []
        while self._at < len(self._text) and self._peek() not in "|)$":
            nodes.append(self._repeated(self._atom()))
        return nodes

    def _atom(self) -> "_Node":
        c = self._next()
        if c == "(":
            return self._group()
        if c == "[":
            return self._class()
        if c == "\\":
            return self._escaped()
        if c == ".":
            return lambda c: c != "\n"
        if c in "*+?{^":
            raise self._not_understood()
        return c.__eq__

    def _group(self) -> "_Node":
        if self._take("?") and not self._take(":"):
            raise self._not_understood()
        self._depth += 1
        if self._depth > DEEPEST:
            raise self._not_understood()
        branches = [self._sequence()]
        while self._take("|"):
            branches.append(self._sequence())
        if not self._take(")"):
            raise self._not_understood()
        self._depth -= 1
        return branches

    def _escaped(self) -> Test:
        c = self._next()
        if c.lower() in _CLASSES:
            test = _CLASSES[c.lower()]
            return test if c.islower() else lambda c: not test(c)
        if c.isalnum():
            raise self._not_understood()
        return c.__eq__

    def _class(self) -> Test:
        negated = self._take("^")
        tests: list[Test] = []
        while not tests or self._peek() != "]":
            c = self._next()
            test = self._escaped() if c == "\\" else c.__eq__
            if self._peek() == "-" and self._peek(1) != "]":
                self._at += 1
                if c == "\\" or self._peek() in "\\[" or c > self._peek():
                    raise self._not_understood()
                test = _between(c, self._next())
            tests.append(test)
        self._at += 1
        return lambda c: any(test(c) for test in tests) is not negated

    def _repeated(self, node: "_Node") -> "_Node":
        c = self._peek()
        braces = _BRACES.match(self._text, self._at)
        if c and c in "*+?":
            self._at += 1
            node = _Repeat(node, int(c == "+"), 1 if c == "?" else None)
        elif c == "{" and braces and braces[0] != "{}":
            self._at = braces.end()
            least = int(braces[1] or 0)
            most = (int(braces[3]) if braces[3] else None) if braces[2] else least
            if most is not None and most < least:
                raise self._not_understood()
            node = _Repeat(node, least, most)
        else:
            return node
        self._take("?")  # a lazy one fits the same names
        if self._peek() and self._peek() in "*+?{":
            raise self._not_understood()
        return node

    def _peek(self, ahead: int = 0) -> str:
        """The character there, or nothing at the end."""
        return self._text[self._at + ahead : self._at + ahead + 1]

    def _next(self) -> str:
        if self._at == len(self._text):
            raise self._not_understood()
        self._at += 1
        return self._text[self._at - 1]

    def _take(self, c: str) -> bool:
        taken = self._peek() == c
        self._at += taken
        return taken

    def _not_understood(self) -> PatternError:
        return PatternError(
            f"the pattern {self._text[:200]!r} has something at character {self._at} that is not "
            "matched here (look-around, references and flags are not). Write names in full"
        )


def _between(low: str, high: str) -> Test:
    return lambda c: low <= c <= high
