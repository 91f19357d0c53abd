"""The interface of adapter kinds: what one expert adds to the output of one module of the base."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from phatgoose.errors import UnsupportedAdapterError
from phatgoose.experts.base import linear_sizes

LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True)
class Call:
    """One call of a module of the base: what `add_rest` may need beside the numbers."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Mixture:
    """The rests of C experts, and how much of which each token takes."""

    rest: Mapping[str, Tensor]  # each [C, ...]
    experts: Int[Tensor, "T K"]  # which of the C; -1 adds nothing
    weights: Float[Tensor, "T K"]

    def shares(self) -> Float[Tensor, "T C"]:
        """How much each token takes of each expert."""
        count = len(next(iter(self.rest.values())))
        shares = self.weights.new_zeros(len(self.weights), count)
        return shares.scatter_add(1, self.experts.clamp_min(0), self.weights * (self.experts >= 0))

    def users(self) -> Iterator[tuple[int, Any, Tensor]]:
        """Each expert that some token takes, those tokens, and how much each takes of it.

        What a compiler traces, or a CUDA graph captures, must not depend on it: all tokens then.
        """
        shares = self.shares()
        traced = torch.compiler.is_compiling()
        if traced or (shares.is_cuda and torch.cuda.is_current_stream_capturing()):
            for number in range(shares.shape[1]):
                yield number, slice(None), shares[:, number]
            return
        for number in shares.detach().any(dim=0).nonzero().flatten().tolist():
            tokens = shares[:, number].detach().nonzero().flatten()
            yield number, tokens, shares[tokens, number]


@dataclass(frozen=True)
class Delta(ABC):
    """An adapter at one module: it adds `scale * b @ a @ x`, and what its `rest` says.

    A new kind is a file with a subclass, and a line in `DELTAS`. The kernels compute the low-rank
    product (of rank 0 where a kind has none); `add_rest` computes what else there is in plain
    torch. It should be linear in the tensors of `rest`, so that zeros add nothing, and sums over
    experts are what merging takes them for.

    A kind that depends on the weights of its layer says what it comes to there by `on`.
    """

    a: Float[Tensor, "R I"]
    b: Float[Tensor, "O R"]
    scale: float  # alpha / rank, or alpha / sqrt(rank) for rsLoRA

    kind: ClassVar[str]  # for people
    keys: ClassVar[frozenset[str]]  # what follows the module's name in the keys of its tensors
    optional: ClassVar[frozenset[str]] = frozenset()  # keys that it may have besides
    fields: ClassVar[Mapping[str, Any]] = {}  # what adapter_config.json says of it

    place: ClassVar[str] = "linear layer"  # where it belongs
    targeted: ClassVar[bool] = True  # whether the config must name its module as a target

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def alpha_rank(self) -> int:
        """The rank that PEFT divides alpha by; 0 where there is no alpha."""
        return self.rank

    def alphas(self, module: str) -> Mapping[str, tuple[int, float]]:
        """Rank and scale of all that PEFT's patterns may name at `module`."""
        return {module: (self.alpha_rank, self.scale)} if self.alpha_rank else {}

    @property
    def in_features(self) -> int:
        return self.a.shape[1]

    @property
    def out_features(self) -> int:
        return self.b.shape[0]

    @property
    def gate_features(self) -> int | None:
        """How long its gate is; None where only the base can tell."""
        return self.in_features

    @classmethod
    def fits(cls, keys: frozenset[str], module: str, config: Mapping[str, Any]) -> bool:
        """Whether a module with exactly these tensors is of this kind."""
        return cls.keys <= keys <= cls.keys | cls.optional

    @classmethod
    def rank_in(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> int | None:
        """The rank that PEFT divides alpha by; None where there is no alpha."""
        return len(tensors[LORA_A]) if LORA_A in cls.keys else None

    @classmethod
    @abstractmethod
    def read(cls, tensors: Mapping[str, Tensor], scale: float) -> "Delta":
        """Make one of a module's tensors, by `keys`. The factors' shapes were checked."""

    @classmethod
    def read_of(
        cls, tensors: Mapping[str, Tensor], scale: float, module: str, config: Mapping[str, Any]
    ) -> "Delta":
        """Like `read`, for a kind that needs its module's name or the config to be read."""
        return cls.read(tensors, scale)

    @classmethod
    @abstractmethod
    def merged(cls, low: "Delta", rest: Mapping[str, Tensor]) -> "Delta":
        """Make one of another's low-rank product and this rest, the sum of several experts'."""

    @property
    def others(self) -> Mapping[str, Tensor]:
        """The module's tensors by key, as a file holds them, without lora_A and lora_B."""
        return {}

    @property
    def hashed(self) -> Mapping[str, Tensor]:
        """Those of `others` that tell one adapter from another."""
        return self.others

    @property
    def needs_base(self) -> bool:
        """Whether it says what it adds only `on` its layer."""
        return False

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """Tensors that are all zero where it was never trained."""
        return (self.b, *self.rest.values())

    @property
    def rest(self) -> Mapping[str, Tensor]:
        """What it adds beside the low-rank product, by name."""
        return {}

    def setting(self, module: str) -> Mapping[str, Any]:
        """What adapter_config.json says of it at `module`; lists of several are put together."""
        return {"target_modules": [module], **self.fields}

    def on(self, layer: nn.Module, who: str) -> "Delta":
        """What it comes to on this layer of the base; it may cost memory.

        Raises IncompatibleExpertError or UnsupportedAdapterError in the name of `who`.
        """
        return self

    def problem(self, layer: nn.Module) -> str | None:
        """Why a layer of the base cannot be the one that it was trained at, in words, or None.

        Told by sizes alone; `on` looks closer.
        """
        sizes = linear_sizes(layer)
        if sizes is None:
            return f"no {self.place}"
        if sizes != (self.in_features, self.out_features):
            return (
                f"maps {self.in_features} to {self.out_features} features, the base maps "
                f"{sizes[0]} to {sizes[1]}"
            )
        return None

    def also(self, module: str, model: nn.Module) -> Mapping[str, "Delta"]:
        """What it adds at other modules of a base because their weights are tied to `module`'s."""
        return {}

    @staticmethod
    def add_rest(
        out: Tensor, base: Float[Tensor, "T O"], x: Float[Tensor, "T I"], mixed: Mixture, call: Call
    ) -> Tensor:
        """`out` with the weighted rest of each token's experts added; it may be written to.

        `base` is what the base alone gives, by `call`.
        """
        raise NotImplementedError

    def plain(self, who: str, instead: str = "Leave the expert out") -> "Delta":
        """Return itself if it is the low-rank product alone. `who` takes nothing else.

        Raises UnsupportedAdapterError.
        """
        if self.needs_base or self.rest or not self.rank:
            raise UnsupportedAdapterError(
                f"{who}: takes plain LoRA only, and this is {self.kind}. {instead}, or train a "
                "plain LoRA."
            )
        return self


@dataclass(frozen=True)
class OnBase(Delta):
    """A kind that says what it adds only on its layer. `tensors` are what its file has, by key."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], scale: float) -> Delta:
        raise NotImplementedError(f"{cls.__name__} is read by read_of")

    @classmethod
    def merged(cls, low: Delta, rest: Mapping[str, Tensor]) -> Delta:
        raise NotImplementedError(
            f"{cls.__name__} is merged on its base, as what it comes to there"
        )

    @property
    def others(self) -> Mapping[str, Tensor]:
        return self.tensors

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return tuple(self.tensors.values())
