"""The interface of adapter kinds: what one expert adds to the output of one module of the base."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from phatgoose.errors import UnsupportedAdapterError

LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True)
class Delta(ABC):
    """An adapter at one module: it adds `scale * b @ a @ x`, and what its `rest` says.

    A new kind is a file with a subclass, and a line in `DELTAS`. The kernels compute the low-rank
    product (of rank 0 where a kind has none); `add_rest` computes what else there is in plain
    torch. It must be linear in the tensors of `rest`, so that zeros add nothing, and sums over
    experts are what merging takes them for.
    """

    a: Float[Tensor, "R I"]
    b: Float[Tensor, "O R"]
    scale: float  # alpha / rank, or alpha / sqrt(rank) for rsLoRA

    kind: ClassVar[str]  # for people
    keys: ClassVar[frozenset[str]]  # what follows the module's name in the keys of its tensors
    fields: ClassVar[Mapping[str, Any]] = {}  # what adapter_config.json says of it

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def in_features(self) -> int:
        return self.a.shape[1]

    @property
    def out_features(self) -> int:
        return self.b.shape[0]

    @classmethod
    @abstractmethod
    def read(cls, tensors: Mapping[str, Tensor], scale: float) -> "Delta":
        """Make one of a module's tensors, by `keys`. The factors' shapes were checked."""

    @classmethod
    @abstractmethod
    def merged(cls, low: "Delta", rest: Mapping[str, Tensor]) -> "Delta":
        """Make one of another's low-rank product and this rest, the sum of several experts'."""

    @property
    def others(self) -> Mapping[str, Tensor]:
        """The module's tensors by key, as a file holds them, without lora_A and lora_B."""
        return {}

    @property
    def rest(self) -> Mapping[str, Tensor]:
        """What it adds beside the low-rank product, by name, of one shape for all experts."""
        return {}

    @staticmethod
    def add_rest(
        output: Tensor,
        base: Float[Tensor, "T O"],
        x: Float[Tensor, "T I"],
        rest: Mapping[str, Tensor],
        experts: Int[Tensor, "T K"],
        weights: Float[Tensor, "T K"],
    ) -> Tensor:
        """The output with the weighted rest of each token's experts added; it may be written to.

        `base` is what the base alone gives. The tensors of `rest` are [C, ...], by slot; a slot of
        -1 adds nothing.
        """
        raise NotImplementedError

    def plain(self, who: str) -> "Delta":
        """Return itself if it is the low-rank product alone. `who` takes nothing else.

        Raises UnsupportedAdapterError.
        """
        if self.rest or not self.rank:
            raise UnsupportedAdapterError(
                f"{who}: takes plain LoRA only, and this is {self.kind}. Leave the expert out, or "
                "train a plain LoRA."
            )
        return self
