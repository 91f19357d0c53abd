"""Puts a trace into numbers."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.nn import Stream, TokenTable, Trace


def summarise(trace: Trace) -> dict[str, Any]:
    """Say what was used where, ready for JSON.

    A share is a part of the routing weight, 0 to 1; with softmax weights an expert's share is its
    mean weight over all tokens and sites. `no_expert` is the part tokens gave to no expert.

    Returns:
        top_k: experts a token may use at each site.
        shares, no_expert: over everything; shares is by expert, the largest first.
        entropy: of those shares, in bits; 0 where one expert takes all.
        largest_weight: a token's largest weight at a site over the sum of its weights there, mean.
        experts_per_token: different experts a token used over all its sites, mean.
        layers: for each layer its name ("3", "encoder 3", "lm_head"), modules (how many sites),
            shares, no_expert and entropy.
        tokens: for each real token its stream, sequence, position, id, expert (the one with most
            weight over all sites; None for no expert), share (of that one), and experts (how many
            different ones it used).

    Raises RoutingError where the trace is empty, or a site saw other tokens than its neighbours.
    """
    by_layer = layer_weights(trace)
    largest = [
        w.max(1).values / w.sum(1).clamp_min(1e-12) for w in trace.weights.values() if len(w)
    ]
    tokens = [row for stream in trace.tokens for row in _tokens(trace, stream)]
    return {
        "top_k": trace.top_k,
        **_shares(trace, torch.stack(list(by_layer.values())).sum(0)),
        "largest_weight": float(torch.cat(largest).mean()) if largest else 0.0,
        "experts_per_token": sum(token["experts"] for token in tokens) / max(len(tokens), 1),
        "layers": [
            {"name": name, "modules": len(modules), **_shares(trace, by_layer[name])}
            for name, modules in layers(trace).items()
        ],
        "tokens": tokens,
    }


def layers(trace: Trace) -> dict[str, list[str]]:
    """Return each layer's recorded modules, in the order of the model: encoder, decoder, the rest.

    A layer goes by the first number in its modules' names; a module without one by its own name.
    """
    found: dict[tuple[int, int, str], list[str]] = {}
    for module in trace.experts:
        found.setdefault(layer_of(module), []).append(module)
    return {name: found[stack, depth, name] for stack, depth, name in sorted(found)}


def layer_of(module: str) -> tuple[int, int, str]:
    """Return a module's stack (0; 1: a decoder beside an encoder; 2: neither), depth and layer."""
    parts = module.split(".")
    depth = next((int(part) for part in parts if part.isdecimal()), None)
    if depth is None:
        return 2, 0, module
    stack = next((part for part in ("encoder", "decoder") if part in parts), "")
    return int(stack == "decoder"), depth, f"{stack} {depth}".strip()


def layer_weights(trace: Trace) -> dict[str, Float[Tensor, " E+1"]]:
    """Sum the weight of each expert in each layer, over all tokens. The last went to no expert."""
    if not trace.experts:
        raise RoutingError(
            "the trace is empty: no routed layer ran while it was recorded. Call the model inside "
            "`with phatgoose.record(model) as trace:`, and read the trace after the block."
        )
    return {
        name: torch.stack([_spread(trace, module).sum(0) for module in modules]).sum(0)
        for name, modules in layers(trace).items()
    }


def token_weights(
    trace: Trace, stream: Stream, modules: list[str] | None = None
) -> Float[Tensor, "N E+1"]:
    """Sum what each token of a stream gave each expert, over these modules; the last to none."""
    count = trace.tokens[stream].ids.shape[0]
    total = torch.zeros(count, len(trace.names) + 1, dtype=torch.float64)
    for module in trace.experts if modules is None else modules:
        if trace.streams[module] != stream:
            continue
        if trace.experts[module].shape[0] != count:
            raise RoutingError(
                f"{module}: saw {trace.experts[module].shape[0]} tokens, other layers {count}. "
                "Record separately the forwards that do not run the same layers."
            )
        total += _spread(trace, module)
    return total


def sequence_numbers(table: TokenTable) -> list[int]:
    """Number the sequence of each token, as they first appear.

    A row of the batch whose positions start over, in a later forward, is a sequence of its own.
    """
    last: dict[int, tuple[int, int]] = {}
    numbers: list[int] = []
    count = 0
    for row, position in zip(table.sequence.tolist(), table.position.tolist(), strict=True):
        number, before = last.get(row, (-1, position))
        if position <= before:
            number, count = count, count + 1
        last[row] = (number, position)
        numbers.append(number)
    return numbers


def shares(weights: Float[Tensor, "*B E"]) -> Float[Tensor, "*B E"]:
    """Give each row's weights as parts of their sum; 0 where nothing was given."""
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)


def entropy(distribution: Float[Tensor, "*B E"]) -> Float[Tensor, "*B"]:
    """Compute -Σ p log2 p of each row, in bits."""
    nats: Tensor = torch.special.entr(distribution).sum(-1).abs()
    return nats / math.log(2)


def _spread(trace: Trace, module: str) -> Float[Tensor, "N E+1"]:
    """Spread the weights of one site over a column for every expert, and one for none."""
    experts, weights = trace.experts[module], trace.weights[module].double()
    slots = torch.where(experts < 0, len(trace.names), experts)
    spread = torch.zeros(experts.shape[0], len(trace.names) + 1, dtype=torch.float64)
    return spread.scatter_add_(1, slots, weights)


def _shares(trace: Trace, weights: Float[Tensor, " E+1"]) -> dict[str, Any]:
    part = shares(weights)
    order = part[:-1].argsort(descending=True, stable=True).tolist()
    return {
        "shares": {trace.names[i]: float(part[i]) for i in order},
        "no_expert": float(part[-1]),
        "entropy": float(entropy(part)),
    }


def _tokens(trace: Trace, stream: Stream) -> list[dict[str, Any]]:
    table, weights = trace.tokens[stream], token_weights(trace, stream)
    top = shares(weights).max(1)
    names = [*trace.names, None]
    columns = {
        "sequence": sequence_numbers(table),
        "position": table.position.tolist(),
        "id": table.ids.tolist(),
        "expert": [names[i] for i in top.indices.tolist()],
        "share": top.values.tolist(),
        "experts": (weights[:, :-1] > 0).sum(1).tolist(),
    }
    rows = zip(*columns.values(), strict=True)
    return [{"stream": stream, **dict(zip(columns, row, strict=True))} for row in rows]
