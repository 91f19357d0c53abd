"""Other ways to route tokens among LoRA experts, to compare with.

PEFT's Arrow and an ordinary PEFT LoRA are the real ones, put on a model without going through
files. The others are restatements: the same operations in the same order, without the training,
logging and bookkeeping around them, so they are no slower than what they restate. Each is a
function of one layer's input that gives what is added to that layer's output; `attach` hooks it
onto the layer.

All score in fp32 and weigh as published, so that they choose the same experts as phatgoose does
and do the same work; only Arrow scores by something else.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-5
Peer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Factors:
    """The experts of one layer. `b` already carries each expert's scale."""

    gates: Float[Tensor, "E I"]  # fp32, as trained
    a: Float[Tensor, "E R I"]
    b: Float[Tensor, "E O R"]

    def __len__(self) -> int:
        return len(self.gates)

    @property
    def rank(self) -> int:
        return self.a.shape[1]


def standardised(values: Tensor) -> Tensor:
    return F.layer_norm(values.float(), values.shape[-1:], eps=EPS)


def chosen(
    x: Float[Tensor, "T I"], factors: Factors, top_k: int
) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"]]:
    """The published routing, in the plainest words: experts of each token and their weights."""
    scores = standardised(x) @ standardised(factors.gates).T / math.sqrt(x.shape[-1])
    kept, experts = scores.topk(top_k, dim=-1)
    return experts, kept.softmax(dim=-1)


def exact(
    x: Float[Tensor, "T I"], factors: Factors, top_k: int
) -> tuple[Float[Tensor, "T O"], Float[Tensor, " T"]]:
    """The routed sum in fp64, and by how much each token's choice was no tie.

    The second is the gap between the last score kept and the first one left out.
    """
    scores = standardised(x) @ standardised(factors.gates).T / math.sqrt(x.shape[-1])
    kept, experts = scores.topk(min(top_k + 1, len(factors)), dim=-1)
    gap = kept[:, top_k - 1] - kept[:, top_k] if kept.shape[1] > top_k else kept[:, 0] * 0 + 1
    weights = kept[:, :top_k].softmax(dim=-1).double()
    y = torch.zeros(len(x), factors.b.shape[1], dtype=torch.float64, device=x.device)
    for expert in experts[:, :top_k].unique().tolist():
        tokens, place = (experts[:, :top_k] == expert).nonzero(as_tuple=True)
        z = x[tokens].double() @ factors.a[expert].double().T
        y.index_add_(
            0, tokens, z @ factors.b[expert].double().T * weights[tokens, place].unsqueeze(-1)
        )
    return y, gap


class RThree:
    """github.com/r-three/phatgoose, src/models/addons/moe.py: Router and FFNExperts, as evaluated.

    Every forward stacks the experts' separate gates and factors, takes a softmax over all experts,
    keeps the top k of it and divides by their sum. The kept weights go into a zero [T, E]; its
    non-zeros, sorted by expert, say which rows to gather. Two products for every expert of the
    pool in a Python loop, also for those that no token chose; the outputs are put together, weighed
    and added up by token. The sizes of the parts are fetched from the device.
    """

    def __init__(self, factors: Factors, top_k: int) -> None:
        self.gates = list(factors.gates.unbind())
        self.first = [a.T.contiguous() for a in factors.a]  # [I R]
        self.second = [b.T.contiguous() for b in factors.b]  # [R O]
        self.top_k = top_k

    def __call__(self, x: Float[Tensor, "B L I"]) -> Float[Tensor, "B L O"]:
        width = x.shape[-1]
        gates = standardised(torch.stack(self.gates))
        everyone = (standardised(x) @ gates.T * math.sqrt(1 / width)).softmax(dim=-1)
        first, second = torch.stack(self.first), torch.stack(self.second)
        tokens, everyone = x.reshape(-1, width), everyone.reshape(-1, len(gates))
        kept, experts = everyone.topk(self.top_k, dim=-1)
        kept = kept / (kept.sum(dim=-1, keepdim=True) + 1e-6)
        weights = torch.zeros_like(everyone).scatter(1, experts, kept).to(x.dtype)
        pairs = weights.nonzero()
        by_expert, order = pairs.sort(0)
        rows = pairs[order[:, 1], 0]
        sizes = (weights > 0).sum(0).tolist()
        weight = weights[rows].gather(1, by_expert[:, 1:])
        parts = tokens[rows].split(sizes)
        hidden = [part @ first[expert] for expert, part in enumerate(parts)]
        outputs = [part @ second[expert] for expert, part in enumerate(hidden)]
        stitched = torch.cat(outputs) * weight
        y = stitched.new_zeros(len(tokens), second.shape[-1]).index_add(0, rows, stitched)
        return y.view(*x.shape[:-1], -1) * 1.0  # the authors' scale is common to all experts


class Mttl:
    """github.com/microsoft/mttl, mttl/models: PerTokenSelector with PhatgooseSelector's settings
    (top 2, both norms over the features, merge after) and LoRAExpertContainer.route.

    Scores in fp32, top k, then softmax. The distinct chosen experts' factors are looked up one by
    one and stacked; the weights are scattered into [B, L, distinct], and two einsums compute every
    distinct expert's output for every token before they weigh them.
    """

    def __init__(self, factors: Factors, top_k: int) -> None:
        self.gates = factors.gates
        self.first = [a.T.contiguous() for a in factors.a]  # [I R]
        self.second = [b.T.contiguous() for b in factors.b]  # [R O]
        self.top_k = top_k

    def __call__(self, x: Float[Tensor, "B L I"]) -> Float[Tensor, "B L O"]:
        scores = F.linear(standardised(x), standardised(self.gates)) / math.sqrt(x.shape[-1])
        kept, experts = scores.topk(self.top_k, dim=-1)
        distinct, place = experts.unique(return_inverse=True)
        numbers = [int(expert) for expert in distinct]
        first = torch.stack([self.first[expert] for expert in numbers])[None, :, None]
        second = torch.stack([self.second[expert] for expert in numbers])[None, :, :, None]
        weights = kept.new_zeros(*kept.shape[:-1], len(numbers))
        weights = weights.scatter_add(-1, place, kept.softmax(dim=-1)).to(x.dtype).unsqueeze(2)
        z = torch.einsum("bld,beqdr->bleqr", x, first)
        return torch.einsum("bleqr,berqd,blqe->blqd", z, second, weights).flatten(2)


class Dense:
    """Every expert's output for every token, [T, E, O], and their weighted sum."""

    def __init__(self, factors: Factors, top_k: int) -> None:
        self.factors = factors
        self.top_k = top_k

    def __call__(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        tokens = x.reshape(-1, x.shape[-1])
        experts, kept = chosen(tokens, self.factors, self.top_k)
        weights = tokens.new_zeros(len(tokens), len(self.factors))
        weights = weights.scatter(1, experts, kept.to(weights.dtype))
        z = torch.einsum("eri,ti->ter", self.factors.a, tokens)
        outputs = torch.einsum("eor,ter->teo", self.factors.b, z)
        return torch.einsum("teo,te->to", outputs, weights).view(*x.shape[:-1], -1)


class OneLora:
    """One ordinary LoRA as PEFT computes it, for machines without PEFT."""

    def __init__(self, a: Float[Tensor, "R I"], b: Float[Tensor, "O R"]) -> None:
        self.a, self.b = a, b

    def __call__(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        return F.linear(F.linear(x, self.a), self.b) * 1.0


def attach(layer: nn.Module, peer: Peer) -> Any:
    """Add what `peer` makes of a layer's input to its output, from now on; returns the handle."""
    return layer.register_forward_hook(lambda _, inputs, output: output + peer(inputs[0]))


# ---------------------------------------------------------------- PEFT


# The weights are replaced at once, so none need be made; and they keep the model's dtype.
ADDING = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False}


def has_peft() -> bool:
    try:
        import peft  # noqa: F401
    except ImportError:
        return False
    return True


def peft_lora(model: nn.Module, factors: Mapping[str, Factors], expert: int = 0) -> nn.Module:
    """`model` with one expert as an ordinary PEFT LoRA."""
    from peft import get_peft_model

    adapted = get_peft_model(model, _config(factors), **ADDING)
    for layer, mine in _layers(adapted, factors):
        _fill(layer, "default", mine, expert)
    return adapted.eval().requires_grad_(False)


def peft_arrow(model: nn.Module, factors: Mapping[str, Factors], top_k: int) -> nn.Module:
    """`model` with PEFT's Arrow among all experts.

    What peft.create_arrow_model does, with adapters from memory instead of from folders. Arrow
    scores by the top right singular vector of each expert's B A, so it chooses other experts than
    gates do; the work is the same for any choice, since it computes every expert for every token.
    """
    from peft import ArrowConfig, LoraConfig, get_peft_model

    count = len(next(iter(factors.values())))
    names = [f"task_{expert}" for expert in range(count)]
    adapted = get_peft_model(model, _config(factors), adapter_name=names[0], **ADDING)
    for name in names[1:]:
        adapted.add_adapter(name, _config(factors), **ADDING)
    for layer, mine in _layers(adapted, factors):
        for expert, name in enumerate(names):
            _fill(layer, name, mine, expert)
    arrow = ArrowConfig(top_k=top_k, rng_seed=0)
    arrow.task_adapter_names, arrow.gks_adapter_names = names, []
    router = LoraConfig(
        arrow_config=arrow,
        r=next(iter(factors.values())).rank,
        target_modules=_config(factors).target_modules,
    )
    adapted.add_adapter("arrow_router", router, autocast_adapter_dtype=False)
    adapted.set_adapter("arrow_router")
    return adapted.eval().requires_grad_(False)


def _config(factors: Mapping[str, Factors]) -> Any:
    from peft import LoraConfig

    rank = next(iter(factors.values())).rank
    return LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(factors), init_lora_weights=False
    )


def _layers(adapted: nn.Module, factors: Mapping[str, Factors]) -> list[tuple[Any, Factors]]:
    base = adapted.get_base_model()
    return [(base.get_submodule(name), mine) for name, mine in factors.items()]


def _fill(layer: Any, name: str, factors: Factors, expert: int) -> None:
    for half, weight in ((layer.lora_A, factors.a), (layer.lora_B, factors.b)):
        half[name].weight = nn.Parameter(weight[expert].clone(), requires_grad=False)
