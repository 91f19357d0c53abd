"""The routed sum y_t = sum_k w_tk * B_e A_e x_t, e = experts[t, k], with pairs sorted by expert."""

from collections.abc import Iterator
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from phatgoose.ops.backends.base import Backend, Down
from phatgoose.types import Routing

# Up to this many token-expert pairs, gathering each pair's factors is cheaper than sorting.
FEW_PAIRS = 64


@final
class SortedBackend(Backend):
    """Sorts the pairs by expert, so that each expert is one product, in plain torch."""

    def empty_down(self, x: Tensor, a: Tensor, chosen: int) -> Down:
        z = x.new_empty(x.shape[0], a.shape[0], chosen, a.shape[2], dtype=torch.float32)
        return Down(z, *_empty_plan(x, a, chosen))

    def routed_down(self, x: Tensor, a: Tensor, experts: Tensor, weights: Tensor) -> Down:
        tokens, parts, chosen = experts.shape
        z, plan = down_sorted(x, a, experts, weights)
        counts, members = _empty_plan(x, a, chosen)  # with few pairs nobody reads them
        for part, (order, sizes) in enumerate(plan):
            counts[part, : len(sizes)] = sizes
            members[part] = order
        return Down(z.view(tokens, parts, chosen, a.shape[2]), counts, members)

    def routed_up_(self, output: Tensor, b: Tensor, down: Down, experts: Tensor, part: int) -> None:
        tokens, parts, chosen = experts.shape
        rows = down.z.view(parts, tokens * chosen, down.z.shape[3])[part]
        few = tokens * chosen <= FEW_PAIRS
        order = None if few else (down.members[part], down.counts[part])
        up_sorted(output, b, rows, experts[:, part], order)


def _empty_plan(x: Tensor, a: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
    """Make room for the counts (no slot first, then each slot) and for the order of the pairs."""
    parts, slots = a.shape[:2]
    counts = x.new_zeros(parts, slots + 1, dtype=torch.int64)
    return counts, x.new_zeros(parts, x.shape[0] * chosen, dtype=torch.int64)


def sort_pairs(experts: Int[Tensor, "T K"]) -> tuple[Int[Tensor, " P"], Int[Tensor, " N"]]:
    """Order the T * K pairs by slot, and count those of slot -1, 0, 1, ..."""
    slots, order = experts.flatten().sort(stable=True)
    return order, torch.bincount(slots + 1)


def _segments(counts: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each slot that was chosen, and its place among the sorted pairs."""
    sizes = counts.tolist()
    start = sizes[0] if sizes else 0  # pairs without an expert come first
    for slot, size in enumerate(sizes[1:]):
        if size:
            yield slot, slice(start, start + size)
            start += size


def _batched(segments: Iterator[tuple[int, slice]], rows: int) -> Iterator[list[tuple[int, slice]]]:
    """Join neighbouring segments up to about `rows` rows, for few calls and little memory."""
    batch: list[tuple[int, slice]] = []
    for slot, here in segments:
        if batch and here.stop - batch[0][1].start > rows:
            yield batch
            batch = []
        batch.append((slot, here))
    if batch:
        yield batch


def down_sorted(
    x: Float[Tensor, "T I"],
    a: Float[Tensor, "S C R I"],
    experts: Int[Tensor, "T S K"],
    weights: Float[Tensor, "T S K"],
) -> tuple[Float[Tensor, "S P R"], list[tuple[Tensor, Tensor]]]:
    """Compute w A x of every pair of each part, in fp32, and the order of the pairs: P = T * K.

    Few pairs have no order. Otherwise a part's rows are in that order.
    """
    tokens, parts, chosen = experts.shape
    z = x.new_empty(parts, tokens * chosen, a.shape[2], dtype=torch.float32)
    plan = []
    for part in range(parts):
        mine, shares = experts[:, part], weights[:, part]
        if mine.numel() <= FEW_PAIRS:
            z[part] = _few_down(x, a[part], mine, shares).flatten(0, 1)
            continue
        order, counts = sort_pairs(mine)
        plan.append((order, counts))
        low = a.new_zeros(len(order), a.shape[2])
        for segments in _batched(_segments(counts), tokens):
            first, last = segments[0][1].start, segments[-1][1].stop
            pairs = x.index_select(0, order[first:last] // chosen).to(a.dtype)
            for slot, here in segments:
                there = slice(here.start - first, here.stop - first)
                torch.mm(pairs[there], a[part, slot].T, out=low[here])
        torch.mul(low, shares.flatten()[order].unsqueeze(-1), out=z[part])
    return z, plan


def up_sorted(
    output: Float[Tensor, "T O"],
    b: Float[Tensor, "C O R"],
    z: Float[Tensor, "P R"],
    experts: Int[Tensor, "T K"],
    order: tuple[Tensor, Tensor] | None,
) -> None:
    """Add the B z of one part's pairs, given as `down_sorted` left them, to `output` in place."""
    if order is None:
        delta = _few_up(z.view(*experts.shape, b.shape[2]), b, experts)
        output.add_(delta)
        return
    place, counts = order
    tokens, low = place // experts.shape[1], z.to(b.dtype)
    exact = output.dtype == b.dtype == torch.float32
    delta = output if exact else torch.zeros_like(output, dtype=torch.float32)
    for segments in _batched(_segments(counts), len(output)):
        first, last = segments[0][1].start, segments[-1][1].stop
        y = b.new_empty(last - first, b.shape[1])
        for slot, here in segments:
            there = slice(here.start - first, here.stop - first)
            torch.mm(low[here], b[slot].T, out=y[there])
        delta.index_add_(0, tokens[first:last], y.float())
    if not exact:
        output.add_(delta)


def _few_down(x: Tensor, a: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Compute w A x [T, K, R] in fp32, gathering the factors of each pair."""
    tokens, chosen = experts.shape
    shares = weights * (experts >= 0)
    pairs = x.to(a.dtype).repeat_interleave(chosen, dim=0)  # [T*K I]
    z = torch.bmm(a[experts.clamp_min(0).flatten()], pairs.unsqueeze(-1))  # [T*K R 1]
    return z.float().view(tokens, chosen, a.shape[1]) * shares.unsqueeze(-1)


def _few_up(z: Tensor, b: Tensor, experts: Tensor) -> Tensor:
    """Sum B z over k: [T, O] in fp32."""
    y = torch.bmm(b[experts.clamp_min(0).flatten()], z.to(b.dtype).flatten(0, 1).unsqueeze(-1))
    return y.view(*experts.shape, b.shape[1]).float().sum(1)


def lora_gradients(
    grad: Float[Tensor, "T O"],
    x: Float[Tensor, "T I"],
    a: Float[Tensor, "C R I"],
    b: Float[Tensor, "C O R"],
    routing: Routing,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of the routed sum in x, a, b and the weights, in fp32.

    With h = B.T grad and u = A x of a pair: dx += w A.T h, dA += w h x.T, dB += w grad u.T, and
    dw = h · u.
    """
    order, counts = sort_pairs(routing.experts)
    tokens = order // max(routing.experts.shape[1], 1)
    weights = routing.weights.flatten()[order].unsqueeze(-1)
    xs, slopes = x.index_select(0, tokens).float(), grad.index_select(0, tokens).float()
    dx, da, db = (torch.zeros_like(v, dtype=torch.float32) for v in (x, a, b))
    dw = torch.zeros(len(order), dtype=torch.float32, device=x.device)
    for slot, here in _segments(counts):
        down, up = a[slot].float(), b[slot].float()
        u, h = xs[here] @ down.T, slopes[here] @ up
        dw[order[here]] = (h * u).sum(-1)
        h = h * weights[here]
        da[slot] = h.T @ xs[here]
        db[slot] = slopes[here].T @ (u * weights[here])
        dx.index_add_(0, tokens[here], h @ down)
    return dx.to(x.dtype), da.to(a.dtype), db.to(b.dtype), dw.view_as(routing.weights)
