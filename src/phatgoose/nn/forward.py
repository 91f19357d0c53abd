"""What belongs to one forward of a routed model, so that forwards in several threads stay apart."""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn

from phatgoose.errors import RoutingError
from phatgoose.nn.choice import Choice
from phatgoose.nn.lock import PoolLock, frames_of
from phatgoose.nn.rows import Row
from phatgoose.types import TokenContext

if TYPE_CHECKING:
    from phatgoose.nn.trace import Trace

Stream = Literal["decoder", "encoder", "cross", "head"]


@dataclass(frozen=True, eq=False)
class Rules:
    """What the `restrict`, `assign` and `record` blocks around a forward ask of it."""

    allowed: frozenset[str] | None = None  # the experts it may use, by name; None: all
    rows: tuple[Choice, ...] | None = None  # what each row asks for itself
    trace: "Trace | None" = None

    @property
    def bare(self) -> bool:
        """Whether no expert is allowed."""
        return self.allowed is not None and not self.allowed

    def like(self, other: "Rules") -> bool:
        """Whether a forward under the other rules does the same, into the same trace."""
        mine, others = (self.allowed, self.rows), (other.allowed, other.rows)
        return mine == others and self.trace is other.trace


NO_RULES = Rules()
# By model; a thread, or a task of asyncio, has its own blocks.
_RULES: ContextVar[Mapping["Forwards", Rules] | None] = ContextVar("phatgoose_rules", default=None)


@dataclass(eq=False)
class Forward:
    """The state of one forward; or of layers that run outside one, until rules or pool change."""

    rules: Rules
    version: int = 0  # of the pool
    # Of the rules. A compiler looks at these alone: what else changes is no reason to look again.
    bare: bool = False
    trace: "Trace | None" = None
    rows: tuple[Row, ...] | None = None  # by the pool's indices, once they are asked for
    captured: bool = False  # into a CUDA graph
    contexts: dict[Stream, TokenContext] = field(default_factory=dict)
    unread: str = ""  # what of the arguments hides which tokens came before
    cache: Any = None  # the KV cache among the arguments
    cross_states: Tensor | None = None
    kept: int | None = None  # how many last tokens the output head sees, if not all
    priors: dict[Stream, Tensor | None] = field(default_factory=dict)
    shared: dict[int, Any] = field(default_factory=dict)  # inputs on their way through banks
    between: dict[str, Any] = field(default_factory=dict)  # inputs between a layer's two hooks

    number: int = field(default_factory=itertools.count().__next__)  # in the order they began

    def __post_init__(self) -> None:
        self.bare, self.trace = self.rules.bare, self.rules.trace

    def close(self) -> None:
        """Keep only what gradient checkpointing needs to run its layers again."""
        if self.rules.trace is not None:
            self.rules = replace(self.rules, trace=None)
        self.trace = None
        for kept in (self.contexts, self.priors, self.shared, self.between):
            kept.clear()
        self.cache = self.cross_states = None


class Forwards:
    """The forwards of one model that are under way, each in its thread."""

    def __init__(self, lock: PoolLock | None = None) -> None:
        self.lock = PoolLock() if lock is None else lock
        self.traced = Forward(NO_RULES)  # what a compiler sees; its rules are set by blocks
        self._mine = threading.local()
        self._learning: WeakSet[Forward] = WeakSet()  # whose gradients may still be wanted
        self._learning_mutex = threading.Lock()

    def rules(self) -> Rules:
        """What the blocks of this thread, or task, ask."""
        every = _RULES.get()
        return NO_RULES if every is None else every.get(self, NO_RULES)

    @contextmanager
    def ruled(self, rules: Rules) -> Iterator[None]:
        """Have this thread's, or task's, forwards inside the block follow `rules`."""
        before = _RULES.get()
        _RULES.set({**(before or {}), self: rules})
        try:
            yield
        finally:
            _RULES.set(before)

    def begin(self, module: nn.Module, frame: FrameType, *, part: bool) -> Forward:
        """`module` begins to run in `frame`; as a `part` it joins the forward under way, if any."""
        stack = self._stack()
        if stack:
            running = frames_of(frame)
            while stack and stack[-1].frame not in running:  # an interrupt ended them
                self.lock.leave(stack.pop().frame)
        self.lock.enter(frame)
        joins = part and stack
        forward = (
            stack[-1].forward if joins else Forward(self.rules(), self.lock.version, is_captured())
        )
        stack.append(_Entry(forward, module, frame))
        return forward

    def end(
        self,
        module: nn.Module,
        output: Any,
        leave: Callable[[Forward, Any], None] | None = None,
    ) -> None:
        """`module` gave `output`, or failed where that is None; `leave` is called first."""
        stack = self._stack()
        if not stack or stack[-1].module is not module:  # it had not begun
            return
        entry = stack.pop()
        if leave is not None:
            leave(entry.forward, output)
        if not any(other.forward is entry.forward for other in stack):
            entry.forward.close()
            if torch.is_grad_enabled():
                self._keep_with_graph(entry.forward, output)
        self.lock.leave(entry.frame)

    def now(self) -> Forward:
        """The innermost forward that this thread is in; what stands for one outside of any."""
        stack = self._stack()
        return stack[-1].forward if stack else self._loose()

    def check(self, forward: Forward) -> None:
        """Raise RoutingError where the pool changed under layers that run outside any forward."""
        if forward is self.traced:  # between two compiled parts of a forward; see check_own
            return
        if not self._stack() and (self.lock.is_taken() or forward.version != self.lock.version):
            raise RoutingError(CHANGED)

    def _stack(self) -> "list[_Entry]":
        try:
            stack: list[_Entry] = self._mine.stack
        except AttributeError:
            stack = self._mine.stack = []
        return stack

    def _loose(self) -> Forward:
        """What stands for a forward where layers run outside one."""
        if self.lock.is_taken():
            raise RoutingError(CHANGED)
        rules = self.rules() if torch._C._current_graph_task_id() == -1 else self._rules_again()
        found: Forward | None = getattr(self._mine, "loose", None)
        # Forwards whose blocks were alike have rules of their own each, and any may be given here.
        if found is None or not found.rules.like(rules) or found.version != self.lock.version:
            found = self._mine.loose = Forward(rules, self.lock.version)
        found.captured = is_captured()
        return found

    def _keep_with_graph(self, forward: Forward, output: Any) -> None:
        """Remember the forward for as long as its graph lives: a checkpoint may run it again."""
        values = output.values() if isinstance(output, Mapping) else (output,)
        for value in values:
            if isinstance(value, Tensor) and value.grad_fn is not None:
                value.grad_fn.metadata[Forward] = forward  # type: ignore[index]
                with self._learning_mutex:
                    self._learning.add(forward)
                return

    def _rules_again(self) -> Rules:
        """The rules of the forward that gradient checkpointing runs again, in a thread of its own.

        Which of several it is cannot be known, so they must all have been alike.
        """
        with self._learning_mutex:
            learning = list(self._learning)
        if not learning:
            return self.rules()
        kinds = {(each.rules.allowed, each.rules.rows, each.version) for each in learning}
        if len(kinds) > 1 or learning[0].version != self.lock.version:
            raise RoutingError(
                "gradient checkpointing runs a layer again, and the pool, or a restrict or assign "
                "block, is not what it was in that forward. Call backward before the pool or the "
                "block changes, and drop losses of earlier forwards; or switch it off: "
                "model.gradient_checkpointing_disable()."
            )
        return learning[0].rules


@dataclass(eq=False)
class _Entry:
    forward: Forward
    module: nn.Module
    frame: FrameType


CHANGED = (
    "the pool changes while a routed layer runs outside a forward of its model. Call the model "
    "itself, for which a change waits."
)


def is_captured() -> bool:
    """Whether a CUDA graph is being captured: what Python keeps of it would go stale."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
