"""A router sees which tokens it routes: their ids, positions and what came before."""

import copy
import inspect
import pickle

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, LogitsProcessor

from phatgoose import record, route, unroute
from phatgoose.errors import RoutingError
from phatgoose.types import TokenContext
from tests.models import PAD, make_batch
from tests.routers.counting import CountingRouter
from tests.versions import guesses_without_end

TEXT = ("input_ids", "attention_mask")
# transformers 5.24 renamed it.
PARAMETERS = inspect.signature(LlamaForCausalLM.forward).parameters
CACHE = "cache" if "cache" in PARAMETERS else "past_key_values"


@pytest.fixture
def watched(model_and_pool):
    """watched(family): a routed model, and the list of the contexts its forwards had."""

    def make(family="llama"):
        model, pool = model_and_pool(family, 2)
        router = CountingRouter(strength=0.0)
        make.pool, make.router = pool, router
        return route(model, pool, router), router.seen

    return make


class Listener(LogitsProcessor):
    """Keeps the whole sequences that each step of generate scored."""

    def __init__(self):
        self.steps = []

    def __call__(self, input_ids, scores):
        self.steps.append(input_ids.clone())
        return scores


def text(batch):
    return {key: batch[key] for key in TEXT}


def assert_context(context, ids, real, length):
    real = real.bool()
    assert context.length == length
    assert (context.ids is None) == (ids is None)
    assert ids is None or torch.equal(context.ids, ids)
    assert torch.equal(context.real, real)
    assert context.batch == len(real)
    assert torch.equal(context.new_real(), real[:, -length:])
    if ids is not None:
        assert torch.equal(context.new_ids(), ids[:, -length:])
    for row, flags in enumerate(real.tolist()):
        found = context.positions()[row].tolist()
        wanted = [sum(flags[:place]) for place in range(len(flags))][-length:]
        new = flags[-length:]
        assert [p for p, r in zip(found, new, strict=True) if r] == [
            p for p, r in zip(wanted, new, strict=True) if r
        ]


def assert_generated(seen, steps, mask):
    """One context per step: the sequences so far, real as `mask` says and all new tokens."""
    assert len(seen) == len(steps)
    past = 0
    for context, ids in zip(seen, steps, strict=True):
        new = torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=torch.bool)
        real = torch.cat([mask.bool().repeat_interleave(len(ids) // len(mask), 0), new], 1)
        assert_context(context, ids, real, ids.shape[1] - past)
        past = ids.shape[1]


def test_positions_count_real_tokens():
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 0, 1]], dtype=torch.bool)
    context = TokenContext(length=3, ids=None, real=real)
    assert context.positions().tolist() == [[0, 1, 2], [1, 1, 2]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_plain_forward(family, side, watched):
    model, seen = watched(family)
    batch = make_batch(model, [4, 7, 1], side=side)
    model(**batch)
    model(batch["input_ids"])  # no mask: every token counts
    model(inputs_embeds=model.get_input_embeddings()(batch["input_ids"]))
    assert len(seen) == 3
    assert_context(seen[0], batch["input_ids"], batch["attention_mask"], 7)
    assert_context(seen[1], batch["input_ids"], torch.ones(3, 7), 7)
    assert_context(seen[2], None, torch.ones(3, 7), 7)


def test_a_training_forward_has_a_context_too(watched):
    model, seen = watched()
    batch = make_batch(model, [4, 7], side="right")
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert_context(seen[0], batch["input_ids"], batch["attention_mask"], 7)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"do_sample": True},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"num_beams": 3},
        {"num_beams": 3, "do_sample": True},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generate(family, how, watched):
    model, seen = watched(family)
    batch = make_batch(model, [4, 7, 1])
    listener = Listener()
    model.generate(**text(batch), max_new_tokens=4, logits_processor=[listener], **how)
    steps, mask = listener.steps, batch["attention_mask"]
    if "prefill_chunk_size" in how:
        for context, end in zip(seen, (3, 6), strict=False):
            assert_context(context, batch["input_ids"][:, :end], mask[:, :end], 3)
        assert_context(seen[2], batch["input_ids"], mask, 1)
        seen[:3] = [TokenContext(length=7, ids=seen[2].ids, real=seen[2].real)]
    if "num_beams" in how:  # beams did swap rows, or this shows nothing
        assert any(
            not torch.equal(late[:, :-1], early)
            for early, late in zip(steps, steps[1:], strict=False)
        )
    assert_generated(seen, steps, mask)


def test_generate_without_a_cache(watched):
    model, seen = watched()
    batch = make_batch(model, [4, 7])
    out = model.generate(**text(batch), max_new_tokens=3, use_cache=False)
    for step, context in enumerate(seen):
        new = torch.ones(2, step, dtype=torch.long)
        real = torch.cat([batch["attention_mask"], new], 1)
        assert_context(context, out[:, : 7 + step], real, 7 + step)


@guesses_without_end
def test_generate_that_guesses_ahead(watched):
    model, seen = watched()
    prompt = torch.tensor([[5, 6, 7, 8, 5, 6, 7]])
    out = model.generate(prompt, max_new_tokens=6, prompt_lookup_num_tokens=3)
    assert any(context.length not in (1, 7) for context in seen)  # it did guess
    for context in seen:
        start = context.ids.shape[1] - context.length
        agreed = min(start + 1, out.shape[1])
        assert torch.equal(context.ids[:, :agreed], out[:, :agreed])


def test_generate_from_embeddings(watched):
    model, seen = watched()
    batch = make_batch(model, [4, 7])
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    mask = batch["attention_mask"]
    model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=3)
    for step, context in enumerate(seen):
        real = torch.cat([mask, torch.ones(2, step, dtype=torch.long)], 1)
        assert_context(context, None, real, 1 if step else 7)


def test_generate_goes_on_from_a_cache(watched):
    model, seen = watched()
    batch = text(make_batch(model, [4, 7]))
    first = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True)
    seen.clear()
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
    listener = Listener()
    model.generate(
        first.sequences,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        max_new_tokens=2,
        logits_processor=[listener],
    )
    assert [context.length for context in seen] == [1, 1]
    for context, ids in zip(seen, listener.steps, strict=True):
        new = torch.ones(2, ids.shape[1] - 10, dtype=torch.long)
        assert_context(context, ids, torch.cat([mask, new], 1), 1)


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("own_cache", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_loop_written_by_hand(family, own_cache, with_mask, watched):
    model, seen = watched(family)
    batch = make_batch(model, [6, 9])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache, start = DynamicCache(config=model.config) if own_cache else None, 0
    for end in (4, 5, 8, 9):
        known = with_mask or start == 0
        out = model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end] if known else None,
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        assert_context(seen[-1], ids[:, :end], mask[:, :end], end - start)
        start = end


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_cache_the_forward_need_not_give_back(family, watched):
    model, seen = watched(family)
    ids = make_batch(model, [6])["input_ids"]
    cache = DynamicCache(config=model.config)
    for start in (0, 3):
        model(ids[:, start : start + 3], past_key_values=cache, use_cache=False)
        assert_context(seen[-1], ids[:, : start + 3], torch.ones(1, start + 3), 3)


def test_two_loops_at_once(watched):
    model, seen = watched()
    texts = [make_batch(model, [5], seed=seed)["input_ids"] for seed in (1, 2)]
    caches = [model(ids[:, :3]).past_key_values for ids in texts]
    for end in (4, 5):
        for ids, cache in zip(texts, caches, strict=True):
            model(ids[:, end - 1 : end], past_key_values=cache)
            assert_context(seen[-1], ids[:, :end], torch.ones(1, end), 1)


def repickled(cache):
    return pickle.loads(pickle.dumps(cache))


def refilled(cache):
    cache.crop(-2)
    for layer in cache.layers:
        layer.update(torch.ones(2, 2, 2, 6), torch.ones(2, 2, 2, 6))


@pytest.mark.parametrize("crop", [0, 2])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, repickled])
def test_a_copied_or_cropped_cache_is_known(duplicate, crop, watched):
    model, seen = watched()
    batch = make_batch(model, [4, 6])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        cache = model(ids[:, :5], attention_mask=mask[:, :5]).past_key_values
        for mine in (duplicate(cache), duplicate(cache), cache):
            if crop:
                mine.crop(-crop)
            model(ids[:, 5 - crop :], past_key_values=mine)
            assert_context(seen[-1], ids, mask, 1 + crop)
            assert seen[-1].prompt_length == 5 - crop


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([0, 0])),
        refilled,
    ],
    ids=["reordered", "selected", "refilled"],
)
def test_ids_are_unknown_rather_than_wrong_after_rows_moved(change, watched):
    model, seen = watched()
    ids = make_batch(model, [6, 6])["input_ids"]
    cache = model(ids[:, :5]).past_key_values
    change(cache)
    model(ids[:, 5:], past_key_values=cache)
    assert_context(seen[-1], None, torch.ones(2, 6), 1)
    assert "changed since" in seen[-1].why


def test_a_forward_that_failed_leaves_its_cache_unknown(watched):
    model, seen = watched()
    ids = make_batch(model, [6])["input_ids"]
    cache = model(ids[:, :4]).past_key_values
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6]]), past_key_values=cache)
    model(ids[:, 4:], past_key_values=cache)
    assert_context(seen[-1], None, torch.ones(1, 6), 2)


def test_a_cache_filled_before_routing_has_unknown_ids(model_and_pool):
    model, pool = model_and_pool()
    ids = make_batch(model, [6])["input_ids"]
    cache = model(ids[:, :5]).past_key_values
    router = CountingRouter()
    route(model, pool, router)
    model(ids[:, 5:], past_key_values=cache)
    assert_context(router.seen[-1], None, torch.ones(1, 6), 1)


class OtherName(LlamaForCausalLM):
    """A model that takes its cache as transformers 5.23 or 5.24 do not name it."""

    def forward(self, input_ids=None, attention_mask=None, memory=None, **kwargs):
        kwargs[CACHE] = memory
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs["memory"] = inputs.pop(CACHE, None)
        return inputs


def test_a_cache_is_known_by_what_it_does(watched):
    model, seen = watched()
    batch = make_batch(model, [4, 7])
    wanted = model.generate(**text(batch), max_new_tokens=4)
    before = list(seen)
    seen.clear()
    unroute(model)
    model.__class__ = OtherName
    route(model, watched.pool, watched.router)
    assert torch.equal(model.generate(**text(batch), max_new_tokens=4), wanted)
    for context, same in zip(seen, before, strict=True):
        assert_context(context, same.ids, same.real, same.length)


class Hidden:
    """A cache that does not tell how long it is."""

    def __init__(self, cache):
        self.cache = cache


class HiddenCache(OtherName):
    def forward(self, input_ids=None, attention_mask=None, memory=None, **kwargs):
        return super().forward(input_ids, attention_mask, memory and memory.cache, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs["memory"] = Hidden(inputs["memory"])
        return inputs


def test_a_cache_that_cannot_be_read_is_refused(model_and_pool):
    model, pool = model_and_pool()
    model.__class__ = HiddenCache
    batch = text(make_batch(model, [4, 7]))
    route(model, pool)
    model.generate(**batch, max_new_tokens=3)  # nothing here asks what came before
    with pytest.raises(RoutingError, match="8 tokens so far, of which 1 are"), record(model):
        model.generate(**batch, max_new_tokens=3)
    route(unroute(model), pool, CountingRouter())
    with pytest.raises(RoutingError, match="8 tokens so far, of which 1 are"):
        model.generate(**batch, max_new_tokens=3)
    with pytest.raises(RoutingError, match="`mems` .list. is no KV cache"):
        model(batch["input_ids"], mems=[torch.zeros(2, 3)])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["t5", "t5-gated"])
def test_encoder_decoder_forward(family, side, watched):
    model, seen = watched(family)
    batch = make_batch(model, [4, 7, 1], side=side)
    model(**batch)
    assert len(seen) == 3  # one for each stream, however many layers ask
    encoder, decoder, cross = seen
    width = batch["decoder_input_ids"].shape[1]
    assert_context(encoder, batch["input_ids"], batch["attention_mask"], 7)
    assert_context(decoder, batch["decoder_input_ids"], batch["decoder_attention_mask"], width)
    assert_context(cross, batch["input_ids"], batch["attention_mask"], 7)


def test_encoder_decoder_from_labels_and_embeddings(watched):
    model, seen = watched("t5")
    batch = make_batch(model, [4, 7])
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    labels = batch["decoder_input_ids"]
    model(inputs_embeds=embeddings, labels=labels)
    encoder, decoder, cross = seen
    shifted = torch.cat([torch.full((2, 1), PAD), labels[:, :-1]], 1)
    assert_context(encoder, None, torch.ones(2, 7), 7)
    assert_context(decoder, shifted, torch.ones(labels.shape), labels.shape[1])
    assert_context(cross, None, torch.ones(2, 7), 7)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_encoder_decoder_generate(how, watched):
    model, seen = watched("t5")
    batch = make_batch(model, [4, 7, 1])
    listener = Listener()
    model.generate(**text(batch), max_new_tokens=4, logits_processor=[listener], **how)
    beams = how.get("num_beams", 1)
    encoder = seen.pop(0)
    assert_context(encoder, batch["input_ids"], batch["attention_mask"], 7)
    source, mask = (batch[key].repeat_interleave(beams, 0) for key in TEXT)
    crosses = [seen.pop(1)]
    if "use_cache" in how:  # without a cache every step looks at the encoder's states anew
        crosses += [seen.pop(place) for place in (2, 3, 4)]
        for context, ids in zip(seen, listener.steps, strict=True):
            assert_context(context, ids, torch.ones(ids.shape), ids.shape[1])
    else:
        assert_generated(seen, listener.steps, torch.ones(3 * beams, 1))
    for cross in crosses:
        assert_context(cross, source, mask, 7)


def test_encoder_decoder_generate_after_a_padded_decoder_prompt(watched):
    model, seen = watched("t5")
    batch = make_batch(model, [4, 7, 1])
    listener = Listener()
    model.generate(**batch, max_new_tokens=3, logits_processor=[listener])
    assert_generated([seen[1], *seen[3:]], listener.steps, batch["decoder_attention_mask"])


def test_encoder_decoder_loop_written_by_hand(watched):
    model, seen = watched("t5")
    batch = make_batch(model, [4, 7])
    encoded = model.get_encoder()(**text(batch))
    source = {"encoder_outputs": encoded, "attention_mask": batch["attention_mask"]}
    target, cache = make_batch(model, [5, 5], seed=3)["input_ids"], None
    seen.clear()
    for end in range(1, 6):
        out = model(decoder_input_ids=target[:, end - 1 : end], past_key_values=cache, **source)
        cache = out.past_key_values
        assert_context(seen[-1 if end > 1 else 0], target[:, :end], torch.ones(2, end), 1)
    assert_context(seen[1], batch["input_ids"], batch["attention_mask"], 7)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_states_of_an_earlier_encoder_forward_have_unknown_ids(rows, watched):
    model, seen = watched("t5")
    encoded = model.get_encoder()(make_batch(model, [7] * 2, seed=1)["input_ids"])
    model.get_encoder()(make_batch(model, [7] * rows, seed=2)["input_ids"])
    seen.clear()
    model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([[PAD], [PAD]]))
    assert_context(seen[1], None, torch.ones(2, 7), 7)


def test_no_context_outlives_its_forward(watched):
    model, seen = watched()
    with pytest.raises(IndexError):
        model(torch.tensor([[1, 10**6]]))
    with pytest.raises(RoutingError, match="CountingRouter has a prior.*Call the model itself"):
        model.model(torch.tensor([[1, 2]]))
    assert not seen
