"""What all sites of one routed model share."""

import itertools
import threading
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.experts import Expert
from phatgoose.nn.context import ContextKeeper
from phatgoose.nn.forward import Forward, Forwards, Rules, Stream
from phatgoose.nn.rows import Row
from phatgoose.nn.settings import RoutingSettings
from phatgoose.routers import Router
from phatgoose.types import TokenContext


@dataclass(eq=False)
class RoutingState:
    """The router and the experts of a routed model, and the forwards under way."""

    router: Router
    settings: RoutingSettings
    keeper: ContextKeeper
    experts: list[Expert]  # the pool's, in its order
    compiled_by: set[int] = field(default_factory=set)  # threads that compiled or captured it
    _members: dict[frozenset[str], frozenset[int]] = field(default_factory=dict, repr=False)
    _number: int = field(default_factory=itertools.count().__next__)

    def __post_init__(self) -> None:
        _STATES[self._number] = self

    @property
    def forwards(self) -> Forwards:
        return self.keeper.forwards

    def forward(self) -> Forward:
        """The forward that the running layer belongs to."""
        if torch.compiler.is_compiling():
            _note_compiled(self._number)
            return self.keeper.forwards.traced
        forward = self.keeper.forwards.now()
        if forward.captured:
            self.compiled_by.add(threading.get_ident())
        return forward

    def prior(
        self, forward: Forward, stream: Stream, context: TokenContext | None
    ) -> Float[Tensor, "T E"] | None:
        """The router's prior for this forward, computed once for all sites of a stream."""
        if not self.router.has_prior:
            return None
        if context is None:
            unread = forward.unread
            raise RoutingError(
                f"the {type(self.router).__name__} has a prior, and a layer sees tokens that "
                f"cannot be matched with the model's input{unread and ': '}{unread}. Call the "
                "model itself, not a part of it; gradient checkpointing and torch.compile do not "
                "work with a prior."
            )
        if stream not in forward.priors:
            forward.priors[stream] = self.router.prior(context, self.experts)
        return forward.priors[stream]

    def allowed(self, forward: Forward) -> frozenset[int] | None:
        """The pool's indices of the experts that a forward may use; None: all."""
        names = forward.rules.allowed
        if names is None:
            return None
        found = self._members.get(names)
        if found is None:
            found = self._members[names] = self.indices(names)
        return found

    def indices(self, names: frozenset[str]) -> frozenset[int]:
        """The pool's indices of the experts of these names that are in it."""
        return frozenset(i for i, expert in enumerate(self.experts) if expert.name in names)

    def rows(self, forward: Forward) -> tuple[Row, ...] | None:
        """What each row asks for itself, by the pool's indices; None: all are routed alike."""
        if forward.rows is None and not torch.compiler.is_compiling():
            forward.rows = self.rows_by(forward.rules)
        return forward.rows

    def rows_by(self, rules: Rules) -> tuple[Row, ...] | None:
        if rules.rows is None:
            return None
        names = [expert.name for expert in self.experts]
        return tuple(Row.of(choice, names) for choice in rules.rows)

    def changed(self) -> None:
        """The pool's experts are other ones now."""
        self._members.clear()

    def check_own(self, what: str) -> None:
        """Raise RoutingError where another thread compiled the model or captured it in a graph.

        Compiled code runs without asking, so nothing can wait for it.
        """
        alive = {thread.ident for thread in threading.enumerate()}
        self.compiled_by &= alive  # type: ignore[arg-type]
        if self.compiled_by - {threading.get_ident()}:
            raise RoutingError(
                f"{what}: another thread compiled this model, or captured it in a CUDA graph, and "
                "compiled forwards cannot be waited for. Do it in that thread, or do not compile."
            )


_STATES: WeakValueDictionary[int, RoutingState] = WeakValueDictionary()


@torch.compiler.assume_constant_result
def _note_compiled(number: int) -> None:
    """Remember the thread that compiles; called while it does, not when what it made runs."""
    _STATES[number].compiled_by.add(threading.get_ident())
