"""The record of what was routed where."""

import threading
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.nn.forward import Stream
from phatgoose.types import Routing, TokenContext


@dataclass(frozen=True)
class TokenTable:
    """The real tokens of one stream, in the order they were seen; N in all."""

    ids: Int[Tensor, " N"]  # -1 where only embeddings were given
    sequence: Int[Tensor, " N"]  # row of the batch (with beams: of the beams)
    position: Int[Tensor, " N"]  # among the real tokens of its sequence, from 0


@dataclass
class Trace:
    """Experts and weights of every real token at every site, while recording.

    `experts[module]` is int64 [N, top_k], indices into `names`, -1 where a module has fewer
    candidates (weight 0) or the token took no expert (weight above 0). `weights[module]` is fp32
    [N, top_k]. Row n is the token in row n of `tokens[streams[module]]`.
    """

    names: list[str]
    top_k: int
    experts: dict[str, Int[Tensor, "N K"]] = field(default_factory=dict)
    weights: dict[str, Float[Tensor, "N K"]] = field(default_factory=dict)
    streams: dict[str, Stream] = field(default_factory=dict)
    tokens: dict[Stream, TokenTable] = field(default_factory=dict)
    _seen: dict[str, list[tuple[int, TokenContext, Routing]]] = field(
        default_factory=lambda: defaultdict(list), repr=False
    )
    _naming: Any = field(default_factory=threading.Lock, repr=False)

    def check(self, module: str, tokens: int, context: TokenContext | None, unread: str) -> None:
        """Raise RoutingError without a context, and say what was `unread` if that is known."""
        if context is None:
            raise RoutingError(
                f"{module}: sees {tokens} tokens that cannot be matched with the "
                f"model's input{unread and ': '}{unread}. So it cannot be recorded. Call the model "
                "itself, not a part of it, and neither compiled nor captured in a CUDA graph."
            )

    def add(
        self, module: str, stream: Stream, context: TokenContext, routing: Routing, forward: int
    ) -> None:
        """Take in one call of one site, in a forward of this number; `routing` is of `names`."""
        if self.streams.setdefault(module, stream) != stream:
            raise RoutingError(
                f"{module}: sees all tokens in one forward, and only the last ones in another, so "
                "they cannot be recorded together. Record them in blocks of their own."
            )
        self._seen[module].append((forward, context, routing))

    def places(self, names: list[str]) -> list[int]:
        """Where these experts are among `names`; one that joined the pool meanwhile comes last."""
        with self._naming:
            self.names += [name for name in names if name not in self.names]
            index = {name: place for place, name in enumerate(self.names)}
        return [index[name] for name in names]

    def close(self) -> None:
        """Put the calls together, without padding."""
        every = [routing for calls in self._seen.values() for _, _, routing in calls]
        self.top_k = max([self.top_k, *(routing.experts.shape[1] for routing in every)])
        for module, calls in self._seen.items():
            # Threads that share a trace took turns in another order at each module.
            calls.sort(key=lambda call: call[0])
            pairs = [(context.new_real().flatten(), routing) for _, context, routing in calls]
            self.experts[module] = torch.cat([self._wide(r.experts, -1)[k] for k, r in pairs]).cpu()
            self.weights[module] = torch.cat([self._wide(r.weights, 0)[k] for k, r in pairs]).cpu()
            stream = self.streams[module]
            if stream not in self.tokens:
                self.tokens[stream] = _table([context for _, context, _ in calls])
        self._seen.clear()

    def shares(
        self, module: str | None = None, *, sequence: int | None = None
    ) -> Float[Tensor, " E"]:
        """Mean weight of each expert over tokens and sites; of one site or sequence if named."""
        total, count = torch.zeros(len(self.names)), 0
        for name in self.experts if module is None else (module,):
            experts, weights = self.experts[name], self.weights[name]
            if sequence is not None:
                mine = self.tokens[self.streams[name]].sequence == sequence
                experts, weights = experts[mine], weights[mine]
            used = experts >= 0
            total.index_add_(0, experts[used], weights[used])
            count += experts.shape[0]
        return total / max(count, 1)

    def _wide(self, values: Tensor, fill: int) -> Tensor:
        """Pad [N, K] to [N, top_k]."""
        missing = self.top_k - values.shape[1]
        return torch.nn.functional.pad(values, (0, missing), value=fill)


def _table(contexts: list[TokenContext]) -> TokenTable:
    ids, sequence, position = [], [], []
    for context in contexts:
        keep = context.new_real()
        positions = context.positions()
        new_ids = context.new_ids()
        rows = torch.arange(context.batch, device=keep.device).unsqueeze(1).expand_as(positions)
        ids.append((torch.full_like(positions, -1) if new_ids is None else new_ids)[keep])
        sequence.append(rows[keep])
        position.append(positions[keep])
    return TokenTable(torch.cat(ids).cpu(), torch.cat(sequence).cpu(), torch.cat(position).cpu())
