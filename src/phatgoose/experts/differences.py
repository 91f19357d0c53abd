"""What adapters come to on the modules of a base: differences to what these compute."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from phatgoose.experts.delta import Call, Delta, Mixture

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
        out: Tensor, base: Float[Tensor, "T O"], x: Float[Tensor, "T I"], mixed: Mixture, call: Call
    ) -> Tensor:
        rest, shares = mixed.rest, mixed.shares()
        added = _zeros(out)
        if FACTOR in rest:
            added = added + (shares.to(added.dtype) @ rest[FACTOR].to(added.dtype)) * base
        if BIAS in rest:
            added = added + shares.to(added.dtype) @ rest[BIAS].to(added.dtype)
        if WEIGHT in rest:
            for number, tokens, share in mixed.users():
                weight = rest[WEIGHT][number]
                product = F.linear(x[tokens].to(weight.dtype), weight).to(added.dtype)
                added = _plus(added, tokens, product * share.unsqueeze(-1))
        return (out + added).to(out.dtype)


@final
@dataclass(frozen=True)
class EmbeddingDifference(Difference):
    """down[id] @ up + weight[id] + factor * (base's output), of an embedding.

    `down` is [V, R], `up` [R, H], `weight` [V, H], `factor` [H]; each may be missing.
    """

    kind: ClassVar[str] = "an adapter of an embedding"

    @staticmethod
    def add_rest(
        out: Tensor, base: Float[Tensor, "T O"], x: Float[Tensor, "T I"], mixed: Mixture, call: Call
    ) -> Tensor:
        rest, ids, added = mixed.rest, call.args[0].reshape(-1), _zeros(out)
        for number, tokens, share in mixed.users():
            row = torch.zeros_like(added[tokens])
            if DOWN in rest:
                up = rest[UP][number]
                row = row + F.embedding(ids[tokens], rest[DOWN][number]).to(up.dtype) @ up
            if WEIGHT in rest:
                row = row + F.embedding(ids[tokens], rest[WEIGHT][number])
            if FACTOR in rest:
                row = row + rest[FACTOR][number] * base[tokens]
            added = _plus(added, tokens, row * share.unsqueeze(-1))
        return (out + added).to(out.dtype)


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
        out: Tensor, base: Float[Tensor, "T O"], x: Float[Tensor, "T I"], mixed: Mixture, call: Call
    ) -> Tensor:
        added = _zeros(out)
        for number, tokens, share in mixed.users():
            changed = _with_parameters(call.layer, _whole(mixed.rest, number))
            found = _run(changed, call, len(base), tokens)
            row = found.reshape(-1, found.shape[-1]).to(added.dtype) - base[tokens]
            added = _plus(added, tokens, row * share.unsqueeze(-1))
        return (out + added).to(out.dtype)


def _zeros(like: Tensor) -> Tensor:
    """What is added up in fp32 at least."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def _plus(total: Tensor, tokens: Any, rows: Tensor) -> Tensor:
    return total + rows if isinstance(tokens, slice) else total.index_add(0, tokens, rows)


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
