"""What adapters come to on the modules of a base: differences to what these compute."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from phatgoose.experts.delta import Call, Delta

FACTOR, BIAS, WEIGHT = "factor", "bias", "weight"
DOWN, UP = "down", "up"


@dataclass(frozen=True)
class Difference(Delta):
    """What an adapter of any kind comes to on one layer. No file holds it as it is."""

    parts: Mapping[str, Tensor] = field(default_factory=dict)

    keys: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def fits(cls, keys: frozenset[str], module: str, config: Mapping[str, Any]) -> bool:
        return False

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], scale: float) -> Delta:
        raise NotImplementedError

    @classmethod
    def merged(cls, low: Delta, rest: Mapping[str, Tensor]) -> Delta:
        return cls(low.a, low.b, low.scale, rest)

    @property
    def rest(self) -> Mapping[str, Tensor]:
        return self.parts

    def problem(self, layer: nn.Module) -> str | None:
        return None  # it was made of this layer, or of one like it


@final
@dataclass(frozen=True)
class LinearDifference(Difference):
    """scale * b a x + factor * (base's output) + weight x + bias, of a linear layer.

    `factor` and `bias` are [O], `weight` is [O, I]; each may be missing.
    """

    kind: ClassVar[str] = "more than that (DoRA, biases or a whole weight)"

    @staticmethod
    def add_rest(
        output: Tensor,
        base: Float[Tensor, "T O"],
        x: Float[Tensor, "T I"],
        rest: Mapping[str, Tensor],
        experts: Int[Tensor, "T K"],
        weights: Float[Tensor, "T K"],
        call: Call,
    ) -> Tensor:
        shares = shares_of(experts, weights, len(next(iter(rest.values()))))
        added = torch.zeros_like(output, dtype=torch.promote_types(output.dtype, torch.float32))
        if FACTOR in rest:
            added = added + (shares.to(added.dtype) @ rest[FACTOR].to(added.dtype)) * base
        if BIAS in rest:
            added = added + shares.to(added.dtype) @ rest[BIAS].to(added.dtype)
        if WEIGHT in rest:
            for number, tokens, share in users(shares):
                weight = rest[WEIGHT][number]
                product = F.linear(x[tokens].to(weight.dtype), weight).to(added.dtype)
                added = _plus(added, tokens, product * share.unsqueeze(-1))
        return (output + added).to(output.dtype)


@final
@dataclass(frozen=True)
class EmbeddingDifference(Difference):
    """down[id] @ up + weight[id] + factor * (base's output), of an embedding.

    `down` is [V, R], `up` [R, H], `weight` [V, H], `factor` [H]; each may be missing.
    """

    kind: ClassVar[str] = "an adapter of an embedding"

    @staticmethod
    def add_rest(
        output: Tensor,
        base: Float[Tensor, "T O"],
        x: Float[Tensor, "T I"],
        rest: Mapping[str, Tensor],
        experts: Int[Tensor, "T K"],
        weights: Float[Tensor, "T K"],
        call: Call,
    ) -> Tensor:
        ids = call.args[0].reshape(-1)
        added = torch.zeros_like(output, dtype=torch.promote_types(output.dtype, torch.float32))
        for number, tokens, share in users(shares_of(experts, weights, _count(rest))):
            row = torch.zeros_like(added[tokens])
            if DOWN in rest:
                up = rest[UP][number]
                row = row + F.embedding(ids[tokens], rest[DOWN][number]).to(up.dtype) @ up
            if WEIGHT in rest:
                row = row + F.embedding(ids[tokens], rest[WEIGHT][number])
            if FACTOR in rest:
                row = row + rest[FACTOR][number] * base[tokens]
            added = _plus(added, tokens, row * share.unsqueeze(-1))
        return (output + added).to(output.dtype)


@final
@dataclass(frozen=True)
class ModuleDifference(Difference):
    """The module with these differences added to its own parameters, less the module itself.

    So it is exact at weight 1 whatever the module computes; a mixture weighs what comes out. A
    parameter's difference is given whole, or as factors: `name:a` [N, R, I] and `name:b` [N, O, R],
    whose product is N matrices, transposed where they are `name:at` and `name:bt`.
    """

    kind: ClassVar[str] = "other parameters of a norm or a mixture"

    @staticmethod
    def add_rest(
        output: Tensor,
        base: Float[Tensor, "T O"],
        x: Float[Tensor, "T I"],
        rest: Mapping[str, Tensor],
        experts: Int[Tensor, "T K"],
        weights: Float[Tensor, "T K"],
        call: Call,
    ) -> Tensor:
        added = torch.zeros_like(output, dtype=torch.promote_types(output.dtype, torch.float32))
        for number, tokens, share in users(shares_of(experts, weights, _count(rest))):
            changed = _with_parameters(call.layer, _whole(rest, number))
            out = _run(changed, call, len(base), tokens)
            row = out.reshape(-1, out.shape[-1]).to(added.dtype) - base[tokens]
            added = _plus(added, tokens, row * share.unsqueeze(-1))
        return (output + added).to(output.dtype)


def shares_of(
    experts: Int[Tensor, "T K"], weights: Float[Tensor, "T K"], count: int
) -> Float[Tensor, "T C"]:
    """How much each token takes of each of `count`."""
    shares = weights.new_zeros(len(weights), count)
    return shares.scatter_add(1, experts.clamp_min(0), weights * (experts >= 0))


def users(shares: Float[Tensor, "T C"]) -> Iterator[tuple[int, Any, Tensor]]:
    """Each number that some token uses, those tokens, and how much each of them takes.

    What a compiler traces, or a CUDA graph captures, must not depend on it: all tokens then.
    """
    traced = torch.compiler.is_compiling()
    if traced or (shares.is_cuda and torch.cuda.is_current_stream_capturing()):
        for number in range(shares.shape[1]):
            yield number, slice(None), shares[:, number]
        return
    for number in shares.detach().any(dim=0).nonzero().flatten().tolist():
        tokens = shares[:, number].detach().nonzero().flatten()
        yield number, tokens, shares[tokens, number]


def _plus(total: Tensor, tokens: Any, rows: Tensor) -> Tensor:
    return total + rows if isinstance(tokens, slice) else total.index_add(0, tokens, rows)


def _count(rest: Mapping[str, Tensor]) -> int:
    return len(next(iter(rest.values())))


def _whole(rest: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Each parameter's difference, factors multiplied."""
    whole = {}
    for key, stacked in rest.items():
        name, _, half = key.partition(":")
        if not half:
            whole[name] = stacked[number]
        elif half.startswith("a"):
            product = rest[f"{name}:b{half[1:]}"][number] @ stacked[number]
            whole[name] = product.mT if half == "at" else product
    return whole


def _with_parameters(layer: nn.Module, differences: Mapping[str, Tensor]) -> nn.Module:
    """The module with other parameters and without hooks.

    It is an object of its own, because other threads may be running the module.
    """
    changed = object.__new__(type(layer))
    changed.__dict__.update(layer.__dict__)
    parameters: dict[str, Any] = dict(layer._parameters)
    for name, difference in differences.items():
        weight = parameters[name]
        parameters[name] = (weight.float() + difference.float()).to(weight.dtype)
    changed.__dict__["_parameters"] = parameters
    return changed


def _run(module: nn.Module, call: Call, count: int, tokens: Any) -> Tensor:
    """The module's output for some of the `count` tokens that its arguments are of."""

    def pick(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(tokens, slice):
            return value
        if value.dim() == 2 and len(value) == count:
            return value[tokens]
        if value.dim() > 2 and value.shape[:-1].numel() == count:
            return value.reshape(count, value.shape[-1])[tokens]
        return value

    args = [pick(value) for value in call.args]
    kwargs = {name: pick(value) for name, value in call.kwargs.items()}
    output: Tensor = type(module).forward(module, *args, **kwargs)
    return output
