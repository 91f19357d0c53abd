"""LoRA on the batched matrices of a mixture's experts: PEFT's target_parameters."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from torch import Tensor, nn

from phatgoose.errors import (
    ExpertFormatError,
    IncompatibleExpertError,
    UnsupportedAdapterError,
)
from phatgoose.experts.delta import LORA_A, LORA_B, Delta, OnBase
from phatgoose.experts.differences import ModuleDifference
from phatgoose.experts.patterns import PatternError, Patterns
from phatgoose.experts.saved import nothing
from phatgoose.experts.targets import Targets

PARAMETERS = "target_parameters"
INNER = "base_layer."  # of a second parameter of the same module, PEFT wraps the first


@final
@dataclass(frozen=True)
class ParameterLora(OnBase):
    """LoRA on parameters of three dimensions of one module, a matrix for each of its experts.

    Between these parameters stands a nonlinearity, so an expert of ours adds the difference that
    its parameters make to what the whole module gives.
    """

    # Rank and scale of each parameter that the config may mean: only the base tells which it has.
    parameters: Mapping[str, tuple[int, float]] = field(default_factory=dict)

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
        return None  # each parameter has its own

    @classmethod
    def read_of(
        cls, tensors: Mapping[str, Tensor], scale: float, module: str, config: Mapping[str, Any]
    ) -> Delta:
        names = _named(module, config)
        halves = 1 + (INNER + LORA_A in tensors)
        if len(names) < halves:
            raise ExpertFormatError(
                f"adapter_config.json: {PARAMETERS} names {len(names)} parameters of {module}, the "
                f"file holds {halves}. Save the adapter again."
            )
        about = {name: _rank_and_scale(f"{module}.{name}", config) for name in names}
        return cls(*nothing(0), 1.0, dict(tensors), about)

    @property
    def gate_features(self) -> int | None:
        return None

    def alphas(self, module: str) -> Mapping[str, tuple[int, float]]:
        return {f"{module}.{name}": about for name, about in self.parameters.items()}

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return tuple(t for key, t in self.tensors.items() if key.endswith(LORA_B))

    def setting(self, module: str) -> Mapping[str, Any]:
        return {PARAMETERS: [f"{module}.{name}" for name in self.parameters]}

    def problem(self, layer: nn.Module) -> str | None:
        known = [name for name in layer._parameters if name in self.parameters]
        return None if len(known) == len(self.trained) else f"no {self.place}"

    def on(self, layer: nn.Module, who: str) -> Delta:
        order = [name for name in layer._parameters if name in self.parameters]
        for name in order:
            self._check(layer, name, who)
        width = getattr(layer, "hidden_dim", getattr(layer, "hidden_size", None))
        if len(order) != len(self.trained) or not isinstance(width, int):
            raise IncompatibleExpertError(
                f"{who}: adapts {', '.join(sorted(self.parameters))} of experts of a mixture, and "
                f"the base's {type(layer).__name__} is not such. It was trained on another base, "
                "or with another version of transformers."
            )
        rest: dict[str, Tensor] = {}
        # PEFT wraps the parameters in the layer's order, so the last is the outermost.
        for name, prefix in zip(reversed(order), ("", INNER), strict=False):
            rest |= self._factors(layer, name, prefix, who)
        return ModuleDifference(*nothing(width), 1.0, rest)

    def _check(self, layer: nn.Module, name: str, who: str) -> None:
        weight = layer._parameters[name]
        if weight is None or weight.dim() != 3:
            raise UnsupportedAdapterError(
                f"{who}: adapts {name} of a {type(layer).__name__}, which is no matrix for each "
                "expert of a mixture. What a mixture's own router gives cannot be mixed: leave it "
                "out of target_parameters (PEFT's all-linear names it)."
            )

    def _factors(self, layer: nn.Module, name: str, prefix: str, who: str) -> dict[str, Tensor]:
        weight, (rank, scale) = layer._parameters[name], self.parameters[name]
        assert weight is not None
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
        b = b.detach().to(weight.device).view(outputs, rank, experts).permute(2, 0, 1) * scale
        mark = "t" if turned else ""
        return {f"{name}:a{mark}": a, f"{name}:b{mark}": b.contiguous()}


def _named(module: str, config: Mapping[str, Any]) -> list[str]:
    """The parameters of `module` that the config may mean, as PEFT matches them."""
    said = config.get(PARAMETERS) or []
    split = [str(full).rpartition(".") for full in (said if isinstance(said, list) else [said])]
    found = [name for path, _, name in split if path and f".{module}".endswith(f".{path}")]
    bare = [name for path, _, name in split if not path]
    if bare and not Targets(config).name(module):  # of any module that is no target itself
        found += bare
    return found


def _rank_and_scale(key: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """What the config says of one parameter, by its whole name."""
    rank = _of(key, config, "rank_pattern", "r")
    alpha = _of(key, config, "alpha_pattern", "lora_alpha")
    if type(rank) is not int or rank < 1 or isinstance(alpha, bool):
        raise ExpertFormatError(f"adapter_config.json: the rank of {key} is {rank!r}. Correct it.")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ExpertFormatError(f"adapter_config.json: lora_alpha of {key} is {alpha!r}.")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of(key: str, config: Mapping[str, Any], patterns: str, default: str) -> Any:
    said = config.get(patterns) or {}
    try:
        place = Patterns(list(said)).first(key)
    except PatternError as error:
        raise ExpertFormatError(f"adapter_config.json: {patterns}: {error}.") from None
    return config.get(default) if place is None else list(said.values())[place]
