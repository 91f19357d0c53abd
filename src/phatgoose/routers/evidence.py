"""Evidence gathered over the context."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from phatgoose.errors import ConfigError, MissingGateError
from phatgoose.experts import Expert
from phatgoose.routers.base import Modifier, Router
from phatgoose.routers.inputs import first_linear, token_inputs, written_by
from phatgoose.types import TokenContext

SHRINK = 0.05  # of the mean variance, added to the background's covariance


class EvidenceRouter(Modifier):
    """How much the context so far reads like an expert's prompts, rather than like any text.

    x is what the base's first linear module reads, which depends on the token's id alone (position
    0 is taken where the base adds positions to its embeddings). With m, Σ its mean and covariance
    over background text and m_z its mean over the expert's prompts, a token is worth
    w·(x - m) - w·(m_z - m) / 2 with w = (Σ + λI)⁻¹ (m_z - m): the log-likelihood ratio of two
    Gaussians with one covariance. That is a table [vocabulary, experts]. The prior of a token is
    `strength` times the mean over the real tokens up to it, the same at every module; so there is
    no state beside the KV cache. Ours, not the paper's.

    Alone, each token takes its best expert at weight 1. As "ROUTER+evidence" it is added to that
    router's scores, whose settings stay.

    Needs of each expert its mean prompt (`phatgoose experts derive`), and of the collector nothing:
    background text, unless given as token ids, is sampled from the base. For decoder-only models.
    """

    name = "evidence"
    defaults = {"top_k": 1, "scale": "unit"}

    def __init__(
        self,
        inner: Router | None = None,
        *,
        strength: float = 1.0,
        background: Int[Tensor, "B L"] | None = None,
    ) -> None:
        super().__init__(inner)
        self.strength = strength
        self._background = background
        self._module = ""
        self._known_text: tuple[Tensor, Tensor] | None = None  # its mean, and (Σ + λI)⁻¹; fp64
        self._worth: dict[str, Float[Tensor, " V"]] = {}  # of every token, by expert
        self._table: tuple[tuple[str, ...], Tensor] = ((), torch.empty(0))

    def prepare(self, model: Any, experts: Sequence[Expert]) -> None:
        super().prepare(model, experts)
        if getattr(model.config, "is_encoder_decoder", False):
            raise ConfigError(
                f"{self.name}: the model is an encoder-decoder, whose decoder does not read the "
                "prompt. Use another router."
            )
        inputs = token_inputs(model, model.get_input_embeddings().weight.shape[0])
        if self._known_text is None:
            self._module = first_linear(model)
            ids = written_by(model) if self._background is None else self._background
            self._known_text = _measure(inputs, ids)
        mean, precision = self._known_text
        for expert in experts:
            shift = self._mean_prompt(expert) - mean
            direction = precision @ shift
            offset = direction @ (mean + shift / 2)
            self._worth[expert.name] = inputs @ direction.float() - offset.float()

    def signature(self, expert: Expert, module: str) -> Float[Tensor, " W"]:
        return torch.zeros(1) if self.inner is None else self.inner.signature(expert, module)

    def score(
        self, x: Float[Tensor, "T I"], signatures: Float[Tensor, "E W"]
    ) -> Float[Tensor, "T E"]:
        if self.inner is None:
            return x.new_zeros(len(x), len(signatures), dtype=torch.float32)
        return self.inner.score(x, signatures)

    def prior(self, context: TokenContext, experts: list[Expert]) -> Float[Tensor, "T E"]:
        if context.ids is None:
            raise ConfigError(f"{self.name}: was given embeddings, and needs the tokens' ids.")
        names = tuple(expert.name for expert in experts)
        if self._table[0] != names or self._table[1].device != context.ids.device:
            stacked = torch.stack([self._worth[name] for name in names], dim=1)
            self._table = (names, stacked.to(context.ids.device))
        real = context.real.unsqueeze(-1)
        # fp64, so that prefill and decode agree whatever order a device sums in.
        sums = (self._table[1][context.ids] * real).double().cumsum(1)
        means = sums / real.long().cumsum(1).clamp_min(1)
        return self.strength * means[:, -context.length :].float().flatten(0, 1)

    def _mean_prompt(self, expert: Expert) -> Float[Tensor, " I"]:
        found = expert.signatures.get("prompt_mean")
        if found is None or self._module not in found.vectors:
            raise MissingGateError(
                f"{expert.name}: has no mean prompt at {self._module}. Measure it: phatgoose "
                f"experts derive {expert.folder or 'FOLDER'} --tasks TASKS"
            )
        return found.vectors[self._module].double()


def _measure(
    inputs: Float[Tensor, "V I"], ids: Int[Tensor, "B L"]
) -> tuple[Float[Tensor, " I"], Float[Tensor, "I I"]]:
    """The mean of a text's inputs, and the inverse of their covariance, shrunk."""
    share = torch.bincount(ids.flatten().cpu(), minlength=len(inputs)).double()
    used = share.nonzero().squeeze(1)
    share, inputs = share[used] / share.sum(), inputs[used].double()
    mean = share @ inputs
    centred = inputs - mean
    covariance = (centred * share.unsqueeze(1)).T @ centred
    covariance.diagonal().add_(SHRINK * covariance.diagonal().mean())
    return mean, torch.linalg.inv(covariance)
