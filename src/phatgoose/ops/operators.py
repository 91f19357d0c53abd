"""The routed layer as operators that torch.compile and CUDA graphs take whole.

This file has schemas, shapes without data, and the way to a backend. It has no arithmetic. A
layer's LoRA runs in two halves (see `Backend`), which are for inference. If you want gradients,
`phatgoose::routed_lora` is one differentiable operator.

Letters: T tokens, S layers that share the input, C slots, K chosen, R rank, I and O features.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from phatgoose.ops.backends import BACKENDS, Down, choose_backend
from phatgoose.ops.backends.sorting import lora_gradients
from phatgoose.ops.choose import CHOOSING, Choosing
from phatgoose.ops.scoring import Extras, Gates
from phatgoose.types import Routing

_library = torch.library.Library("phatgoose", "DEF")

Tensors = tuple[Tensor, ...]


def _gated_down(
    x: Tensor,
    signatures: Tensor,
    sums: Tensor,
    open_slots: Tensor,
    a: Tensor,
    prior: Tensor | None,
    tally: Tensor | None,
    backend: str,
    *choosing: Any,
) -> Tensors:
    """Score by gate, choose, and project down: experts, weights, z, counts, members.

    x [T, I]; a [S, C, R, I]; for the others see `Gates`, `Choosing` and `Extras`. The backend says
    whether signatures are whole or in pieces.
    """
    gates, extras = Gates(signatures, sums, open_slots), Extras(prior, tally)
    experts, weights, down = BACKENDS[backend].gated_down(x, gates, a, Choosing(*choosing), extras)
    return experts, weights, *down


def _fake_gated_down(
    x: Tensor, signatures: Tensor, sums: Tensor, open_slots: Tensor, a: Tensor, *more: Any
) -> Tensors:
    _, _, backend, *choosing = more
    parts, slots = open_slots.shape
    chosen = Choosing(*choosing).count(slots)
    experts = x.new_empty(x.shape[0], parts, chosen, dtype=torch.int64)
    weights = x.new_empty(x.shape[0], parts, chosen, dtype=torch.float32)
    return experts, weights, *BACKENDS[backend].empty_down(x, a, chosen)


def _routed_down(x: Tensor, a: Tensor, experts: Tensor, weights: Tensor, backend: str) -> Tensors:
    """Project down with experts [T, S, K] and weights that were chosen elsewhere."""
    return tuple(BACKENDS[backend].routed_down(x, a, experts, weights))


def _fake_routed_down(
    x: Tensor, a: Tensor, experts: Tensor, weights: Tensor, backend: str
) -> Tensors:
    return tuple(BACKENDS[backend].empty_down(x, a, experts.shape[2]))


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
    """Add to output [T, O] what part's chosen experts make of z; b is [C, O, R], scaled."""
    rows = _with_rows(output)
    BACKENDS[backend].routed_up_(rows, b, Down(z, counts, members), experts, part)
    if rows is not output:
        output.copy_(rows)


def routed_up_all_(
    output: Tensor,
    b: Sequence[Tensor],
    z: Tensor,
    experts: Tensor,
    counts: Tensor,
    members: Tensor,
    backend: str,
) -> None:
    """`routed_up_` for all parts, whose outputs are the columns of `output` one after the other."""
    rows = _with_rows(output)
    BACKENDS[backend].routed_up_all_(rows, b, Down(z, counts, members), experts)
    if rows is not output:
        output.copy_(rows)


def _with_rows(output: Tensor) -> Tensor:
    """The output, or a copy of it if its rows are not contiguous."""
    apart = not output.is_contiguous() and output.shape[1] > 1 and output.stride(1) != 1
    return output.contiguous() if apart else output


def _routed_lora(
    x: Tensor, a: Tensor, b: Tensor, experts: Tensor, weights: Tensor, backend: str
) -> Tensor:
    """x [T, I], a [C, R, I], b [C, O, R], experts and weights [T, K]: the routed sum [T, O]."""
    experts, weights = experts.unsqueeze(1), weights.unsqueeze(1)
    down = BACKENDS[backend].routed_down(x, a.unsqueeze(0), experts, weights)
    y = x.new_zeros(x.shape[0], b.shape[1])
    BACKENDS[backend].routed_up_(y, b, down, experts, 0)
    return y


def _routed_lora_backward(
    grad: Tensor, x: Tensor, a: Tensor, b: Tensor, experts: Tensor, weights: Tensor
) -> Tensors:
    return lora_gradients(grad, x, a, b, Routing(experts, weights))


def _define(name: str, schema: str, run: Any, fake: Any) -> None:
    _library.define(name + schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"phatgoose::{name}", fake, lib=_library)


_define(
    "gated_down",
    "(Tensor x, Tensor signatures, Tensor sums, Tensor open_slots, Tensor a, Tensor? prior,"
    f" Tensor(a!)? tally, str backend, {CHOOSING})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    """Call the operator while compiling; otherwise call `run`, which spares 15 µs of dispatch."""
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
    backend: str = "auto",
) -> Float[Tensor, "T O"]:
    """Same value as `routed_lora_reference`; work and memory grow with T * K, not with E.

    Products run in the factors' dtype and are summed in fp32; the result has x's dtype.
    Differentiable in x, a, b and the weights, once. Raises ConfigError for a backend that is
    unknown or cannot run on x's device.
    """
    chosen = choose_backend(backend, x.device.type, a.dtype)
    operator = torch.ops.phatgoose.routed_lora
    output: Tensor = operator(x, a, b, routing.experts, routing.weights, chosen)
    return output
