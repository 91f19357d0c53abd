"""One routed linear layer: the base's output plus the chosen experts' LoRA outputs."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.hooks import RemovableHandle

from phatgoose.errors import RoutingError
from phatgoose.experts.delta import Call
from phatgoose.nn.bank import Bank
from phatgoose.nn.copying import refuse_copy
from phatgoose.nn.forward import CHANGED, Forward
from phatgoose.nn.rows import closed_to, owners_of, rows_of
from phatgoose.nn.state import RoutingState
from phatgoose.ops import Extras, Gates, Rows, choose_open, operators
from phatgoose.ops.side_stream import beside, fork, may_run_beside
from phatgoose.types import Routing, TokenContext


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

    Before the layer runs, its input is routed and projected down. After it, the result is added to
    the layer's output in place. While a CUDA graph is captured with few tokens, all of this is
    launched after the layer and runs beside it. The first layer of a bank routes for all layers
    that read the same input. Inside torch.compile, a write to the input between two of them goes
    unnoticed. If gradients are wanted, one differentiable operator after the layer does it all.
    """

    def __init__(
        self, name: str, layer: nn.Module, bank: Bank, part: int, state: RoutingState
    ) -> None:
        self.name = name
        self.layer = layer
        self.bank = bank
        self.part = part
        self.state = state
        self._shared = id(bank)  # its key in Forward.shared
        self._handles = self._hook()
        layer.add_module(BANK, bank)  # so that the bank follows model.to(...)
        bank.sites.add(part)

    def _hook(self) -> tuple[RemovableHandle, ...]:
        return (
            self.layer.register_forward_pre_hook(self._before),
            self.layer.register_forward_hook(self._after),
        )

    def close(self) -> None:
        """Leave the layer as it was found."""
        for handle in self._handles:
            handle.remove()
        del self.layer._modules[BANK]
        self.bank.sites.discard(self.part)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_copy(protocol)

    def _before(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        forward = self.state.forward()
        forward.between.pop(self.name, None)  # what a forward left that failed
        if forward.bare and forward.trace is None:  # no expert is used, and nobody watches
            return
        x, known = inputs[0], forward.shared.get(self._shared)
        if known is not None and self.part in known.waiting:
            known.waiting.discard(self.part)
            if not known.waiting:
                del forward.shared[self._shared]
            fits = known.matches(x) and (known.down is None or not self._learns(x))
            forward.between[self.name] = known if fits else self._route_alone(forward, x)
            return
        # The first of its bank. Writing to an inference tensor leaves no mark, so what was made of
        # one is not kept for the others.
        if not torch.compiler.is_compiling() and x.is_inference():
            forward.between[self.name] = self._route_alone(forward, x)
            return
        if may_run_beside(x):
            fork(x.device)
            forward.between[self.name] = x
            return
        forward.between[self.name] = self._route_all(forward, x)

    def _after(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        forward = self.state.forward()
        routed = forward.between.pop(self.name, None)
        if isinstance(routed, Tensor):
            with beside(routed.device):
                routed = self._route_all(forward, routed)
        if routed is None:
            if forward.bare and forward.trace is None:
                return output
            raise RoutingError(CHANGED)
        if not routed.matches(inputs[0]):  # another hook gave the layer another input
            routed = self._route_alone(forward, inputs[0])
        place = self.part - routed.first
        if forward.trace is not None:
            self._record(forward, inputs[0], routed, place)
        output = self._add(inputs[0], output, routed, place)
        if not torch.compiler.is_compiling():
            self.state.forwards.check(forward)
        return output

    def _add(self, x: Tensor, output: Tensor, routed: Routed, place: int) -> Tensor:
        """Add what the chosen experts make of x to the layer's output."""
        if self.bank.rests.any:
            mine = routed.experts[:, place], routed.weights[:, place]
            call = Call(self.layer, (x,), {})
            output = self.bank.rests.add(self.part, call, x, output, *mine)
        b = self.bank.b(self.part)
        if routed.down is None:
            flat = x.reshape(-1, x.shape[-1])
            mine = routed.experts[:, place], routed.weights[:, place]
            delta: Tensor = torch.ops.phatgoose.routed_lora(
                flat, self.bank.a[self.part], b, *mine, self.bank.backend
            )
            return output + delta.view(output.shape).to(output.dtype)
        if len(self.layer._forward_hooks) > 1 or _global_forward_hooks:  # who may have kept it
            output = output.clone()
        output = output.contiguous()
        flat = output.view(-1, output.shape[-1])
        z, *plan = routed.down
        operators.routed_up_(flat, b, z, routed.experts, *plan, place, self.bank.backend)
        return output

    def _route_alone(self, forward: Forward, x: Tensor) -> Routed:
        return self._route(forward, x, range(self.part, self.part + 1))

    def _route_all(self, forward: Forward, x: Tensor) -> Routed:
        """Route for all layers of the bank, of which this is the first."""
        routed = self._route(forward, x, range(self.bank.parts))
        routed.waiting = self.bank.sites - {self.part}
        if routed.waiting:
            forward.shared[self._shared] = routed
        else:
            forward.shared.pop(self._shared, None)
        return routed

    def _route(self, forward: Forward, x: Tensor, parts: range) -> Routed:
        """Choose experts for the tokens of x at these parts, and project x down where it can be."""
        bank, settings = self.bank, self.state.settings
        flat = x.reshape(-1, x.shape[-1])
        gates, a = bank.view(parts)
        slots = gates.open.shape[1]
        if not (torch.compiler.is_compiling() or forward.captured):
            opened = bank.opened(parts, slots, self.state.allowed(forward))
            gates = Gates(gates.signatures, gates.sums, opened)
        stream, context = self.state.keeper.find(self.name, x, forward)
        asked, rows, prior = self.state.rows(forward), None, None
        if asked is not None:
            owners = self._owners(x, len(asked), context)
            choosing = settings.choosing(slots)
            rows = rows_of(asked, owners, members=bank.members, slots=slots, choosing=choosing)
        fixed = asked is not None and all(row.mixture is not None for row in asked)
        if not fixed:
            prior = self.state.prior(forward, stream, context)
        learns = self._learns(x)
        with _without_autocast(x.device.type):
            if prior is not None:
                prior = self._of_slots(prior, slots)
            if rows is None and self.state.router.standardises and not learns:
                experts, weights, *down = operators.gated_down(
                    flat,
                    *gates,
                    a,
                    prior,
                    None,
                    bank.backend,
                    *settings.choosing(slots),
                )
                return Routed(x, parts, experts, weights, tuple(down))
            if rows is not None and fixed:
                routing = rows.mixtures(gates.open)
            else:
                if asked is not None:
                    closed = closed_to(asked, owners, members=bank.members, slots=slots)
                    prior = _sum(prior, closed)
                routing = self._choose(flat, parts, gates.open, prior, rows)
            experts, weights = routing.experts, routing.weights
            down = None
            if not learns:
                down = operators.routed_down(flat, a, experts, weights, bank.backend)
            return Routed(x, parts, experts, weights, down)

    def _owners(self, x: Tensor, given: int, context: TokenContext | None) -> Int[Tensor, " T"]:
        """Which of the block's `given` choices each token follows."""
        rows = x.shape[0] if x.dim() > 2 else 0
        rows = rows if context is None else context.batch
        if rows == 0 or rows % given:
            raise RoutingError(
                f"assign: {given} experts for {rows or 'an unknown number of'} sequences at "
                f"{self.name}. Name one for every row of the batch."
            )
        return owners_of(given, rows, x.shape[:-1].numel()).to(x.device)

    def _of_slots(self, prior: Float[Tensor, "T E"], slots: int) -> Float[Tensor, "T C"]:
        """The pool's prior for the experts in the bank's slots."""
        members = self.bank.members
        if members != list(range(prior.shape[1])):
            prior = prior[:, torch.tensor(members, dtype=torch.long, device=prior.device)]
        return nn.functional.pad(prior.float(), (0, slots - len(members)))

    def _choose(
        self,
        x: Float[Tensor, "T I"],
        parts: range,
        opened: Bool[Tensor, "S C"],
        prior: Tensor | None,
        rows: Rows | None,
    ) -> Routing:
        """Score by the router itself, part by part, then choose: [T, S, K]."""
        slots = opened.shape[1]
        choosing, routings = self.state.settings.choosing(slots), []
        for part, mine in zip(parts, opened, strict=True):
            scores = self.state.router.score(x, self.bank.signatures[part, :slots])
            routings.append(choose_open(scores, mine, choosing, Extras(prior), rows))
        return Routing(
            torch.stack([routing.experts for routing in routings], dim=1),
            torch.stack([routing.weights for routing in routings], dim=1),
        )

    def _learns(self, x: Tensor) -> bool:
        """Whether gradients are wanted of anything here."""
        if not torch.is_grad_enabled():
            return False
        bank = self.bank
        tensors = (x, bank.signatures, bank.a, bank.b(self.part))
        return any(v.requires_grad for v in (*tensors, *self.layer.parameters(recurse=False)))

    def _record(self, forward: Forward, x: Tensor, routed: Routed, place: int) -> None:
        trace, bank = forward.trace, self.bank
        assert trace is not None
        stream, context = self.state.keeper.find(self.name, x, forward)
        trace.check(self.name, len(routed.experts), context, forward.unread)
        assert context is not None
        places = trace.places([expert.name for expert in self.state.experts])
        members = [places[member] for member in bank.members]
        members += [-1] * (bank.capacity - len(members) + 1)
        chosen = torch.tensor(members, device=x.device)[routed.experts[:, place]]
        routing = Routing(chosen, routed.weights[:, place].detach())
        trace.add(self.name, stream, context, routing, forward.number)


@final
class WholeSite(Site):
    """A module that is not linear: a norm, an embedding, the batched experts of a mixture.

    No kernel computes what experts add here. It is routed after the module has run: by the
    module's input, or by its output where the input are ids.
    """

    def _hook(self) -> tuple[RemovableHandle, ...]:
        return (self.layer.register_forward_hook(self._after_all, with_kwargs=True),)

    def _after_all(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        forward = self.state.forward()
        if forward.bare and forward.trace is None:
            return output
        if isinstance(layer, nn.Embedding):
            x, call = output, Call(layer, args or tuple(kwargs.values()), {})
        else:
            x, call = args[0] if args else next(iter(kwargs.values())), Call(layer, args, kwargs)
        routed = self._route_alone(forward, x)
        if forward.trace is not None:
            self._record(forward, x, routed, 0)
        mine = routed.experts[:, 0], routed.weights[:, 0]
        output = self.bank.rests.add(self.part, call, x, output, *mine)
        if not torch.compiler.is_compiling():
            self.state.forwards.check(forward)
        return output


BANK = "phatgoose_bank"  # the name of the bank among the layer's submodules


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def _version(x: Tensor) -> int | None:
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version
