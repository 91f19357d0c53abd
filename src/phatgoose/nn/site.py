"""One routed linear layer: the base's output plus the chosen experts' LoRA outputs."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from phatgoose.errors import RoutingError
from phatgoose.experts import Expert
from phatgoose.nn.bank import Bank
from phatgoose.nn.context import ContextKeeper, Stream
from phatgoose.nn.settings import RoutingSettings
from phatgoose.nn.trace import Trace
from phatgoose.ops import choose_experts
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
    _priors: dict[Stream, tuple[TokenContext, Tensor | None]] = field(
        default_factory=dict, repr=False
    )

    def prior(self, stream: Stream, context: TokenContext | None) -> Float[Tensor, "T E"] | None:
        """The router's prior for this forward, computed once for all sites of a stream."""
        if type(self.router).prior is Router.prior:
            return None
        if context is None:
            raise RoutingError(
                f"the {type(self.router).__name__} has a prior, and a layer sees tokens that "
                "cannot be matched with the model's input. Call the model itself, not a part of "
                "it; gradient checkpointing and torch.compile do not work with a prior."
            )
        if stream not in self._priors or self._priors[stream][0] is not context:
            self._priors[stream] = (context, self.router.prior(context, self.experts))
        return self._priors[stream][1]


@dataclass
class Routed:
    """One input on its way through the S layers of a bank."""

    x: Tensor  # as the first of the layers was given it
    version: int | None  # of x, which counts changes in place
    first: int  # the first of the parts routed here
    experts: Int[Tensor, "T S K"]
    weights: Float[Tensor, "T S K"]
    down: tuple[Tensor, Tensor, Tensor] | None  # z, counts, members; None: gradients are wanted
    waiting: set[int]  # parts that have not been served yet


class Site:
    """Forward hooks on one linear layer, a part of a bank. Adds to its output; changes no weight.

    Before the layer runs, its input is routed and projected down; after it, what comes of that is
    added to the layer's output in place. The first layer of a bank does so for all that read the
    same input. Where gradients are wanted, one differentiable operator after the layer does it all.
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
        self._handles = (
            layer.register_forward_pre_hook(self._before),
            layer.register_forward_hook(self._after),
        )
        layer.add_module(BANK, bank)  # so that the bank follows model.to(...)

    def close(self) -> None:
        """Leave the layer as it was found."""
        for handle in self._handles:
            handle.remove()
        del self.layer._modules[BANK]

    def _before(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._is_base():
            return
        x, known = inputs[0], self.bank.routed
        if known is None or self.part not in known.waiting or not _same(x, known):
            # Where the layers of a bank turn out not to share their input, each routes its own.
            shared = known is None or not known.waiting
            parts = range(self.bank.parts) if shared else range(self.part, self.part + 1)
            known = self._route(x, parts)
        known.waiting.discard(self.part)
        self.bank.routed = known if known.waiting else None
        self._routed = known

    def _after(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        routed, self._routed = self._routed, None
        if routed is None:
            return output
        place = self.part - routed.first
        routing = Routing(routed.experts[:, place], routed.weights[:, place])
        if self.state.trace is not None:
            self._record(inputs[0], routing)
        b = self.bank.b(self.part)
        if routed.down is None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            delta = torch.ops.phatgoose.routed_lora(
                x, self.bank.a[self.part], b, routing.experts, routing.weights, self.bank.backend
            )
            return output + delta.view(output.shape).to(output.dtype)
        if len(self.layer._forward_hooks) > 1:  # somebody else may have kept it as it is
            output = output.clone()
        output = output.contiguous()
        flat = output.view(-1, output.shape[-1])
        torch.ops.phatgoose.routed_up_(flat, b, *_args(routed), place, self.bank.backend)
        return output

    def _route(self, x: Tensor, parts: range) -> Routed:
        """Choose experts for the tokens of x at these parts, and project x down where it can be."""
        bank, settings = self.bank, self.state.settings
        flat = x.reshape(-1, x.shape[-1])
        stream, context = self.state.keeper.find(self.name, x)
        mine = slice(parts.start, parts.stop)
        # Sums of other widths may be rounded differently, and spare slots are slow on a CPU; but a
        # compiled model must not depend on how many experts there are, and kernels do not mind.
        spare = bank.backend == "triton" or torch.compiler.is_compiling()
        slots = bank.capacity if spare else len(bank)
        a, opened = bank.a[mine, :slots], bank.open[mine, :slots]
        prior = self.state.prior(stream, context)
        learns = torch.is_grad_enabled() and self._wants_gradients(x)
        known = {"x": x, "version": _version(x), "first": parts.start, "waiting": set(parts)}
        with torch.autocast(x.device.type, enabled=False):
            if self.state.router.standardises and prior is None and not learns:
                experts, weights, *down = torch.ops.phatgoose.gated_down(
                    *_gates(bank, flat, mine, slots),
                    opened,
                    a,
                    settings.top_k,
                    settings.temperature,
                    settings.scale == "unit",
                    settings.null_score,
                    bank.backend,
                )
                return Routed(**known, experts=experts, weights=weights, down=tuple(down))
            routings = [self._choose(flat, part, slots, prior) for part in parts]
            experts = torch.stack([routing.experts for routing in routings], dim=1)
            weights = torch.stack([routing.weights for routing in routings], dim=1)
            down = None
            if not learns:
                down = torch.ops.phatgoose.routed_down(flat, a, experts, weights, bank.backend)
            return Routed(**known, experts=experts, weights=weights, down=down)

    def _choose(
        self, x: Float[Tensor, "T I"], part: int, slots: int, prior: Tensor | None
    ) -> Routing:
        """Score by the router itself, then choose."""
        bank, settings = self.bank, self.state.settings
        scores = self.state.router.score(x, bank.signatures[part, :slots])
        if prior is not None:
            places = torch.tensor(bank.members, dtype=torch.long, device=prior.device)
            scores = scores + nn.functional.pad(prior[:, places], (0, slots - len(bank)))
        return choose_experts(
            scores.masked_fill(~bank.open[part, :slots], -torch.inf),
            settings.top_k,
            temperature=settings.temperature,
            scale=settings.scale,
            null_score=settings.null_score,
        )

    def _is_base(self) -> bool:
        """Whether this forward uses no expert at all, and nobody watches."""
        return self.state.bare and self.state.trace is None

    def _wants_gradients(self, x: Tensor) -> bool:
        bank = self.bank
        tensors = (x, bank.signatures, bank.a, bank.b(self.part))
        return any(v.requires_grad for v in (*tensors, *self.layer.parameters(recurse=False)))

    def _record(self, x: Tensor, routing: Routing) -> None:
        stream, context = self.state.keeper.find(self.name, x)
        members = [*self.bank.members, *[-1] * (self.bank.capacity - len(self.bank)), -1]
        chosen = torch.tensor(members, device=x.device)[routing.experts]
        assert self.state.trace is not None
        self.state.trace.add(self.name, stream, context, Routing(chosen, routing.weights.detach()))


BANK = "phatgoose_bank"  # the name of the bank among the layer's submodules


def _gates(
    bank: Bank, x: Float[Tensor, "T I"], parts: slice, slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x, signatures and their sums, as `gated_down` wants them."""
    if bank.pieces is bank.signatures:
        x = x.float() if bank.backend == "triton" else x
        return x, bank.signatures[parts, :slots].flatten(0, 1), bank.sums[parts, :slots]
    pieces = bank.pieces
    if parts != slice(0, bank.parts):
        pieces = bank.halves()[:, parts].flatten(0, 2)
    return x.to(pieces.dtype), pieces, bank.sums[parts]


def _args(routed: Routed) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert routed.down is not None
    z, counts, members = routed.down
    return z, routed.experts, counts, members


def _same(x: Tensor, routed: Routed) -> bool:
    """Whether x is the very tensor that was routed, and has not been written to since."""
    return x is routed.x and _version(x) == routed.version


def _version(x: Tensor) -> int | None:
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version
