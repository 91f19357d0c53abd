"""What gate training should compute, in float64 and from the formula alone."""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class GatedLinear(nn.Module):
    """W u + scale * B A u * sigmoid(v·u)."""

    def __init__(self, layer: nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        self.weight, self.bias = weight.detach(), getattr(layer, "bias", None)
        self.a, self.b, self.scale = a.detach().double(), b.detach().double(), scale
        self.v = nn.Parameter(torch.zeros(a.shape[1], dtype=torch.float64))

    def forward(self, u: Tensor) -> Tensor:
        delta = u @ self.a.T @ self.b.T
        gate = torch.sigmoid((u * self.v).sum(-1, keepdim=True))
        return F.linear(u, self.weight, self.bias) + self.scale * delta * gate


class Reference:
    """A float64 copy of a base whose adapted layers are gated."""

    def __init__(
        self, base: nn.Module, adapter: Mapping[str, tuple[Tensor, Tensor, float]]
    ) -> None:
        self.model = deepcopy(base).double().eval().requires_grad_(False)
        self.layers: dict[str, GatedLinear] = {}
        for name, (a, b, scale) in adapter.items():
            parent, _, child = name.rpartition(".")
            self.layers[name] = GatedLinear(self.model.get_submodule(name), a, b, scale)
            setattr(self.model.get_submodule(parent), child, self.layers[name])

    @property
    def gates(self) -> dict[str, nn.Parameter]:
        return {name: layer.v for name, layer in self.layers.items()}

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if self.model.config.is_encoder_decoder:
            start = torch.full_like(batch["labels"][:, :1], self.model.config.pad_token_id)
            before = batch["labels"][:, :-1].clamp_min(0)  # padding where there is no label
            inputs["decoder_input_ids"] = torch.cat([start, before], dim=1)
        return self.model(**inputs).logits

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean nats per token that has a label."""
        logits, labels = self.logits(batch), batch["labels"]
        if not self.model.config.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        kept = labels != -100
        picked = logits.log_softmax(-1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return -picked[kept].mean()

    def train(
        self,
        batches: list[Any],
        loss: Callable[[Any], Tensor],
        *,
        learning_rate: float,
        warmup: int,
        clip: float,
    ) -> None:
        """One AdamW step a batch, without weight decay; the rate rises over `warmup` steps."""
        mean = {name: torch.zeros_like(v) for name, v in self.gates.items()}
        square = {name: torch.zeros_like(v) for name, v in self.gates.items()}
        for step, batch in enumerate(batches, start=1):
            gradients = torch.autograd.grad(loss(batch), list(self.gates.values()))
            norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
            rate = learning_rate * min(1, step / warmup)
            for (name, v), gradient in zip(self.gates.items(), gradients, strict=True):
                gradient = gradient * min(1, clip / norm)
                mean[name] = 0.9 * mean[name] + 0.1 * gradient
                square[name] = 0.999 * square[name] + 0.001 * gradient**2
                first, second = mean[name] / (1 - 0.9**step), square[name] / (1 - 0.999**step)
                v.data -= rate * first / (second.sqrt() + 1e-8)
