"""One routed linear layer: the base's output plus the chosen experts' LoRA outputs."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from phatgoose.errors import RoutingError
from phatgoose.experts import Expert
from phatgoose.nn.bank import Bank
from phatgoose.nn.context import ContextKeeper, Stream
from phatgoose.nn.copying import refuse_copy
from phatgoose.nn.settings import RoutingSettings
from phatgoose.nn.trace import Trace
from phatgoose.ops import choose_experts, operators
from phatgoose.ops.side_stream import beside, fork, may_run_beside
from phatgoose.routers import Router
from phatgoose.types import Routing, TokenContext


@dataclass
class RoutingState:
    """What all sites of one routed model share."""

    router: Router
    settings: RoutingSettings
    keeper: ContextKeeper
    experts: list[Expert]  # the pool's, in its order
    allowed: frozenset[str] | None = None  # the experts a forward may use, by name; None: all
    bare: bool = False  # no expert is allowed
    trace: Trace | None = None
    assigned: tuple[int, ...] | None = None  # the one expert of each row (-1: none); see assign
    _priors: dict[Stream, tuple[TokenContext, Tensor | None]] = field(
        default_factory=dict, repr=False
    )

    def prior(self, stream: Stream, context: TokenContext | None) -> Float[Tensor, "T E"] | None:
        """The router's prior for this forward, computed once for all sites of a stream."""
        if not self.router.has_prior:
            return None
        if context is None:
            unread = self.keeper.unread
            raise RoutingError(
                f"the {type(self.router).__name__} has a prior, and a layer sees tokens that "
                f"cannot be matched with the model's input{unread and ': '}{unread}. Call the "
                "model itself, not a part of it; gradient checkpointing and torch.compile do not "
                "work with a prior."
            )
        if stream not in self._priors or self._priors[stream][0] is not context:
            self._priors[stream] = (context, self.router.prior(context, self.experts))
        return self._priors[stream][1]


class Routed:
    """One input on its way through the S layers of a bank."""

    def __init__(
        self,
        x: Tensor,
        parts: range,
        experts: Int[Tensor, "T S K"],
        weights: Float[Tensor, "T S K"],
        down: tuple[Tensor, ...] | None,
    ) -> None:
        self.x = x  # as the first of the layers was given it
        self.version = _version(x)
        self.first = parts.start
        self.waiting: set[int] = set()  # the other parts that are to be served
        self.experts = experts
        self.weights = weights
        self.down = down  # z, counts, members; None: gradients are wanted

    def matches(self, x: Tensor) -> bool:
        """Whether x is the very tensor that was routed, and has not been written to since."""
        return x is self.x and _version(x) == self.version


class Site:
    """Forward hooks on one linear layer, a part of a bank. Adds to its output; changes no weight.

    Before the layer runs, its input is routed and projected down; after it, what comes of that is
    added to the layer's output in place. On the way into a CUDA graph, with few tokens, all that is
    launched after the layer and runs beside it. The first layer of a bank does so for all that read
    the same input; inside torch.compile a write to the input between two of them goes unnoticed.
    Where gradients are wanted, one differentiable operator after the layer does it all.
    """

    def __init__(
        self, name: str, layer: nn.Module, bank: Bank, part: int, state: RoutingState
    ) -> None:
        self.name = name
        self.layer = layer
        self.bank = bank
        self.part = part
        self.state = state
        self._routed: Routed | None = None  # between the two hooks
        self._forked: Tensor | None = None  # likewise, an input that is routed beside the layer
        self._handles = (
            layer.register_forward_pre_hook(self._before),
            layer.register_forward_hook(self._after),
        )
        layer.add_module(BANK, bank)  # so that the bank follows model.to(...)
        bank.sites.add(part)

    def close(self) -> None:
        """Leave the layer as it was found."""
        for handle in self._handles:
            handle.remove()
        del self.layer._modules[BANK]
        self.bank.sites.discard(self.part)
        self.bank.routed = None

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_copy(protocol)

    def _before(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._routed = self._forked = None  # what a forward left that failed
        if self._is_base():
            return
        x, known = inputs[0], self.bank.routed
        expected = known is not None and self.part in known.waiting
        if expected:
            known.waiting.discard(self.part)
            if not known.waiting:
                self.bank.routed = None
            fits = known.matches(x) and (known.down is None or not self._learns(x))
            self._routed = known if fits else self._route_alone(x)
            return
        # The first of its bank. Writing to an inference tensor leaves no mark, so what was made of
        # one is not kept for the others.
        if not torch.compiler.is_compiling() and x.is_inference():
            self._routed = self._route_alone(x)
            return
        if may_run_beside(x):
            fork(x.device)
            self._forked = x
            return
        self._routed = self._route_all(x)

    def _after(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        routed, self._routed = self._routed, None
        forked, self._forked = self._forked, None
        if forked is not None:
            with beside(forked.device):
                routed = self._route_all(forked)
        if routed is None:
            return output
        if not routed.matches(inputs[0]):  # another hook gave the layer another input
            routed = self._route_alone(inputs[0])
        place = self.part - routed.first
        if self.state.trace is not None:
            self._record(inputs[0], routed, place)
        b = self.bank.b(self.part)
        if routed.down is None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            mine = routed.experts[:, place], routed.weights[:, place]
            delta = torch.ops.phatgoose.routed_lora(
                x, self.bank.a[self.part], b, *mine, self.bank.backend
            )
            return output + delta.view(output.shape).to(output.dtype)
        if len(self.layer._forward_hooks) > 1 or _global_forward_hooks:  # who may have kept it
            output = output.clone()
        output = output.contiguous()
        flat = output.view(-1, output.shape[-1])
        z, *plan = routed.down
        operators.routed_up_(flat, b, z, routed.experts, *plan, place, self.bank.backend)
        return output

    def _route_alone(self, x: Tensor) -> Routed:
        return self._route(x, range(self.part, self.part + 1))

    def _route_all(self, x: Tensor) -> Routed:
        """Route for all layers of the bank, of which this is the first."""
        routed = self._route(x, range(self.bank.parts))
        routed.waiting = self.bank.sites - {self.part}
        self.bank.routed = routed if routed.waiting else None
        return routed

    def _route(self, x: Tensor, parts: range) -> Routed:
        """Choose experts for the tokens of x at these parts, and project x down where it can be."""
        bank, settings = self.bank, self.state.settings
        flat = x.reshape(-1, x.shape[-1])
        gates, a = bank.view(parts)
        if self.state.assigned is not None:
            experts, weights = self._assigned(x, gates.open)
            if self._learns(x):
                return Routed(x, parts, experts, weights, None)
            with _without_autocast(x.device.type):
                down = operators.routed_down(flat, a, experts, weights, bank.backend)
            return Routed(x, parts, experts, weights, down)
        stream, context = self.state.keeper.find(self.name, x)
        slots = gates.open.shape[1]
        prior = self.state.prior(stream, context)
        learns = self._learns(x)
        with _without_autocast(x.device.type):
            if prior is not None:
                prior = self._of_slots(prior, slots)
            if self.state.router.standardises and not learns:
                experts, weights, *down = operators.gated_down(
                    flat,
                    *gates,
                    a,
                    settings.kept(slots),
                    settings.temperature,
                    settings.scale == "unit",
                    settings.null_score,
                    prior,
                    bank.backend,
                )
                return Routed(x, parts, experts, weights, tuple(down))
            routings = [self._choose(flat, part, slots, prior) for part in parts]
            experts = torch.stack([routing.experts for routing in routings], dim=1)
            weights = torch.stack([routing.weights for routing in routings], dim=1)
            down = None
            if not learns:
                down = operators.routed_down(flat, a, experts, weights, bank.backend)
            return Routed(x, parts, experts, weights, down)

    def _assigned(
        self, x: Tensor, opened: Bool[Tensor, "S C"]
    ) -> tuple[Int[Tensor, "T S 1"], Float[Tensor, "T S 1"]]:
        """Each row's own expert at weight 1, where it adapts the layer."""
        assert self.state.assigned is not None
        rows, given = x.shape[0] if x.dim() > 2 else 0, len(self.state.assigned)
        _, context = self.state.keeper.find(self.name, x)
        rows = rows if context is None else context.batch
        if rows == 0 or rows % given:
            raise RoutingError(
                f"assign: {given} experts for {rows or 'an unknown number of'} sequences at "
                f"{self.name}. Name one for every row of the batch."
            )
        places = {member: slot for slot, member in enumerate(self.bank.members)}
        slots = torch.tensor([places.get(member, -1) for member in self.state.assigned])
        slots = slots.repeat_interleave(rows // given)  # beams of a sequence follow one another
        slots = slots.repeat_interleave(x.shape[:-1].numel() // rows).to(x.device)
        present = opened[:, slots.clamp_min(0)].T & (slots >= 0).unsqueeze(1)  # [T S]
        experts = torch.where(present, slots.unsqueeze(1), -1).unsqueeze(-1)
        return experts, present.unsqueeze(-1).float()

    def _of_slots(self, prior: Float[Tensor, "T E"], slots: int) -> Float[Tensor, "T C"]:
        """The pool's prior for the experts in the bank's slots."""
        members = self.bank.members
        if members != list(range(prior.shape[1])):
            prior = prior[:, torch.tensor(members, dtype=torch.long, device=prior.device)]
        return nn.functional.pad(prior.float(), (0, slots - len(members)))

    def _choose(
        self, x: Float[Tensor, "T I"], part: int, slots: int, prior: Tensor | None
    ) -> Routing:
        """Score by the router itself, then choose."""
        bank, settings = self.bank, self.state.settings
        scores = self.state.router.score(x, bank.signatures[part, :slots])
        if prior is not None:
            scores = scores + prior
        return choose_experts(
            scores.masked_fill(~bank.open[part, :slots], -torch.inf),
            settings.kept(slots),
            temperature=settings.temperature,
            scale=settings.scale,
            null_score=settings.null_score,
        )

    def _is_base(self) -> bool:
        """Whether this forward uses no expert at all, and nobody watches."""
        return self.state.bare and self.state.trace is None

    def _learns(self, x: Tensor) -> bool:
        """Whether gradients are wanted of anything here."""
        if not torch.is_grad_enabled():
            return False
        bank = self.bank
        tensors = (x, bank.signatures, bank.a, bank.b(self.part))
        return any(v.requires_grad for v in (*tensors, *self.layer.parameters(recurse=False)))

    def _record(self, x: Tensor, routed: Routed, place: int) -> None:
        stream, context = self.state.keeper.find(self.name, x)
        members = [*self.bank.members, *[-1] * (self.bank.capacity - len(self.bank)), -1]
        chosen = torch.tensor(members, device=x.device)[routed.experts[:, place]]
        routing = Routing(chosen, routed.weights[:, place].detach())
        assert self.state.trace is not None
        self.state.trace.add(self.name, stream, context, routing, self.state.keeper.unread)


BANK = "phatgoose_bank"  # the name of the bank among the layer's submodules


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _version(x: Tensor) -> int | None:
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version
