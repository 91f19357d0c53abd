"""The two things every part of the library passes around."""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Which experts each token uses, and how strongly."""

    experts: Int[Tensor, "*T K"]  # slots in the bank; -1 where a token uses none
    weights: Float[Tensor, "*T K"]  # fp32; 0 where the slot is -1 and nothing was chosen


@dataclass(frozen=True)
class TokenContext:
    """Where the tokens of one forward stand: their sequence, their position, and what came before.

    A site sees its tokens flattened to T = B * L, row after row. `ids` and `real` have C = P + L
    columns: the P tokens already in the KV cache, then the L new ones, so a router may use
    everything a causal model has read so far.
    """

    length: int  # L, tokens of each sequence in this forward
    ids: Int[Tensor, "B C"] | None  # None where only embeddings were given
    real: Bool[Tensor, "B C"]  # False at padding
    # N, how many tokens of each sequence were given first, before any was added: to `generate`, or
    # to the first forward with a KV cache. None: all C.
    prompt: int | None = None
    # Ids and real of what of the prompt comes after this forward, where it is read in chunks.
    ahead: tuple[Int[Tensor, "B M"], Bool[Tensor, "B M"]] | None = None
    why: str = ""  # the ids are not known

    @property
    def batch(self) -> int:
        """B, sequences in this forward."""
        return self.real.shape[0]

    @property
    def prompt_length(self) -> int:
        """N, the columns of the prompt."""
        return self.real.shape[1] if self.prompt is None else self.prompt

    def positions(self) -> Int[Tensor, "B L"]:
        """The position of each new token among the real tokens of its sequence, from 0."""
        return (self.real.long().cumsum(-1) - 1).clamp_min(0)[:, -self.length :]

    def new_ids(self) -> Int[Tensor, "B L"] | None:
        """The ids of the tokens of this forward, without those in the cache."""
        return None if self.ids is None else self.ids[:, -self.length :]

    def new_real(self) -> Bool[Tensor, "B L"]:
        """Which tokens of this forward are not padding."""
        return self.real[:, -self.length :]
