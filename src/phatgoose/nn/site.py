"""One routed linear layer: the base's output plus the chosen experts' LoRA outputs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phatgoose.errors import RoutingError
from phatgoose.experts import Expert
from phatgoose.nn.bank import Bank
from phatgoose.nn.context import ContextKeeper, Stream
from phatgoose.nn.settings import RoutingSettings
from phatgoose.nn.trace import Trace
from phatgoose.ops import choose_experts, routed_lora
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
                "it; gradient checkpointing does not work with a prior."
            )
        if stream not in self._priors or self._priors[stream][0] is not context:
            self._priors[stream] = (context, self.router.prior(context, self.experts))
        return self._priors[stream][1]


class Site:
    """A forward hook on one linear layer. Adds to its output; changes no weight."""

    def __init__(self, name: str, layer: nn.Module, bank: Bank, state: RoutingState) -> None:
        self.name = name
        self.layer = layer
        self.bank = bank
        self.state = state
        self._handle = layer.register_forward_hook(self._hook)
        layer.add_module(BANK, bank)  # so that the bank follows model.to(...)

    def close(self) -> None:
        """Leave the layer as it was found."""
        self._handle.remove()
        del self.layer._modules[BANK]

    def _hook(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        slots = self._slots()
        if not slots and self.state.trace is None:
            return output
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        stream, context = self.state.keeper.find(self.name, inputs[0])
        routing = self._route(x, slots, stream, context)
        if self.state.trace is not None:
            members = torch.tensor([*self.bank.members, -1], device=x.device)
            chosen = Routing(members[routing.experts], routing.weights.detach())
            self.state.trace.add(self.name, stream, context, chosen)
        if not slots:
            return output
        delta = routed_lora(x, self.bank.a, self.bank.b, routing)
        return output + delta.view(output.shape).to(output.dtype)

    def _slots(self) -> Sequence[int]:
        """The slots this forward may use."""
        allowed = self.state.allowed
        if allowed is None:
            return range(len(self.bank))
        names = [self.state.experts[member].name for member in self.bank.members]
        return [slot for slot, name in enumerate(names) if name in allowed]

    def _route(
        self,
        x: Float[Tensor, "T I"],
        slots: Sequence[int],
        stream: Stream,
        context: TokenContext | None,
    ) -> Routing:
        bank, settings = self.bank, self.state.settings
        everyone = len(slots) == len(bank)
        signatures = bank.signatures[: len(bank)] if everyone else bank.signatures[list(slots)]
        with torch.autocast(x.device.type, enabled=False):
            scores = self.state.router.score(x, signatures)
            prior = self.state.prior(stream, context)
            if prior is not None:
                scores = scores + prior[:, [bank.members[slot] for slot in slots]]
            routing = choose_experts(
                scores,
                settings.top_k,
                temperature=settings.temperature,
                scale=settings.scale,
                null_score=settings.null_score,
            )
        if everyone:
            return routing
        back = torch.tensor([*slots, -1], device=x.device)
        return Routing(back[routing.experts], routing.weights)


BANK = "phatgoose_bank"  # the name of the bank among the layer's submodules
