"""Putting a pool into a model that vLLM has loaded."""

import copy
import hashlib
import json
import logging
from typing import Any

import torch
from torch import Tensor, nn

from phatgoose.errors import ConfigError, IncompatibleExpertError, RoutingError, first_line
from phatgoose.experts import Expert, LoraModule, identify_base
from phatgoose.experts.sources import expert_sources
from phatgoose.experts.verify import check_modules
from phatgoose.nn import Bank
from phatgoose.pool import ExpertPool
from phatgoose.serve import layers
from phatgoose.serve.layers import Layers, Part
from phatgoose.serve.method import BANK, RoutedMethod
from phatgoose.serve.settings import ServeSettings, served_router

log = logging.getLogger(__name__)

Piece = tuple[int, Part, LoraModule, Tensor]  # the expert's number in the pool, where, and what


def load_pool(model_config: Any, settings: ServeSettings) -> ExpertPool:
    """The experts, all of which are for the base that vLLM is about to load.

    Raises what `route` and `load_expert` raise.
    """
    pool = ExpertPool.load(expert_sources(settings.experts))
    wanted = settings.routing.kept(len(pool))
    if wanted > len(pool):
        raise RoutingError(
            f"phatgoose: top_k is {wanted}, the pool has {len(pool)} experts. Choose top_k of at "
            f"most {len(pool)}, or add experts."
        )
    base = skeleton(model_config)
    for expert in pool:
        check_base(expert, base, model_config.model)
    return pool


def attach(model: nn.Module, pool: ExpertPool, settings: ServeSettings) -> str:
    """Route the layers that the pool's experts adapt; return a hash of the shapes that came of it.

    `model` is this rank's. Raises MissingGateError, and RoutingError where vLLM has no layer that
    can be routed; nothing is changed then.
    """
    pieces = _pieces(Layers(model), pool, settings)
    made = {}
    for name, mine in pieces.items():
        made[name] = _bank(model.get_submodule(name), mine, settings)
    for name, bank in made.items():
        layer: Any = model.get_submodule(name)
        layer.add_module(BANK, bank)
        layer.quant_method = RoutedMethod(
            layer.quant_method, bank, settings.routing, features=layer.input_size
        )
        layer.requires_unquantized_input = True  # nobody may quantise what the gates read
    log.info("routing %d layers among %s", len(made), ", ".join(pool.names))
    return _hash({name: _shapes(bank) for name, bank in made.items()})


def skeleton(model_config: Any) -> nn.Module:
    """The base as transformers has it, without weights, to tell which experts were made for it."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model_config.hf_config)  # transformers notes in it what it chose
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises many kinds
        raise RoutingError(
            f"{model_config.model}: transformers has no causal language model for it "
            f"({first_line(error)}), so its experts cannot be checked."
        ) from error
    return model


def check_base(expert: Expert, base: nn.Module, name: str) -> None:
    """Raise IncompatibleExpertError unless the expert was made for this base."""
    difference = expert.base and expert.base.difference(identify_base(base, name=name))
    if difference:
        raise IncompatibleExpertError(
            f"{expert.name}: was made for another base than {name}: {difference}."
        )
    for problem in check_modules(expert, base):
        raise IncompatibleExpertError(problem)


def _pieces(found: Layers, pool: ExpertPool, settings: ServeSettings) -> dict[str, list[Piece]]:
    """By layer of this rank, its share of the experts that adapt it, in the pool's order."""
    router = served_router(settings.router)
    pieces: dict[str, list[Piece]] = {}
    for member, expert in enumerate(pool):
        for module, lora in expert.modules.items():
            signature = router.signature(expert, module)
            part = found.find(module, expert.name)
            if part is not None:
                pieces.setdefault(part.layer, []).append((member, part, lora, signature))
    return pieces


def _bank(layer: Any, pieces: list[Piece], settings: ServeSettings) -> Bank:
    """A bank of this layer's parts, filled with this rank's share of the experts."""
    parts = pieces[0][1].parts
    experts: dict[int, dict[int, tuple[Tensor, LoraModule]]] = {}
    totals: dict[int, dict[int, Tensor]] = {}
    for member, part, lora, signature in pieces:
        share, mine = layers.share_of(layer, part, lora, signature)
        experts.setdefault(member, {})[part.number] = (mine, share)
        totals.setdefault(member, {})[part.number] = signature.sum()
    rank = max(lora.rank for _, _, lora, _ in pieces)
    room = (settings.capacity or len(experts), settings.max_rank or rank)
    for found, most, key in ((len(experts), room[0], "capacity"), (rank, room[1], "max_rank")):
        if found > most:
            raise ConfigError(f"phatgoose: {key} is {most}, {pieces[0][1].layer} needs {found}.")
    bank = Bank(
        layers.input_size(layer),
        layers.output_sizes(layer, parts),
        device=_device(layer),
        dtype=layer.params_dtype,
        backend=settings.routing.backend,
    )
    bank.reserve(*room)
    for slot, (member, adapted) in enumerate(experts.items()):
        bank.append(member, adapted)
        # Of the whole signature: a rank that holds a share of it needs the sum for its scores.
        for number, total in totals[member].items():
            bank.sums[number, slot] = total
    return bank


def _device(layer: nn.Module) -> torch.device:
    tensors = [*layer.parameters(), *layer.buffers()]
    return tensors[0].device if tensors else torch.get_default_device()


def _shapes(bank: Bank) -> list[Any]:
    return [sorted((name, list(b.shape), str(b.dtype)) for name, b in bank.named_buffers())]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
