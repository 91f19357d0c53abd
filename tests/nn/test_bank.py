"""A bank holds what was put in, through any additions, removals and casts."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from phatgoose.experts import LoraModule
from phatgoose.nn import Bank

IN, OUT = 5, 3

# True: the next expert adapts this layer; False: it adapts others only; a number: remove that one.
CHANGES = st.lists(st.one_of(st.booleans(), st.integers(0, 6)), max_size=14)


def make_bank(dtype=torch.float32):
    return Bank(IN, OUT, device=torch.device("cpu"), dtype=dtype)


def make_lora(seed, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    rank = 1 + seed % 4
    a, b = torch.randn(rank, IN, generator=random), torch.randn(OUT, rank, generator=random)
    return LoraModule(a.to(dtype), b.to(dtype), scale=0.5 + seed)


def make_signature(seed):
    return torch.randn(IN, generator=torch.Generator().manual_seed(1000 + seed))


def assert_holds(bank, seeds):
    """The bank's slots are these experts, in this order, with nothing left in longer ranks."""
    assert len(bank) == len(seeds)
    for slot, seed in enumerate(seeds):
        lora = make_lora(seed)
        assert torch.equal(bank.signatures[slot], make_signature(seed))
        assert torch.equal(bank.a[slot, : lora.rank], lora.a)
        assert torch.equal(bank.b[slot, :, : lora.rank], lora.b * lora.scale)
        assert not torch.any(bank.a[slot, lora.rank :])
        assert not torch.any(bank.b[slot, :, lora.rank :])


@given(CHANGES)
def test_any_additions_and_removals(changes):
    bank, pool = make_bank(), []  # the pool: a seed, and whether that expert is in this bank
    for seed, change in enumerate(changes):
        if isinstance(change, bool):
            if change:
                bank.append(len(pool), make_signature(seed), make_lora(seed))
            pool.append((seed, change))
        elif change < len(pool):
            bank.remove(change)
            del pool[change]
        assert bank.members == [place for place, (_, here) in enumerate(pool) if here]
        assert_holds(bank, [seed for seed, here in pool if here])


def test_room_reserved_beforehand_is_used():
    bank = make_bank()
    bank.reserve(3, 4)
    buffers = [buffer.data_ptr() for buffer in bank.buffers()]
    for seed in range(3):
        bank.append(seed, make_signature(seed), make_lora(seed))
    assert [buffer.data_ptr() for buffer in bank.buffers()] == buffers
    assert_holds(bank, [0, 1, 2])


def test_growing_keeps_what_is_there_and_takes_spare_room():
    bank = make_bank()
    sizes = set()
    for seed in range(20):
        bank.append(seed, make_signature(seed), make_lora(seed))
        sizes.add(bank.a.shape[0])
    assert_holds(bank, range(20))
    assert len(sizes) <= 6  # doubling: copied a few times, not at each addition


def test_matrices_of_another_dtype_are_cast_after_scaling():
    bank = make_bank(torch.bfloat16)
    lora = make_lora(2, torch.float16)
    bank.append(0, make_signature(2), lora)
    assert bank.b.dtype == bank.a.dtype == torch.bfloat16
    assert bank.signatures.dtype == torch.float32
    assert torch.equal(bank.b[0], (lora.b.float() * lora.scale).bfloat16())


def test_a_cast_model_keeps_fp32_signatures():
    model = nn.Linear(IN, OUT)
    model.add_module("bank", bank := make_bank())
    bank.append(0, make_signature(0), make_lora(0))
    for cast in (model.half, model.bfloat16, model.double, lambda: model.to(torch.float16)):
        cast()
        assert bank.a.dtype == bank.b.dtype == model.weight.dtype
        assert bank.signatures.dtype == torch.float32
        assert torch.equal(bank.signatures[0], make_signature(0))
        bank.append(len(bank), make_signature(1), make_lora(1))
        assert bank.signatures.dtype == torch.float32
    model.to("meta")
    assert {buffer.device.type for buffer in bank.buffers()} == {"meta"}


def test_nothing_is_saved_or_trained():
    bank = make_bank()
    bank.append(0, make_signature(0), make_lora(0))
    assert not bank.state_dict()
    assert not list(bank.parameters())
