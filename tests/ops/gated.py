"""Random calls of the routed layer's operators, and a float64 loop over tokens to check them by."""

import math
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from phatgoose.ops import BACKENDS, Choosing, operators, pieces_of
from tests.tolerances import TOLERANCE, assert_near

# Error of a score, next to the sizes of the terms it sums. In bf16 a signature's pieces keep 16
# bits of it; everything else is summed in fp32.
SCORE = {torch.bfloat16: 2.0**-16, torch.float16: 1e-6, torch.float32: 1e-6, torch.float64: 1e-6}


@dataclass(frozen=True)
class Problem:
    """What layers that read one input are given, and the outputs they start from."""

    x: Tensor  # [T I]
    signatures: Tensor  # [S C I]
    open_slots: Tensor  # [S C]
    a: Tensor  # [S C R I]
    bs: list[Tensor]  # S times [C O R]
    bases: list[Tensor]  # S times [T O]
    experts: Tensor  # [T S K], a routing chosen elsewhere
    weights: Tensor
    top_k: int
    temperature: float
    unit: bool
    null_score: float | None
    prior: Tensor | None  # [T C]

    def settings(self) -> tuple[int, float, bool, float | None, Tensor | None]:
        return Choosing(self.top_k, self.temperature, self.unit, self.null_score)


@st.composite
def problems(draw, tokens, dtypes, most=6, mixed=True):
    """Odd sizes, spare and closed slots, one popular expert, means far from 0, strided tensors."""
    tokens, parts = draw(tokens), draw(st.integers(1, 3))
    slots, spare = draw(st.integers(1, most)), draw(st.integers(0, most // 2))
    rank, width = draw(st.integers(1, 9)), draw(st.integers(1, 19))
    outs = draw(st.lists(st.integers(1, 17), min_size=parts, max_size=parts))
    dtype = draw(st.sampled_from(dtypes))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*size):
        return torch.randn(size, generator=random)

    signatures = draw(st.sampled_from([0.1, 1.0, 5.0])) * normal(parts, slots, width)
    x = normal(tokens, width)
    if draw(st.booleans()):
        x += 3 * torch.nn.functional.normalize(signatures[0, 0], dim=0) * math.sqrt(width)
    x += draw(st.sampled_from([0.0, 0.0, 3.0, 100.0]))
    a, bs = normal(parts, slots, rank, width), [normal(slots, size, rank) for size in outs]
    closed = torch.rand(parts, slots, generator=random) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    top_k = draw(st.integers(1, slots + spare + 2))
    routing = torch.randint(-1, slots, (tokens, parts, top_k), generator=random)
    if draw(st.booleans()):
        routing[:, :, 0] = slots - 1
    lays = spread if draw(st.booleans()) else torch.Tensor.contiguous
    activations = draw(st.sampled_from([dtype, torch.float32])) if mixed else dtype
    return Problem(
        x=lays(x.to(activations)),
        signatures=padded(signatures, 1, spare),
        open_slots=padded(~closed, 1, spare),
        a=padded(a, 1, spare).to(dtype),
        bs=[padded(b, 0, spare).to(dtype) for b in bs],
        bases=[lays(normal(tokens, size).to(activations)) for size in outs],
        experts=routing,
        weights=torch.rand(routing.shape, generator=random),
        top_k=top_k,
        temperature=draw(st.sampled_from([0.3, 1.0, 7.0])),
        unit=draw(st.booleans()),
        null_score=draw(st.sampled_from([None, None, -0.4, 0.0, 30.0])),
        prior=padded(2 * normal(tokens, slots), 1, spare) if draw(st.booleans()) else None,
    )


def padded(v, dim, spare):
    """With zeros in so many spare slots behind."""
    shape = [spare if d == dim else size for d, size in enumerate(v.shape)]
    return torch.cat([v, v.new_zeros(shape)], dim=dim)


def spread(v):
    """The same numbers in every second column of a wider tensor."""
    wide = v.new_full((len(v), 2 * v.shape[1]), torch.nan)
    wide[:, ::2] = v
    return wide[:, ::2]


def gates_for(problem, backend):
    """Signatures and sums, as `phatgoose::gated_down` wants them from a bank."""
    signatures, dtype = problem.signatures, problem.a.dtype
    sums = signatures.sum(-1)
    if not BACKENDS[backend].halves_gates(dtype):
        return signatures.flatten(0, 1), sums
    pieces = pieces_of(signatures, dtype).flatten(0, 2)
    rows = -(-len(pieces) // 64) * 64
    return padded(pieces, 0, rows - len(pieces)), sums


def check_gated(problem, backend):
    """Choice, weights and outputs of a routed layer that scores by gate."""
    x, (signatures, sums) = problem.x, gates_for(problem, backend)
    parts, slots = problem.open_slots.shape
    # Room for more tokens and slots than there are; columns of a wider table.
    tally = torch.ones(len(x) + 2, slots + 5, device=x.device)[:, : slots + 3]
    experts, weights, *down = operators.gated_down(
        x,
        signatures,
        sums,
        problem.open_slots,
        problem.a,
        problem.prior,
        tally,
        backend,
        *problem.settings(),
    )
    counted = torch.ones_like(tally)
    counted[: len(x)].scatter_add_(1, (experts + 1).flatten(1), weights.flatten(1))
    assert_near(tally, counted, TOLERANCE[torch.float32].output)
    if BACKENDS[backend].halves_gates(problem.a.dtype):  # then x is rounded too
        problem = replace(problem, x=x.to(problem.a.dtype))
    chosen = min(problem.top_k, slots + (problem.null_score is not None))
    assert experts.shape == weights.shape == (len(x), parts, chosen)
    assert (experts.dtype, weights.dtype) == (torch.int64, torch.float32)
    wanted, slack = check_choice(problem, experts)
    # A weight is as wrong as the difference of two scores, over the temperature.
    bound = TOLERANCE[torch.float32].output + 2 * slack / problem.temperature
    assert_near(weights, wanted, bound)
    check_outputs(replace(problem, experts=experts, weights=wanted), down, backend, bound)


def check_given(problem, backend):
    """Outputs of a routed layer whose routing was chosen elsewhere."""
    down = torch.ops.phatgoose.routed_down(
        problem.x, problem.a, problem.experts, problem.weights, backend
    )
    check_outputs(problem, down, backend, 0.0)


def check_outputs(problem, down, backend, slack):
    z, *plan = down
    for part, (b, base) in enumerate(zip(problem.bs, problem.bases, strict=True)):
        output = spread(base) if not base.is_contiguous() else base.clone()
        torch.ops.phatgoose.routed_up_(output, b, z, problem.experts, *plan, part, backend)
        assert output.dtype == base.dtype
        worst = max(output.dtype, b.dtype, key=lambda dtype: TOLERANCE[dtype].output)
        bound = TOLERANCE[worst].output + slack
        assert_near(output, add_up(problem, part), bound, add_up(problem, part, size=True))
    # All parts at once, into columns of a wider tensor.
    widths = [base.shape[1] for base in problem.bases]
    wide = torch.full((len(problem.x), 1 + sum(widths) + 2), torch.nan, device=problem.x.device)
    wide = wide.to(problem.bases[0].dtype)
    mine = wide[:, 1 : 1 + sum(widths)]
    mine.copy_(torch.cat(problem.bases, dim=1))
    operators.routed_up_all_(mine, problem.bs, z, problem.experts, *plan, backend)
    for part, found in enumerate(mine.split(widths, dim=1)):
        assert_near(found, add_up(problem, part), bound, add_up(problem, part, size=True))
    assert wide[:, 0].isnan().all() and wide[:, -2:].isnan().all()


def check_choice(problem, experts):
    """Every token's choice is the best K, or as good as them; their weights, and the slack.

    The slack is the largest error that a score may have.
    """
    parts, slots = problem.open_slots.shape
    table, sizes = score(problem)
    weights = torch.zeros(experts.shape, dtype=torch.float64)
    slack = 0.0
    for t in range(len(problem.x)):
        for part in range(parts):
            candidates = {
                slot: table[t, part, slot].item()
                for slot in range(slots)
                if problem.open_slots[part, slot]
            }
            error = SCORE[problem.a.dtype] * max(
                [1.0, *(sizes[t, part, slot].item() for slot in candidates)]
            )
            slack = max(slack, error)
            if problem.null_score is not None:
                candidates[slots] = problem.null_score
            ranked = sorted(candidates, key=lambda slot: (-candidates[slot], slot))
            best = ranked[: experts.shape[2]]
            found = experts[t, part].tolist()
            empty = len(found) - len(best)
            assert found[len(best) :] == [-1] * empty, (found, best)
            found = [slots if slot < 0 else slot for slot in found[: len(best)]]
            assert set(found) <= set(ranked), (found, ranked)
            assert len(set(found)) == len(found)
            values = [candidates[slot] for slot in found]
            for mine, other in zip(values, (candidates[slot] for slot in best), strict=True):
                assert abs(mine - other) <= 2 * error, (found, best)
            gaps = [candidates[p] - candidates[q] for p, q in zip(ranked, ranked[1:], strict=False)]
            if all(gap > 2 * error for gap in gaps[: len(best)]):
                assert found == best
            if problem.unit:
                shares = [1.0] * len(values)
            else:
                top = max(values, default=0.0)
                shares = [math.exp((value - top) / problem.temperature) for value in values]
                shares = [share / sum(shares) for share in shares]
            weights[t, part, : len(shares)] = torch.tensor(shares, dtype=torch.float64)
    return weights, slack


def check_far_from_zero(tokens, backend):
    """The variance of x is not taken as the difference of two large numbers."""
    random = torch.Generator().manual_seed(0)
    x = 100 + torch.randn(tokens, 37, generator=random)
    signatures = torch.randn(2, 3, 37, generator=random)
    gates = signatures.flatten(0, 1), signatures.sum(-1)
    opened, a = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, 1, 37)
    experts, weights, *_ = torch.ops.phatgoose.gated_down(
        x, *gates, opened, a, None, None, backend, 3, 1.0, False, None
    )
    centred = x.double() - x.double().mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True) + 1e-5
    units = centred / variance.sqrt() / math.sqrt(37)
    scores = torch.einsum("ti,sci->tsc", units, signatures.double())
    assert torch.equal(experts, scores.argsort(-1, descending=True))
    assert_near(weights, scores.softmax(-1).gather(-1, experts), 2e-5)


def score(problem):
    """The scores [T S C] in float64, and the sizes of the terms that each sums."""
    x, signatures = problem.x.double(), problem.signatures.double()
    mean = x.mean(-1, keepdim=True)
    spread = torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5)
    root = math.sqrt(x.shape[1])
    scores = torch.einsum("ti,sci->tsc", (x - mean) / spread, signatures) / root
    sizes = torch.einsum("ti,sci->tsc", (x.abs() + mean.abs()) / spread, signatures.abs()) / root
    if problem.prior is not None:
        prior = problem.prior.double().unsqueeze(1)
        scores, sizes = scores + prior, sizes + prior.abs()
    return scores, sizes


def add_up(problem, part, size=False):
    """base + sum_k w B A x in float64, one token at a time; with `size`, of absolute values."""
    sign = torch.abs if size else torch.clone
    x, a, b, base = (
        sign(v.double())
        for v in (problem.x, problem.a[part], problem.bs[part], problem.bases[part])
    )
    rows = []
    for u, y, experts, weights in zip(
        x, base, problem.experts[:, part].tolist(), problem.weights[:, part], strict=True
    ):
        for expert, weight in zip(experts, weights.double(), strict=True):
            if expert >= 0:
                y = y + weight * (b[expert] @ (a[expert] @ u))
        rows.append(y)
    return torch.stack(rows) if rows else base
