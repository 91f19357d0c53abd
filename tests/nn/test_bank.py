"""A bank holds what was put in, through any additions, removals and casts."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from phatgoose.experts import LoraModule
from phatgoose.nn import Bank

IN, OUT = 5, (3, 4)  # two layers that read the same input

# Which layers the next expert adapts (none: it adapts others only), or the number of one to remove.
CHANGES = st.lists(
    st.one_of(st.sampled_from([(), (0,), (1,), (0, 1)]), st.integers(0, 6)), max_size=14
)


def make_bank(dtype=torch.float32):
    return Bank(IN, OUT, device=torch.device("cpu"), dtype=dtype)


def make_lora(seed, part=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(10 * seed + part)
    rank = 1 + (seed + part) % 4
    a, b = torch.randn(rank, IN, generator=random), torch.randn(OUT[part], rank, generator=random)
    return LoraModule(a.to(dtype), b.to(dtype), scale=0.5 + seed)


def make_signature(seed, part=0):
    return torch.randn(IN, generator=torch.Generator().manual_seed(1000 + 10 * seed + part))


def add(bank, member, seed, parts=(0, 1), dtype=torch.float32):
    bank.append(member, {p: (make_signature(seed, p), make_lora(seed, p, dtype)) for p in parts})


def assert_holds(bank, held):
    """The bank's slots are these (seed, parts), in this order, with nothing in longer ranks."""
    assert len(bank) == len(held)
    wanted = torch.zeros(2, bank.capacity, dtype=torch.bool)
    for slot, (seed, parts) in enumerate(held):
        for part in parts:
            wanted[part, slot] = True
            lora = make_lora(seed, part)
            assert torch.equal(bank.signatures[part, slot], make_signature(seed, part))
            assert torch.equal(bank.a[part, slot, : lora.rank], lora.a)
            assert torch.equal(bank.b(part)[slot, :, : lora.rank], lora.b * lora.scale)
            assert not torch.any(bank.a[part, slot, lora.rank :])
            assert not torch.any(bank.b(part)[slot, :, lora.rank :])
    assert torch.equal(bank.present, wanted)
    assert torch.equal(bank.open, wanted)
    assert_derived(bank)


def assert_derived(bank):
    """What is kept beside the signatures says the same as they do."""
    if bank.pieces is not bank.signatures:
        bits = {torch.bfloat16: 16, torch.float16: 20}[bank.a.dtype]
        pieces = bank.halves().float().sum(0)
        torch.testing.assert_close(pieces, bank.signatures, rtol=2.0**-bits, atol=2.0**-22)
        assert bank.pieces.shape[0] % 64 == 0
    torch.testing.assert_close(bank.sums, bank.signatures.sum(-1), rtol=0, atol=1e-5)


@given(CHANGES)
def test_any_additions_and_removals(changes):
    bank, pool = make_bank(), []  # the pool: a seed, and which parts that expert adapts
    for seed, change in enumerate(changes):
        if isinstance(change, tuple):
            if change:
                add(bank, len(pool), seed, change)
            pool.append((seed, change))
        elif change < len(pool):
            bank.remove(change)
            del pool[change]
        assert bank.members == [place for place, (_, parts) in enumerate(pool) if parts]
        assert_holds(bank, [(seed, parts) for seed, parts in pool if parts])


def test_room_reserved_beforehand_is_used():
    bank = make_bank()
    bank.reserve(3, 4)
    buffers = [buffer.data_ptr() for buffer in bank.buffers()]
    for seed in range(3):
        add(bank, seed, seed)
    bank.remove(1)
    bank.allow(frozenset({0}))
    bank.allow(None)
    bank.trim(4)
    assert [buffer.data_ptr() for buffer in bank.buffers()] == buffers
    assert_holds(bank, [(0, (0, 1)), (2, (0, 1))])


@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([(), (0,), (1,), (0, 1)])), max_size=8)
)
def test_slots_that_change_hands(changes):
    bank, held = make_bank(), [(seed, (0, 1)) for seed in range(3)]
    bank.reserve(3, 4)
    for seed in range(3):
        add(bank, seed, seed)
    buffers = [buffer.data_ptr() for buffer in bank.buffers()]
    for seed, (slot, parts) in enumerate(changes, 3):
        bank.replace(slot, {p: (make_signature(seed, p), make_lora(seed, p)) for p in parts})
        held[slot] = (seed, parts)
        assert_holds(bank, held)
    assert [buffer.data_ptr() for buffer in bank.buffers()] == buffers


def test_growing_keeps_what_is_there_and_takes_spare_room():
    bank = make_bank()
    sizes = set()
    for seed in range(20):
        add(bank, seed, seed)
        sizes.add(bank.capacity)
    assert_holds(bank, [(seed, (0, 1)) for seed in range(20)])
    assert len(sizes) <= 6  # doubling: copied a few times, not at each addition


def test_trim_drops_ranks_nobody_has():
    bank = make_bank()
    for seed in range(3):  # ranks up to 4, at part 1 of the last
        add(bank, seed, seed)
    bank.remove(2)
    bank.trim()
    assert bank.a.shape[2] == bank.b(0).shape[2] == 3
    assert_holds(bank, [(0, (0, 1)), (1, (0, 1))])


def test_only_allowed_experts_are_open():
    bank = make_bank()
    for member, parts in enumerate([(0,), (0, 1), (1,)]):
        add(bank, member, member, parts)
    bank.allow(frozenset({0, 2}))
    assert bank.open[:, :3].tolist() == [[True, False, False], [False, False, True]]
    add(bank, 3, 3)  # not among the allowed
    assert not bank.open[:, 3].any()
    bank.allow(None)
    assert torch.equal(bank.open, bank.present)


def test_matrices_of_another_dtype_are_cast_after_scaling():
    bank = make_bank(torch.bfloat16)
    lora = make_lora(2, dtype=torch.float16)
    add(bank, 0, 2, dtype=torch.float16)
    assert bank.b(0).dtype == bank.a.dtype == torch.bfloat16
    assert bank.signatures.dtype == torch.float32
    assert torch.equal(bank.b(0)[0, :, : lora.rank], (lora.b.float() * lora.scale).bfloat16())


def test_a_cast_model_keeps_fp32_signatures():
    model = nn.Linear(IN, OUT[0])
    model.add_module("bank", bank := make_bank())
    add(bank, 0, 0)
    for cast in (model.half, model.bfloat16, model.double, lambda: model.to(torch.float16)):
        cast()
        assert bank.a.dtype == bank.b(1).dtype == model.weight.dtype
        assert bank.signatures.dtype == bank.sums.dtype == torch.float32
        assert torch.equal(bank.signatures[0, 0], make_signature(0))
        assert_derived(bank)
        add(bank, len(bank), 1)
        assert bank.signatures.dtype == torch.float32
        assert_derived(bank)
    model.to("meta")
    assert {buffer.device.type for buffer in bank.buffers()} == {"meta"}


def test_nothing_is_saved_or_trained():
    bank = make_bank()
    add(bank, 0, 0)
    assert not bank.state_dict()
    assert not list(bank.parameters())
