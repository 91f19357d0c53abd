"""Puts a pool into a model that vLLM has loaded."""

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from phatgoose.errors import ConfigError, RoutingError, first_line
from phatgoose.experts import Expert, expert_sources, identify_base
from phatgoose.experts.bases import tell_bases
from phatgoose.experts.verify import check_range
from phatgoose.nn import Bank
from phatgoose.pool import ExpertPool
from phatgoose.serve.engine import layers
from phatgoose.serve.engine.layers import Layers
from phatgoose.serve.engine.method import BANK, PRIOR, ROWS, TALLY, TURN, RoutedMethod
from phatgoose.serve.pool.batch import Batch
from phatgoose.serve.pool.evidence import Evidence
from phatgoose.serve.pool.rows import RowTable
from phatgoose.serve.pool.settings import ServeSettings, served_router
from phatgoose.serve.pool.slots import Adapted, Slots, check_base, digest, write
from phatgoose.text import visible

log = logging.getLogger(__name__)


def load_pool(
    model_config: Any, settings: ServeSettings, *, grows: bool
) -> tuple[ExpertPool, nn.Module]:
    """Load the experts, check that they are for the base that vLLM is about to load, and return
    them with the base's skeleton.

    Raises what `route` and `load_expert` raise. A pool that grows may be empty.
    """
    if settings.background is not None:
        read_background(settings.background)  # here, to refuse it before anything large is loaded
    pool = ExpertPool.load(expert_sources(settings.experts))
    room = max(len(pool), settings.capacity or 0) if grows else len(pool)
    if not room:
        raise RoutingError("phatgoose: the pool is empty, and has no room. Name an expert.")
    settings.routing.note_size(room)
    base = skeleton(model_config)
    pool.rename_for(base)
    for expert in pool:
        check_base(expert, base, model_config.model)
        check_range(expert, model_config.dtype)
    tell_bases(pool, identify_base(base, name=model_config.model), same_base=settings.same_base)
    return pool, base


def attach(model: nn.Module, pool: ExpertPool, slots: Slots) -> None:
    """Route the layers that the pool's experts adapt, or that `targets` names.

    `model` is this rank's. Raises MissingGateError, ConfigError if there is no room for the pool,
    and RoutingError if vLLM has no layer that can be routed. Nothing has changed then.
    """
    settings = slots.settings
    by_expert = [slots.adapted(expert) for expert in pool]
    by_layer: dict[str, list[Adapted]] = {}
    for adapted in by_expert:
        for name, mine in adapted.items():
            by_layer.setdefault(name, []).extend(mine)
    parts = {name: mine[0][0].parts for name, mine in by_layer.items()}
    parts |= {place.layer: place.parts for place in Layers(model).named(settings.targets)}
    capacity = settings.capacity or len(pool)
    if len(pool) > capacity:
        raise ConfigError(f"phatgoose: capacity is {capacity}, the pool needs {len(pool)}.")
    longest = max((lora.rank for mine in by_layer.values() for _, lora, _ in mine), default=0)
    banks = {}
    for name, count in parts.items():
        rank = max((lora.rank for _, lora, _ in by_layer.get(name, [])), default=longest)
        if settings.max_rank and rank > settings.max_rank:
            raise ConfigError(f"phatgoose: max_rank is {settings.max_rank}, {name} needs {rank}.")
        layer: Any = model.get_submodule(name)
        banks[name] = _bank(layer, count, settings, gated=slots.gated)
        rank = settings.max_rank or rank
        banks[name].reserve(capacity, rank, slots.width(layer.input_size, rank))
    slices = [slots.slices(adapted) for adapted in by_expert]
    for slot in range(capacity):
        for name, bank in banks.items():
            write(bank, slot, slices[slot].get(name) if slot < len(pool) else None)
    slots.fill(banks, [slots.resident(expert) for expert in pool], capacity)
    turn = torch.zeros(1, device=_where(banks))
    for name, bank in banks.items():
        bank.register_buffer(TURN, turn, persistent=False)
        layer = model.get_submodule(name)
        layer.add_module(BANK, bank)
        layer.quant_method = RoutedMethod(
            layer.quant_method,
            bank,
            settings.routing,
            features=layer.input_size,
            router=None if slots.gated else settings.router,
        )
        layer.requires_unquantized_input = True  # nobody may quantise what the gates read
    names = visible(", ".join(pool.names)) or "no experts"
    log.info("routing %d layers among %s", len(banks), names)


def steer(slots: Slots, pool: ExpertPool, model_config: Any, tokens: int) -> Batch:
    """Give all banks a prior, and a tally and rows if wanted, for forwards of up to `tokens`."""
    device, settings = _where(slots.banks), slots.settings
    batch = Batch(tokens, len(slots.residents), device, routing=settings.record_routing)
    places = settings.mixture(len(slots.residents))
    if places:
        batch.own = RowTable(tokens, places, routing=settings.routing, device=device)
    for bank in slots.banks.values():
        for name, table in zip(ROWS, batch.own.rows, strict=True) if batch.own else ():
            bank.register_buffer(name, table, persistent=False)
        bank.register_buffer(PRIOR, batch.prior, persistent=False)
        if batch.usage is not None:
            bank.register_buffer(TALLY, batch.usage.tally, persistent=False)
    batch.names = slots.names
    slots.on_change = batch.rename
    if slots.router.weighs_ids:
        batch.evidence = read_contexts(slots, pool, model_config, batch)
    return batch


def read_contexts(slots: Slots, pool: ExpertPool, model_config: Any, batch: Batch) -> Evidence:
    """Weigh all token ids for the experts now, and for each expert that joins later.

    Evidence of prompts uses text only to tell what "no expert at all" is worth, which cancels out
    between experts. So without a file of text, every token id once will do.
    """
    device = batch.prior.device
    text = None
    if slots.settings.background is not None:
        text = background_ids(model_config, slots.settings.background)
        slots.background = digest(text.tolist())

    def weigh(experts: Sequence[Expert]) -> dict[str, Tensor]:
        first: Any = first_layer(model_config).to(device)
        count = first.get_input_embeddings().weight.shape[0]
        ids = torch.arange(count)[None] if text is None else text
        router = served_router(slots.settings.router)  # a new one: nothing of it stays
        router.take_background(ids)
        with torch.inference_mode(False):
            router.prepare(first, experts)
            worth = router.worth(experts).unbind(1)
        return {expert.name: column for expert, column in zip(experts, worth, strict=True)}

    worth = weigh(pool.experts) if len(pool) else {}
    tokens = len(next(iter(worth.values()))) if worth else model_config.get_vocab_size()
    evidence = Evidence(
        tokens,
        len(slots.residents),
        device,
        strength=slots.router.strength,
        ahead=slots.router.ahead,
        place=batch.there,
    )
    for slot, expert in enumerate(pool):
        evidence.put(slot, worth[expert.name])
    slots.weigh = lambda expert: weigh([expert])[expert.name]
    slots.on_worth = evidence.put
    return evidence


def read_background(path: str) -> str:
    """Read a file of text. Raises ConfigError if it cannot be read as text, or is empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"phatgoose: background: {path} cannot be read as text ({first_line(error)})."
        ) from error
    if not text.strip():
        raise ConfigError(f"phatgoose: background: {path} is empty. Give some thousand words.")
    return text


def background_ids(model_config: Any, path: str) -> Int[Tensor, "1 L"]:
    """Tokenise a file of text. Raises what `read_background` raises."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(
        model_config.tokenizer,
        revision=model_config.tokenizer_revision,
        trust_remote_code=model_config.trust_remote_code,
    )
    return torch.tensor([tokenizer(read_background(path), add_special_tokens=False).input_ids])


def first_layer(model_config: Any) -> nn.Module:
    """Load the transformers model cut to one layer.

    One layer is enough, because what its first module reads depends on the token id alone.
    Raises RoutingError if its weights cannot be read.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model_config.hf_config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            model_config.model,
            config=config,
            revision=model_config.revision,
            dtype=model_config.dtype,
            trust_remote_code=model_config.trust_remote_code,
        )
    except Exception as error:  # transformers raises many kinds
        raise RoutingError(
            f"{model_config.model}: transformers cannot read its first layer "
            f"({first_line(error)}), which evidence is taken from. Choose a router without."
        ) from error
    return model.eval()


def layout(slots: Slots) -> str:
    """Hash the shapes of all tensors that the layers read."""
    return digest({name: _shapes(bank) for name, bank in slots.banks.items()})


def skeleton(model_config: Any) -> nn.Module:
    """Make the base of transformers without weights, to tell which experts were made for it."""
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


def _bank(layer: Any, parts: int, settings: ServeSettings, *, gated: bool) -> Bank:
    return Bank(
        layers.input_size(layer),
        layers.output_sizes(layer, parts),
        device=_device(layer),
        dtype=layer.params_dtype,
        backend=settings.routing.backend,
        standardises=gated,
    )


def _where(banks: Mapping[str, Bank]) -> torch.device:
    return next((bank.a.device for bank in banks.values()), torch.get_default_device())


def _device(layer: nn.Module) -> torch.device:
    tensors = [*layer.parameters(), *layer.buffers()]
    return tensors[0].device if tensors else torch.get_default_device()


def _shapes(bank: Bank) -> list[Any]:
    return [sorted((name, list(b.shape), str(b.dtype)) for name, b in bank.named_buffers())]
