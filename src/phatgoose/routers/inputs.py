"""What a base's linear modules read, found by running it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from phatgoose.errors import ConfigError
from phatgoose.experts.base import linear_modules

ROWS, LENGTH = 64, 64  # of text that a base writes itself
_written: WeakKeyDictionary[nn.Module, dict[tuple[int, int], Tensor]] = WeakKeyDictionary()


def first_readers(model: nn.Module) -> list[str]:
    """Names of the linear modules that read what the first of a forward reads, in its order."""
    return _first_input(model, torch.zeros(1, 1, dtype=torch.long))[0]


def token_inputs(model: nn.Module, tokens: int) -> Float[Tensor, "V I"]:
    """What the first linear module reads for each token id below `tokens`, at position 0, fp32.

    On the model's device where that is a GPU with fp64, else on the CPU.
    """
    ids = torch.arange(tokens).unsqueeze(1)
    inputs = torch.cat([_first_input(model, part)[1].float() for part in ids.split(4096)])
    return inputs if inputs.is_cuda else inputs.cpu()


def written_by(model: Any, *, rows: int = ROWS, length: int = LENGTH) -> Int[Tensor, "B L"]:
    """Text as the base itself would write it, sampled with a seed of its own: generic background.

    A model writes once and is remembered. The state of torch's random generators stays as it was.
    """
    if (rows, length) in _written.setdefault(model, {}):
        return _written[model][rows, length]
    end = getattr(model.generation_config, "eos_token_id", None)
    begin = getattr(model.generation_config, "bos_token_id", None)
    first = begin if begin is not None else end[0] if isinstance(end, list) else end or 0
    start = torch.full((rows, 1), first, device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(0)
        written = model.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=first,
        )
    _written[model][rows, length] = written[:, 1:].cpu()
    return _written[model][rows, length]


def read_by(
    model: nn.Module,
    ids: Int[Tensor, "B L"],
    modules: Sequence[str],
    seen: Callable[[str, Tensor], None],
) -> None:
    """Run the model over text and call `seen(module, input)` for each of its modules named.

    An encoder-decoder reads the text as its encoder's and as its decoder's.
    """
    device = next(model.parameters()).device
    extra = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    with watching(model, modules, seen), torch.no_grad():
        for part in ids.to(device).split(8):
            model(input_ids=part, **({"decoder_input_ids": part} if extra else {}))


class _Reached(Exception):
    """What the first linear modules read is known; the rest of the forward is not wanted."""


def _first_input(
    model: nn.Module, ids: Int[Tensor, "B 1"]
) -> tuple[list[str], Float[Tensor, "B I"]]:
    """What the first linear module reads, and the names of all that read this very tensor."""
    names: list[str] = []
    inputs: list[Tensor] = []

    def look(name: str, x: Tensor) -> None:
        if inputs and x is not inputs[0]:
            raise _Reached
        names.append(name)
        inputs.append(x)

    device = next(model.parameters()).device
    watched = watching(model, list(linear_modules(model)), look)
    with torch.no_grad(), suppress(_Reached), watched:
        model(input_ids=ids.to(device))
    if not inputs:
        raise ConfigError("the model has no linear module that a forward reaches.")
    return names, inputs[0].reshape(len(ids), -1)


@contextmanager
def watching(
    model: nn.Module, modules: Sequence[str], seen: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `seen(name, input)` for each of these modules, before it runs.

    Of an embedding it is what comes out, without what experts add: ids are no vectors.
    """
    handles = []
    for name in modules:
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            handle = module.register_forward_hook(
                lambda _, __, output, name=name: seen(name, output), prepend=True
            )
        else:
            handle = module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen(name, inputs[0])
            )
        handles.append(handle)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
