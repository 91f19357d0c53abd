"""Scores relative to those that each expert gives any text."""

from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from phatgoose.errors import ConfigError
from phatgoose.experts import Expert
from phatgoose.routers.base import Modifier, Router
from phatgoose.routers.inputs import read_by, written_by


@final
class ZScoreRouter(Modifier):
    """(score - mean) / standard deviation, both over background text, by expert and module.

    "seqr+zscore" is SEQR with its normalisation (arXiv:2509.18093). The background is sampled from
    the base, unless you give it as token ids.
    """

    name = "zscore"

    def __init__(
        self, inner: Router | None = None, *, background: Int[Tensor, "B L"] | None = None
    ) -> None:
        if inner is None:
            raise ConfigError('zscore modifies another router: name one, as in "seqr+zscore".')
        super().__init__(inner)
        self.inner: Router = inner
        self._background = background
        self._moments: dict[tuple[str, str], Tensor] = {}  # mean and deviation [2]

    def prepare(self, model: Any, experts: Sequence[Expert]) -> None:
        super().prepare(model, experts)
        if self._background is None:
            self._background = written_by(model)
        of_module: dict[str, list[Expert]] = {}
        for expert in experts:
            for module in expert.modules:
                of_module.setdefault(module, []).append(expert)
        device = model.device
        signatures = {
            module: pad_sequence(
                [self.inner.signature(expert, module) for expert in members], batch_first=True
            ).to(device)
            for module, members in of_module.items()
        }
        sums = {module: torch.zeros(3, len(found)) for module, found in signatures.items()}

        def seen(module: str, x: Tensor) -> None:
            scores = self.inner.score(x.flatten(0, -2), signatures[module]).double()
            part = torch.stack([torch.ones_like(scores).sum(0), scores.sum(0), (scores**2).sum(0)])
            sums[module] = sums[module] + part.cpu()

        read_by(model, self._background, list(of_module), seen)
        for module, (count, total, squares) in sums.items():
            mean = total / count
            deviation = (squares / count - mean**2).clamp_min(0).sqrt()
            if not bool(deviation.isfinite().all()):
                raise ConfigError(
                    f"{self.inner.name}+zscore: {self.inner.name} leaves experts out (scores of "
                    "-inf), so there is no mean to normalise by. Use seqr+zscore or another router."
                )
            for place, expert in enumerate(of_module[module]):
                found = torch.stack([mean[place], deviation[place]]).float()
                self._moments[expert.name, module] = found

    def signature(self, expert: Expert, module: str) -> Float[Tensor, " W"]:
        return torch.cat([self._moments[expert.name, module], self.inner.signature(expert, module)])

    def score(
        self, x: Float[Tensor, "T I"], signatures: Float[Tensor, "E W"]
    ) -> Float[Tensor, "T E"]:
        mean, deviation = signatures[:, 0], signatures[:, 1].clamp_min(1e-6)
        return (self.inner.score(x, signatures[:, 2:]) - mean) / deviation
