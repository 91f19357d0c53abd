"""LoRA on the batched matrices of a mixture's experts: PEFT's target_parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from torch import Tensor, nn

from phatgoose.errors import (
    ExpertFormatError,
    IncompatibleExpertError,
    UnsupportedAdapterError,
)
from phatgoose.experts.delta import LORA_A, LORA_B, Delta
from phatgoose.experts.differences import ModuleDifference
from phatgoose.experts.saved import nothing

PARAMETERS = "target_parameters"
INNER = "base_layer."  # of a second parameter of the same module, PEFT wraps the first


@final
@dataclass(frozen=True)
class ParameterLora(Delta):
    """LoRA on parameters of three dimensions of one module, a matrix for each of its experts.

    Between these parameters stands a nonlinearity, so an expert of ours adds the difference that
    its parameters make to what the whole module gives.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()  # as PEFT nests them, the outermost first
    ranks: tuple[int, ...] = ()

    kind: ClassVar[str] = "LoRA on batched experts (target_parameters)"
    keys: ClassVar[frozenset[str]] = frozenset({LORA_A, LORA_B})
    optional: ClassVar[frozenset[str]] = frozenset({INNER + LORA_A, INNER + LORA_B})
    fields: ClassVar[Mapping[str, Any]] = {PARAMETERS: []}
    targeted: ClassVar[bool] = False
    place: ClassVar[str] = "mixture of such experts"

    @classmethod
    def fits(cls, keys: frozenset[str], module: str, config: Mapping[str, Any]) -> bool:
        return super().fits(keys, module, config) and bool(_named(module, config))

    @classmethod
    def rank_in(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> int | None:
        rank = config.get("r")
        return rank if type(rank) is int and rank > 0 else None

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], scale: float) -> Delta:
        raise NotImplementedError

    @classmethod
    def read_of(
        cls, tensors: Mapping[str, Tensor], scale: float, module: str, config: Mapping[str, Any]
    ) -> Delta:
        names = _named(module, config)
        halves = [tensors[LORA_A]]
        if INNER + LORA_A in tensors:
            halves.append(tensors[INNER + LORA_A])
        if len(names) != len(halves):
            raise ExpertFormatError(
                f"adapter_config.json: {PARAMETERS} names {len(names)} parameters of {module}, the "
                f"file holds {len(halves)}. Save the adapter again."
            )
        rank = config.get("r")
        if type(rank) is not int or rank < 1 or any(len(half) % rank for half in halves):
            raise ExpertFormatError(
                f"{module}: has lora_A of {[list(half.shape) for half in halves]}, which are no "
                f"matrices of rank {rank!r} for each expert. Save the adapter again."
            )
        # PEFT goes through a model's parameters in their order, and wraps what it wrapped before.
        ranks = (rank,) * len(halves)
        return cls(*nothing(0), scale, dict(tensors), tuple(names), ranks)

    @classmethod
    def merged(cls, low: Delta, rest: Mapping[str, Tensor]) -> Delta:
        raise NotImplementedError

    @property
    def gate_features(self) -> int | None:
        return None

    @property
    def alpha_rank(self) -> int:
        return self.ranks[0]

    @property
    def others(self) -> Mapping[str, Tensor]:
        return self.tensors

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return tuple(t for key, t in self.tensors.items() if key.endswith(LORA_B))

    def setting(self, module: str) -> Mapping[str, Any]:
        return {PARAMETERS: [f"{module}.{name}" for name in self.parameters]}

    def problem(self, layer: nn.Module) -> str | None:
        return None if set(self.parameters) <= set(layer._parameters) else f"no {self.place}"

    def on(self, layer: nn.Module, who: str) -> Delta:
        order = [name for name in layer._parameters if name in self.parameters]
        missing = set(self.parameters) - set(order)
        width = getattr(layer, "hidden_dim", getattr(layer, "hidden_size", None))
        if missing or not isinstance(width, int):
            raise IncompatibleExpertError(
                f"{who}: adapts {', '.join(sorted(self.parameters))} of experts of a mixture, and "
                f"the base's {type(layer).__name__} is not such. It was trained on another base, "
                "or with another version of transformers."
            )
        rest: dict[str, Tensor] = {}
        # The last of the layer's own order is the outermost of PEFT's wrappers.
        for name, prefix, rank in zip(reversed(order), ("", INNER), self.ranks, strict=False):
            rest |= self._factors(layer, name, prefix, rank, who)
        return ModuleDifference(*nothing(width), 1.0, rest)

    def _factors(
        self, layer: nn.Module, name: str, prefix: str, rank: int, who: str
    ) -> dict[str, Tensor]:
        weight = layer._parameters[name]
        assert weight is not None
        if weight.dim() != 3:
            raise UnsupportedAdapterError(
                f"{who}: adapts {name}, a parameter of {weight.dim()} dimensions of a "
                f"{type(layer).__name__}. Only experts of a mixture, of three, are supported: name "
                "linear layers in target_modules."
            )
        turned = bool(getattr(layer, "is_transposed", False))
        experts, rows, columns = weight.shape
        inputs, outputs = (rows, columns) if turned else (columns, rows)
        a, b = self.tensors[prefix + LORA_A].float(), self.tensors[prefix + LORA_B].float()
        if list(a.shape) != [rank * experts, inputs] or list(b.shape) != [outputs, rank * experts]:
            raise IncompatibleExpertError(
                f"{who}: its LoRA of {name} is {list(a.shape)} and {list(b.shape)}, the base's "
                f"parameter {list(weight.shape)}. It was trained on another base."
            )
        a = a.detach().to(weight.device).view(experts, rank, inputs)
        b = b.detach().to(weight.device).view(outputs, rank, experts).permute(2, 0, 1) * self.scale
        mark = "t" if turned else ""
        return {f"{name}:a{mark}": a, f"{name}:b{mark}": b.contiguous()}


def _named(module: str, config: Mapping[str, Any]) -> list[str]:
    """The parameters of `module` that the config names."""
    said = config.get(PARAMETERS) or []
    found = []
    for full in said if isinstance(said, list) else [said]:
        path, _, name = str(full).rpartition(".")
        if path and f".{module}".endswith(f".{path}"):
            found.append(name)
    return found
