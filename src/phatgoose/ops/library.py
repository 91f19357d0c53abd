"""The routed layer as operators that torch.compile and CUDA graphs take whole.

A layer's LoRA runs in two halves, so that its own product can come between them: down (choose
experts, w A x) needs only the input, up adds B z to the output in place. What passes between them
(`z`, `counts`, `members`) is the backend's own affair, but for its shapes, which are linear in the
number of tokens, so that a compiled graph can be for any number of them. These halves are for
inference; where gradients are wanted, `phatgoose::routed_lora` is one differentiable operator.

Letters: T tokens, S layers that share the input, C slots, K chosen, R rank, I and O features.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from phatgoose.ops.backend import Backend, choose_backend
from phatgoose.ops.choose import choose_experts
from phatgoose.ops.lora import FEW_PAIRS, down_sorted, lora_gradients, up_sorted
from phatgoose.types import Routing

EPS = 1e-5  # of standardising, as in the authors' layer norms

_library = torch.library.Library("phatgoose", "DEF")


def gate_scores(x: Tensor, signatures: Tensor) -> Tensor:
    """s · standardised x / sqrt(I) of tokens [T, I] and signatures [E, I]: fp32 [T, E].

    Standardising takes the population variance and eps 1e-5. arXiv:2402.05859, section 3.2.
    """
    return _standardised(x) @ signatures.T


def _standardised(x: Tensor) -> Tensor:
    """x with zero mean and unit variance, over sqrt(I): scaled here, a [T, E] tensor is spared."""
    width = x.shape[-1]
    return F.layer_norm(x.float(), (width,), eps=EPS) / math.sqrt(width)


# ---------------------------------------------------------------- choose and project down


def _gated_down(
    x: Tensor,
    signatures: Tensor,
    sums: Tensor,
    open_slots: Tensor,
    a: Tensor,
    top_k: int,
    temperature: float,
    unit: bool,
    null_score: float | None,
    prior: Tensor | None,
    backend: str,
    tally: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Score by gate, choose, and project down.

    x [T, I]; signatures [M, I] fp32, M = S * C (for "triton", where x is in half precision: their
    pieces, M >= 2 * S * C, see `pieces_of`); sums fp32 [S, C], of each signature; open_slots bool
    [S, C]; a [S, C, R, I]; prior fp32 [T, C], added to the scores of every part; tally fp32
    [T, >= 1 + C], to which the weights are added, the first column for "no expert".
    Returns experts int64 [T, S, K], weights fp32 [T, S, K], z, counts, members.
    """
    if backend == "triton":
        from phatgoose.ops import launch

        return launch.gated_down(
            x,
            signatures,
            sums,
            open_slots,
            a,
            top_k=top_k,
            temperature=temperature,
            unit=unit,
            null_score=null_score,
            prior=prior,
            eps=EPS,
            tally=tally,
        )
    parts, slots = open_slots.shape
    u = _standardised(x)
    gates = signatures.view(parts, slots, x.shape[1])

    # Part by part: one part's scores at a time in memory, and of a width of their own, which
    # decides their last bits.
    def scores(part: int) -> Tensor:
        found = u @ gates[part].T
        found = found if prior is None else found.add_(prior)
        return found.masked_fill_(~open_slots[part], -torch.inf)

    routings = [
        choose_experts(
            scores(part),
            top_k,
            temperature=temperature,
            scale="unit" if unit else "softmax",
            null_score=null_score,
        )
        for part in range(parts)
    ]
    experts = torch.stack([routing.experts for routing in routings], dim=1)
    weights = torch.stack([routing.weights for routing in routings], dim=1)
    if tally is not None:
        add_to_tally(tally, experts, weights)
    return experts, weights, *_routed_down(x, a, experts, weights, backend)


def add_to_tally(tally: Tensor, experts: Tensor, weights: Tensor) -> None:
    """Add weights [T, S, K] to the columns 1 + experts of tally [T, >= 1 + C]."""
    tally.scatter_add_(1, (experts + 1).flatten(1), weights.flatten(1))


def _routed_down(
    x: Tensor, a: Tensor, experts: Tensor, weights: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Project down with experts [T, S, K] and weights that were chosen elsewhere."""
    if backend == "triton":
        from phatgoose.ops import launch

        return launch.routed_down(x, a, experts, weights)
    tokens, parts, chosen = experts.shape
    if backend == "reference":
        every = torch.arange(parts, device=a.device).view(1, -1, 1)
        rows = a[every, experts.clamp_min(0)].float()
        z = torch.einsum("tskri,ti,tsk->tskr", rows, x.float(), weights * (experts >= 0))
        return z, *_no_plan(x)
    z, plan = down_sorted(x, a, experts, weights)
    counts, members = _sorted_plan(x, a, chosen)  # with few pairs nobody reads them
    for part, (order, sizes) in enumerate(plan):
        counts[part, : len(sizes)] = sizes
        members[part] = order
    return z.view(tokens, parts, chosen, a.shape[2]), counts, members


def _routed_up(
    output: Tensor,
    b: Tensor,
    z: Tensor,
    experts: Tensor,
    counts: Tensor,
    members: Tensor,
    part: int,
    backend: str,
) -> None:
    """Add to output [T, O] what part's chosen experts make of z; b is [C, O, R], scaled.

    The rows of output may lie apart, so that it can be some columns of a tensor.
    """
    if not output.is_contiguous() and output.shape[1] > 1 and output.stride(1) != 1:
        whole = output.contiguous()
        _routed_up(whole, b, z, experts, counts, members, part, backend)
        output.copy_(whole)
    elif backend == "triton":
        from phatgoose.ops import launch

        launch.routed_up(output, b, z, experts, counts, members, part)
    elif backend == "reference":
        mine = b[experts[:, part].clamp_min(0)].float()
        output.add_(torch.einsum("tkor,tkr->to", mine, z[:, part]).to(output.dtype))
    else:
        tokens, parts, chosen = experts.shape
        rows = z.view(parts, tokens * chosen, z.shape[3])[part]
        order = (members[part], counts[part]) if tokens * chosen > FEW_PAIRS else None
        up_sorted(output, b, rows, experts[:, part], order)


def routed_up_side_by_side(
    output: Tensor,
    b: Sequence[Tensor],
    z: Tensor,
    experts: Tensor,
    counts: Tensor,
    members: Tensor,
    backend: str,
) -> None:
    """`routed_up_` for all parts, whose outputs are the columns of `output` one after the other."""
    if backend == "triton" and len(b) <= 3:
        from phatgoose.ops import launch

        if len(output) <= launch.FEW_TOKENS:
            launch.few_routed_up(output, b, z, experts, 0)
            return
    first = 0
    for part, up in enumerate(b):
        mine = output[:, first : first + up.shape[1]]
        _routed_up(mine, up, z, experts, counts, members, part, backend)
        first += up.shape[1]


def _no_plan(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(0, dtype=torch.int32), x.new_empty(0, 0, dtype=torch.int32)


def _sorted_plan(x: Tensor, a: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
    """Of the backend "torch": counts of no slot and of each, and the order of the pairs."""
    parts, slots = a.shape[:2]
    counts = x.new_zeros(parts, slots + 1, dtype=torch.int64)
    return counts, x.new_zeros(parts, x.shape[0] * chosen, dtype=torch.int64)


# ---------------------------------------------------------------- one differentiable operator


def _routed_lora(
    x: Tensor, a: Tensor, b: Tensor, experts: Tensor, weights: Tensor, backend: str
) -> Tensor:
    """x [T, I], a [C, R, I], b [C, O, R], experts and weights [T, K]: the routed sum [T, O]."""
    experts, weights = experts.unsqueeze(1), weights.unsqueeze(1)
    z, counts, members = _routed_down(x, a.unsqueeze(0), experts, weights, backend)
    y = x.new_zeros(x.shape[0], b.shape[1])
    _routed_up(y, b, z, experts, counts, members, 0, backend)
    return y


def _routed_lora_backward(
    grad: Tensor, x: Tensor, a: Tensor, b: Tensor, experts: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return lora_gradients(grad, x, a, b, Routing(experts, weights))


# ---------------------------------------------------------------- what a compiler sees of them


def _fake_gated_down(
    x: Tensor,
    signatures: Tensor,
    sums: Tensor,
    open_slots: Tensor,
    a: Tensor,
    top_k: int,
    temperature: float,
    unit: bool,
    null_score: float | None,
    prior: Tensor | None,
    backend: str,
    tally: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parts, slots = open_slots.shape
    chosen = min(top_k, slots + (null_score is not None))
    experts = x.new_empty(x.shape[0], parts, chosen, dtype=torch.int64)
    weights = x.new_empty(x.shape[0], parts, chosen, dtype=torch.float32)
    return experts, weights, *_fake_routed_down(x, a, experts, weights, backend)


def _fake_routed_down(
    x: Tensor, a: Tensor, experts: Tensor, weights: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, parts, chosen = experts.shape
    if backend == "triton":
        from phatgoose.ops import launch

        return launch.make_z(x, a, chosen), *launch.make_plan(x, parts * chosen, a.shape[1])
    z = x.new_empty(tokens, parts, chosen, a.shape[2], dtype=torch.float32)
    return z, *(_no_plan(x) if backend == "reference" else _sorted_plan(x, a, chosen))


def _define(name: str, schema: str, run: Any, fake: Any) -> None:
    _library.define(name + schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"phatgoose::{name}", fake, lib=_library)


_define(
    "gated_down",
    "(Tensor x, Tensor signatures, Tensor sums, Tensor open_slots, Tensor a, int top_k,"
    " float temperature, bool unit, float? null_score, Tensor? prior, str backend,"
    " Tensor(a!)? tally=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gated_down,
    _fake_gated_down,
)
_define(
    "routed_down",
    "(Tensor x, Tensor a, Tensor experts, Tensor weights, str backend) -> (Tensor, Tensor, Tensor)",
    _routed_down,
    _fake_routed_down,
)
_define(
    "routed_up_",
    "(Tensor(a!) output, Tensor b, Tensor z, Tensor experts, Tensor counts, Tensor members,"
    " int part, str backend) -> ()",
    _routed_up,
    lambda *arguments: None,
)
_define(
    "routed_lora",
    "(Tensor x, Tensor a, Tensor b, Tensor experts, Tensor weights, str backend) -> Tensor",
    _routed_lora,
    lambda x, a, b, experts, weights, backend: x.new_empty(x.shape[0], b.shape[1]),
)
_define(
    "routed_lora_backward",
    "(Tensor grad, Tensor x, Tensor a, Tensor b, Tensor experts, Tensor weights)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _routed_lora_backward,
    lambda grad, x, a, b, experts, weights: tuple(map(torch.empty_like, (x, a, b, weights))),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx, da, db, dw = torch.ops.phatgoose.routed_lora_backward(grad, *ctx.saved_tensors)
    return dx, da, db, None, dw, None


torch.library.register_autograd(
    "phatgoose::routed_lora", _differentiate, setup_context=_save, lib=_library
)


# ---------------------------------------------------------------- for the layers above


def _directly(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """The operator where a compiler is to see it whole, else what it runs: dispatch takes 15 µs."""
    operator = getattr(torch.ops.phatgoose, name).default

    def call(*arguments: Any) -> Any:
        return operator(*arguments) if torch.compiler.is_compiling() else run(*arguments)

    return call


gated_down = _directly("gated_down", _gated_down)
routed_down = _directly("routed_down", _routed_down)
routed_up_ = _directly("routed_up_", _routed_up)


def routed_lora(
    x: Float[Tensor, "T I"],
    a: Float[Tensor, "E R I"],
    b: Float[Tensor, "E O R"],
    routing: Routing,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "T O"]:
    """Same value as `routed_lora_reference`; work and memory grow with T * K, not with E.

    Products run in the factors' dtype and are summed in fp32; the result has x's dtype.
    Differentiable in x, a, b and the weights, once. Raises ConfigError for a backend that cannot
    run on x's device.
    """
    chosen = choose_backend(backend, x.device.type, a.dtype)
    return torch.ops.phatgoose.routed_lora(x, a, b, routing.experts, routing.weights, chosen)


def pieces_of(signatures: Float[Tensor, "*N I"], dtype: torch.dtype) -> Float[Tensor, "2 *N I"]:
    """fp32 signatures as two of half precision that add up to them, for products on tensor cores.

    A pair keeps 16 (bf16) or 22 (fp16) bits, so that scores differ from those in fp32 by about
    1e-5 of their size.
    """
    high = signatures.to(dtype)
    return torch.stack([high, (signatures - high.float()).to(dtype)])
