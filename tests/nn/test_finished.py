"""Sequences that end early in a batch: what generate appends to them is padding, not tokens."""

import pytest
import torch

from phatgoose import record, route
from tests.models import PAD, make_batch
from tests.routers.counting import CountingRouter

END, OTHER = 9, 5


@pytest.fixture
def watched(model_and_pool):
    """watched(family): a routed model that knows an end, and the contexts of its forwards."""

    def make(family="llama"):
        model, pool = model_and_pool(family, 2)
        model.generation_config.eos_token_id = [END, 50]
        router = CountingRouter(strength=0.0)
        return route(model, pool, router), router.seen

    return make


def end_first_row(_, scores):
    """The first sequence ends at once, the others never do."""
    forced = torch.full_like(scores, -torch.inf)
    forced[0, END] = 0.0
    forced[1:, OTHER] = 0.0
    return forced


def generate(model, prompt, mask, **how):
    return model.generate(
        prompt, attention_mask=mask, max_new_tokens=4, logits_processor=[end_first_row], **how
    )


@pytest.mark.parametrize(
    "how",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 2}, {"cache_implementation": "static"}],
    ids=str,
)
def test_tokens_after_the_end_of_a_sequence_are_not_real(how, watched):
    model, seen = watched()
    prompt = torch.tensor([[3, END, 4], [PAD, 6, 7]])  # an end inside a prompt ends nothing
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    out = generate(model, prompt, mask, **how)
    assert out[0].tolist() == [3, END, 4, END, PAD, PAD, PAD]
    steps = [context for context in seen if context.real.shape[1] >= 3]
    for step, context in enumerate(steps):
        # The end itself is read once more, as a token; what follows it is not.
        first, second = [1, 1, 1, 1, 0, 0][: 3 + step], [0, 1, 1, 1, 1, 1][: 3 + step]
        assert context.real.int().tolist() == [first, second]
    assert len(steps) == 4


def test_they_are_not_recorded(watched):
    model, _ = watched()
    batch = make_batch(model, [3, 3])
    with record(model) as trace:
        generate(model, batch["input_ids"], batch["attention_mask"])
    table = trace.tokens["decoder"]
    assert table.sequence.bincount().tolist() == [4, 6]
    assert table.position[table.sequence == 1].tolist() == list(range(6))
    assert {len(experts) for experts in trace.experts.values()} == {10}


def test_an_end_before_a_cache_is_used_again_ends_nothing(watched):
    model, seen = watched()
    prompt, mask = torch.tensor([[3, 4]] * 2), torch.ones(2, 2, dtype=torch.long)
    first = generate(model, prompt, mask, return_dict_in_generate=True)
    again = torch.cat([first.sequences[1:], torch.tensor([[END, 8]])], 1)  # a second turn
    cache = first.past_key_values
    cache.batch_select_indices(torch.tensor([1]))
    seen.clear()
    model.generate(
        again,
        attention_mask=torch.ones_like(again),
        past_key_values=cache,
        max_new_tokens=3,
        eos_token_id=None,
    )
    assert [context.length for context in seen] == [3, 1, 1]
    assert all(bool(context.real.all()) for context in seen)


def test_the_end_of_an_encoder_decoder(watched):
    model, seen = watched("t5")
    batch = make_batch(model, [4, 2])
    generate(model, batch["input_ids"], batch["attention_mask"])
    decoder = [context for context in seen if context.real.shape[1] < 4 or context.length == 1]
    wanted = [[1], [1, 1], [1, 1, 0], [1, 1, 0, 0]]
    assert [context.real[0].int().tolist() for context in decoder] == wanted
    assert all(bool(context.real[1].all()) for context in decoder)
