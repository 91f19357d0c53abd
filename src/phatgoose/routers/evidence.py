"""Evidence gathered over the context: what it has read so far tells which expert is right.

A token at a time rarely does: where an answer starts, the token is the same whatever the task. So
each token id has a worth for each expert, a table [vocabulary, experts] made from what the base's
first linear module reads, which depends on the id alone (position 0 is taken where the base adds
positions to its embeddings). The prior of a token is `strength` times the mean worth of the real
tokens up to it, the same at every module. There is no state beside the ids in the KV cache.

The routers called prompt_... know the whole prompt already at its first token, where causal ones
learn what it is about only as they read it, and so read its beginning by the wrong experts.

Ours, not the paper's. For decoder-only models.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from phatgoose.errors import ConfigError, ExpertFormatError, MissingGateError
from phatgoose.experts import Expert, LoraModule
from phatgoose.experts.kinds import KINDS
from phatgoose.routers.base import Measuring, Modifier, Router, Vectors
from phatgoose.routers.entropy import most_even
from phatgoose.routers.inputs import first_readers, token_inputs, written_by
from phatgoose.routers.running import prior_of
from phatgoose.routers.spectral import right_singular
from phatgoose.types import TokenContext

SHRINK = 0.05  # of the mean variance, added to the background's covariance


@dataclass(frozen=True)
class Background:
    """Generic text, as the base's first linear module reads it; fp64."""

    share: Float[Tensor, " V"]  # of each token id in it
    mean: Float[Tensor, " I"]

    @classmethod
    def measure(cls, inputs: Float[Tensor, "V I"], ids: Int[Tensor, "B L"]) -> "Background":
        share = torch.bincount(ids.flatten().to(inputs.device), minlength=len(inputs)).double()
        share /= share.sum()
        used = share.nonzero().squeeze(1)
        return cls(share, share[used] @ inputs[used].double())

    def covariance(self, inputs: Float[Tensor, "V I"]) -> Float[Tensor, "I I"]:
        used = self.share.nonzero().squeeze(1)
        centred = inputs[used].double() - self.mean
        return (centred * self.share[used].unsqueeze(1)).T @ centred

    def standard(self, values: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
        """The standard scores of a value for each token id, over this text."""
        mean = self.share @ values
        deviation = (self.share @ (values - mean) ** 2).sqrt()
        return (values - mean) / deviation.clamp_min(1e-9)


class ContextEvidence(Modifier):
    """A prior for every token; subclasses say what a token is worth for an expert.

    Alone, each token takes its best expert at weight 1. As "ROUTER+NAME" it is added to that
    router's scores, whose settings stay. Background text, unless given as token ids, is sampled
    from the base.
    """

    defaults = {"top_k": 1, "scale": "unit"}
    usual_strength: ClassVar[float]  # beside PHATGOOSE's scores; docs/study.md
    # Whether a token of the prompt also knows the rest of it. The prompt is what `generate` was
    # given, or the first forward with a KV cache; what comes after knows what was read before it.
    # So a prefix that other prompts share is a prompt of its own.
    ahead: ClassVar[bool] = False

    def __init__(
        self,
        inner: Router | None = None,
        *,
        strength: float | None = None,
        background: Int[Tensor, "B L"] | None = None,
    ) -> None:
        super().__init__(inner)
        if inner is not None:  # its scores stay what they are
            self.standardises = inner.standardises  # type: ignore[misc]  # likewise
        self.strength = self.usual_strength if strength is None else strength
        self.readers: list[str] = []  # the base's linear modules that read the first input
        self.background: Background | None = None
        self._worth: dict[str, Float[Tensor, " V"]] = {}  # of every token id, by expert
        self._ids = background
        self._table: tuple[tuple[str, ...], Tensor] = ((), torch.empty(0))

    @property
    def has_prior(self) -> bool:
        return True

    @property
    def weighs_ids(self) -> bool:
        return self.inner is None or not self.inner.has_prior

    @property
    def prepares_on(self) -> Literal["nothing", "first layer", "base"]:
        nothing = self.inner is None or self.inner.prepares_on == "nothing"
        return "first layer" if nothing else "base"

    def take_background(self, ids: Int[Tensor, "B L"]) -> None:
        super().take_background(ids)
        self._ids = ids

    @abstractmethod
    def require(self, expert: Expert) -> None:
        """Raise MissingGateError where the expert lacks what `weigh` needs."""

    @abstractmethod
    def weigh(
        self, experts: Sequence[Expert], inputs: Float[Tensor, "V I"], background: Background
    ) -> Float[Tensor, "E V"]:
        """What each token id is worth for each expert, given what the first module reads for it."""

    def prepare(self, model: Any, experts: Sequence[Expert]) -> None:
        super().prepare(model, experts)
        if getattr(model.config, "is_encoder_decoder", False):
            raise ConfigError(
                f"{self.name}: the model is an encoder-decoder, whose decoder does not read the "
                "prompt. Use another router."
            )
        self.readers = self.readers or first_readers(model)
        for expert in experts:
            self.require(expert)
        inputs = token_inputs(model, model.get_input_embeddings().weight.shape[0])
        if self.background is None:
            ids = written_by(model) if self._ids is None else self._ids
            self.background = Background.measure(inputs, ids)
        worth = self.weigh(experts, inputs, self.background).float()
        self._worth.update((expert.name, row) for expert, row in zip(experts, worth, strict=True))
        self._table = ((), torch.empty(0))  # a name may stand for another expert now

    def signature(self, expert: Expert, module: str) -> Float[Tensor, " W"]:
        return torch.zeros(1) if self.inner is None else self.inner.signature(expert, module)

    def score(
        self, x: Float[Tensor, "T I"], signatures: Float[Tensor, "E W"]
    ) -> Float[Tensor, "T E"]:
        if self.inner is None:
            return x.new_zeros(len(x), len(signatures), dtype=torch.float32)
        return self.inner.score(x, signatures)

    def worth(self, experts: Sequence[Expert]) -> Float[Tensor, "V E"]:
        return torch.stack([self._worth[expert.name] for expert in experts], dim=1)

    def prior(self, context: TokenContext, experts: list[Expert]) -> Float[Tensor, "T E"]:
        worth = self._stacked(experts, context.real.device)
        prior = prior_of(worth, context, strength=self.strength, ahead=self.ahead, who=self.name)
        more = super().prior(context, experts)  # of another evidence inside
        return prior if more is None else prior + more

    def _stacked(self, experts: list[Expert], device: torch.device) -> Float[Tensor, "V E"]:
        """The worth of every token id for these experts, there."""
        names, table = tuple(expert.name for expert in experts), self._table
        if table[0] != names or table[1].device != device:
            table = self._table = (names, self.worth(experts).to(device))
        return table[1]


class PromptsEvidence(ContextEvidence):
    """How much the context reads like an expert's prompts, rather than like any text.

    A token t, read as x_t, is worth log p_z(t) - log p_0(t). Of the distributions over the
    vocabulary whose mean input is the mean prompt, p_z(t) ∝ exp(θ_z · x_t) is the most even
    one (`routers.entropy`); p_0 is that of background text, common to all experts, so that it does
    not decide between them but whether any is better than none (`null_score`).
    Needs of each expert its mean prompt, one vector (`phatgoose experts derive`).
    """

    usual_strength = 4.0
    needs = measures = "prompt_mean"
    instead = "adapter_evidence"

    @classmethod
    def measure(cls, given: Measuring) -> list[Vectors]:
        """Of what the first linear module reads of a token at position 0: the mean over prompts."""
        module = first_readers(given.model)[0]
        vocabulary = given.model.get_input_embeddings().weight.shape[0]
        inputs = token_inputs(given.model, vocabulary).cpu()
        found = []
        for expert in given.experts:
            ids = torch.tensor(given.prompts[expert.name], dtype=torch.long)
            if not len(ids):
                raise ConfigError(
                    f"{expert.name}: its examples have no prompts to take the mean of."
                )
            counts = torch.bincount(ids, minlength=vocabulary)
            used = counts.nonzero().squeeze(1)
            share = counts[used].double() / counts.sum()
            found.append({module: (share @ inputs[used].double()).float()})
        return found

    def require(self, expert: Expert) -> None:
        mean = self.kept(expert).get(self.readers[0])
        again = f"Measure it again: {KINDS[self.needs].remedy(expert.folder)}"
        if mean is None:
            raise MissingGateError(
                f"{expert.name}: has no mean prompt at {self.readers[0]}, which the base reads "
                f"first. {again}"
            )
        if not mean.isfinite().all():
            raise ExpertFormatError(
                f"{expert.name}: its mean prompt at {self.readers[0]} has values that are not "
                f"finite. {again}"
            )

    def weigh(
        self, experts: Sequence[Expert], inputs: Float[Tensor, "V I"], background: Background
    ) -> Float[Tensor, "E V"]:
        means = [self.kept(expert)[self.readers[0]].to(inputs.device) for expert in experts]
        stacked = torch.stack([background.mean, *means])
        found = most_even(inputs, stacked, background.covariance(inputs))
        return found[1:] - found[0]


class AdapterEvidence(ContextEvidence):
    """How much the context lies in an adapter's own input space: takes neither data nor training.

    With Q an orthonormal basis of the row spaces of the adapter's A at all modules that read the
    first input, an input x is worth z(‖Qᵀ (Σ + λI)^-½ (x - m)‖), z the standard score over
    background text. An adapter learns to read the directions in which its prompts differ from
    other text. Of DoRA, or of a LoRA with biases, it takes the low-rank product.
    """

    usual_strength = 8.0
    wants_background = True

    def require(self, expert: Expert) -> None:
        if not any(name in expert.modules and expert.modules[name].rank for name in self.readers):
            raise MissingGateError(
                f"{expert.name}: adapts none of the modules that read the embeddings "
                f"({', '.join(self.readers)}), so its weights do not tell which tokens it is for."
            )

    def weigh(
        self, experts: Sequence[Expert], inputs: Float[Tensor, "V I"], background: Background
    ) -> Float[Tensor, "E V"]:
        covariance = background.covariance(inputs)
        covariance.diagonal().add_(SHRINK * covariance.diagonal().mean())
        variances, axes = torch.linalg.eigh(covariance)
        whitening = (axes * variances**-0.5) @ axes.T
        centred = inputs - background.mean.float()
        return torch.stack(
            [background.standard(self._lengths(each, centred, whitening)) for each in experts]
        )

    def _lengths(
        self, expert: Expert, centred: Float[Tensor, "V I"], whitening: Float[Tensor, "I I"]
    ) -> Float[Tensor, " V"]:
        """How long each input is within the adapter's input space, once whitened."""
        found = [expert.modules[name] for name in self.readers if name in expert.modules]
        products = [LoraModule(delta.a, delta.b, delta.scale) for delta in found if delta.rank]
        spaces = torch.cat([right_singular(lora)[1] for lora in products]).to(centred.device)
        values, basis = torch.linalg.svd(spaces, full_matrices=False)[1:]
        basis = basis[values > 1e-9 * values.max()]
        projection = (basis @ whitening).float()
        norms: Tensor = (centred @ projection.T).norm(dim=1)
        return norms.double()


@final
class EvidenceRouter(PromptsEvidence):
    """Evidence from the experts' mean prompts, of the context so far."""

    name = "evidence"


@final
class PromptEvidenceRouter(PromptsEvidence):
    """Evidence from the experts' mean prompts, of the whole prompt."""

    name = "prompt_evidence"
    ahead = True


@final
class AdapterEvidenceRouter(AdapterEvidence):
    """Evidence from the adapters' weights, of the context so far."""

    name = "adapter_evidence"


@final
class AdapterPromptEvidenceRouter(AdapterEvidence):
    """Evidence from the adapters' weights, of the whole prompt."""

    name = "adapter_prompt_evidence"
    ahead = True
