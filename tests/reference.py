"""What routing means, once more: a slow float64 model written from the paper's formulas.

arXiv:2402.05859, section 3.2. Nothing of phatgoose is used here, not even to read an expert's
files, so the two can only agree by both being right.
"""

import copy
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass
class Adapter:
    """One expert at one layer."""

    a: Tensor  # [R I]
    b: Tensor  # [O R]
    scale: float
    gate: Tensor  # [I]


class Reference:
    """A float64 copy of `model` that routes every token, one at a time, among expert folders.

    `chosen[module]` and `weights[module]` collect a list per token, in the order they came. Calling
    it gives logits without a graph; `model` itself can be differentiated.
    """

    def __init__(self, model: nn.Module, folders: list[Path], top_k: int = 2) -> None:
        self.model = copy.deepcopy(model).double()
        # The products of a mixture's experts that transformers groups take no float64.
        self.model.config._experts_implementation = "eager"
        self.top_k = top_k
        self.experts = [read_folder(folder) for folder in folders]
        self.chosen: dict[str, list[list[int]]] = defaultdict(list)
        self.weights: dict[str, list[list[float]]] = defaultdict(list)
        for name, layer in self.model.named_modules():
            if any(name in expert for expert in self.experts):
                layer.register_forward_hook(
                    lambda _, inputs, output, name=name: output + self.delta(name, inputs[0])
                )

    def __call__(self, **inputs: Tensor) -> Tensor:
        """The model's logits."""
        self.chosen.clear()
        self.weights.clear()
        with torch.no_grad():
            return self.model(**inputs).logits

    def delta(self, module: str, x: Tensor) -> Tensor:
        """What the chosen experts add to the output of `module` for input `x` [..., I]."""
        rows = [self._token(module, u) for u in x.reshape(-1, x.shape[-1])]
        return torch.stack(rows).reshape(*x.shape[:-1], -1)

    def _token(self, module: str, u: Tensor) -> Tensor:
        scores = {
            index: standardise(expert[module].gate) @ standardise(u) / math.sqrt(len(u))
            for index, expert in enumerate(self.experts)
            if module in expert
        }
        kept = sorted(scores, key=lambda index: (-scores[index].item(), index))[: self.top_k]
        powers = [torch.exp(scores[index] - scores[kept[0]]) for index in kept]
        weights = [power / sum(powers) for power in powers]
        self.chosen[module].append(kept)
        self.weights[module].append([weight.item() for weight in weights])
        total = 0.0
        for index, weight in zip(kept, weights, strict=True):
            expert = self.experts[index][module]
            total = total + weight * expert.scale * (expert.b @ (expert.a @ u))
        return total


def standardise(v: Tensor) -> Tensor:
    """Zero mean and unit variance over the features, population variance, eps 1e-5."""
    centred = v - v.mean()
    return centred / torch.sqrt((centred**2).mean() + 1e-5)


def read_folder(folder: Path) -> dict[str, Adapter]:
    """A PEFT LoRA folder with gates beside it, by the module's name in the base."""
    config = json.loads((folder / "adapter_config.json").read_text())
    matrices = load_file(folder / "adapter_model.safetensors")
    gates = load_file(folder / "phatgoose_gates.safetensors")
    adapters = {}
    for module, gate in gates.items():
        a = matrices[f"base_model.model.{module}.lora_A.weight"].double()
        b = matrices[f"base_model.model.{module}.lora_B.weight"].double()
        rank = by_pattern(config["rank_pattern"], module, config["r"])
        alpha = by_pattern(config["alpha_pattern"], module, config["lora_alpha"])
        assert a.shape[0] == rank
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        adapters[module] = Adapter(a, b, scale, gate.double())
    assert 2 * len(adapters) == len(matrices)
    return adapters


def by_pattern(patterns: dict[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the module's name or its last parts."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
