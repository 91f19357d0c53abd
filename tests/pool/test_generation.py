"""A routed model in generate, with beams and in pipelines; the trace matches the tokens."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LogitsProcessor, PreTrainedTokenizerFast, pipeline

from phatgoose import record, restrict, route, unroute
from tests.models import DECODERS, PAD, VOCABULARY, make_batch, take_row
from tests.routers.counting import CountingRouter
from tests.tolerances import TOLERANCE, assert_near

NEAR = TOLERANCE[torch.float32].output
HOWS = [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 0}]
ROUTERS = {"phatgoose": lambda: "phatgoose", "counting": CountingRouter}


class Listener(LogitsProcessor):
    """Keeps what generate saw at each step: the whole sequences, and log-probabilities."""

    def __init__(self):
        self.steps = []

    def __call__(self, input_ids, scores):
        self.steps.append((input_ids.clone(), scores.log_softmax(-1)))
        return scores


def prompts(batch):
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def whole(model, batch, ids):
    """The inputs of one forward over the sequences `ids`, decoded after `batch`; and their mask."""
    beams = len(ids) // len(batch["input_ids"])
    source = {key: value.repeat_interleave(beams, 0) for key, value in prompts(batch).items()}
    if model.config.is_encoder_decoder:
        return {**source, "decoder_input_ids": ids}, torch.ones_like(ids)
    mask = source["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, mask


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("how", HOWS, ids=["greedy", "beams", "sampling"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_each_step_is_one_forward_over_all_so_far(family, how, router, model_and_pool):
    torch.manual_seed(0)
    model, pool = model_and_pool(family)
    batch = make_batch(model, [4, 7, 1])
    route(model, pool, ROUTERS[router]())
    listener = Listener()
    with record(model) as trace:
        model.generate(**prompts(batch), max_new_tokens=5, logits_processor=[listener], **how)
    table, start = trace.tokens["decoder"], 0
    for ids, scores in listener.steps:
        inputs, mask = whole(model, batch, ids)
        with torch.no_grad(), record(model) as full:
            logits = model(**inputs).logits[:, -1]
        assert_near(scores, logits.log_softmax(-1), NEAR)
        real = mask.flatten().bool()
        new = torch.arange(len(real)) % ids.shape[1] == ids.shape[1] - 1  # each sequence's last
        new = new[real] if start else torch.ones_like(real)[real]  # the first step reads all
        now = slice(start, start := start + int(new.sum()))
        whole_table = full.tokens["decoder"]
        for column in ("ids", "sequence", "position"):
            assert torch.equal(getattr(table, column)[now], getattr(whole_table, column)[new])
        for site, stream in full.streams.items():
            if stream == "decoder":
                assert torch.equal(trace.experts[site][now], full.experts[site][new])
                found, wanted = trace.weights[site][now], full.weights[site][new]
                assert_near(found, wanted, TOLERANCE[torch.float32].delta)
            elif stream == "cross":  # the encoder's states are read once, for every beam
                assert torch.equal(trace.experts[site], full.experts[site])
    assert len(table.ids) == start


def test_the_prior_of_these_tests_matters(model_and_pool):
    model, pool = model_and_pool()
    batch = make_batch(model, [4, 7])
    logits = []
    for strength in (0.0, 0.5):
        route(model, pool, CountingRouter(strength))
        logits.append(model(**batch).logits)
        unroute(model)
    assert not torch.allclose(*logits, rtol=0.01)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", DECODERS)
def test_prefill_is_decoding_token_by_token(family, router, model_and_pool):
    model, pool = model_and_pool(family)
    batch = make_batch(model, [4, 7, 1])
    route(model, pool, ROUTERS[router]())
    with torch.no_grad(), record(model) as prefill:
        wanted = model(**batch).logits
    cache, steps = None, []
    with torch.no_grad(), record(model) as decode:
        for place in range(7):
            out = model(
                input_ids=batch["input_ids"][:, place : place + 1],
                attention_mask=batch["attention_mask"][:, : place + 1],
                position_ids=batch["position_ids"][:, place : place + 1],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            steps.append(out.logits)
    assert_same_by_token(prefill, decode)
    real = batch["attention_mask"].bool()
    assert_near(torch.cat(steps, 1)[real], wanted[real], NEAR)


@pytest.mark.parametrize("router", ROUTERS)
def test_prefill_is_decoding_token_by_token_in_an_encoder_decoder(router, model_and_pool):
    model, pool = model_and_pool("t5")
    batch = {**make_batch(model, [4, 7]), "decoder_input_ids": torch.tensor([[0, 5, 9], [0, 7, 7]])}
    del batch["decoder_attention_mask"]
    route(model, pool, ROUTERS[router]())
    with torch.no_grad(), record(model) as prefill:
        wanted = model(**batch).logits
    source, target = prompts(batch), batch["decoder_input_ids"]
    cache, steps = None, []
    with torch.no_grad(), record(model) as decode:
        states = model.get_encoder()(**source)
        for place in range(3):
            out = model(
                encoder_outputs=states,
                attention_mask=source["attention_mask"],
                decoder_input_ids=target[:, place : place + 1],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            steps.append(out.logits)
    assert_same_by_token(prefill, decode)
    assert_near(torch.cat(steps, 1), wanted, NEAR)


def assert_same_by_token(one, other):
    """The same routing of each token of each sequence, in whatever order they were seen."""
    assert set(one.experts) == set(other.experts)
    for module, stream in one.streams.items():
        assert other.streams[module] == stream
        found = []
        for trace in (one, other):
            table = trace.tokens[stream]
            order = (table.sequence * 1000 + table.position).argsort()
            found.append(
                (table.ids[order], trace.experts[module][order], trace.weights[module][order])
            )
        for values in zip(*(sides[:2] for sides in found), strict=True):
            assert torch.equal(*values), module
        assert_near(found[0][2], found[1][2], TOLERANCE[torch.float32].delta)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "t5"])
def test_a_padded_batch_generates_what_its_prompts_do_alone(family, how, model_and_pool):
    model, pool = model_and_pool(family)
    batch = prompts(make_batch(model, [4, 7, 1]))
    route(model, pool)
    together = model.generate(**batch, max_new_tokens=6, **how)
    for row in range(3):
        alone = model.generate(**take_row(batch, row), max_new_tokens=6, **how)
        assert together[row, -6:].tolist() == alone[0, -6:].tolist()


@pytest.mark.parametrize("how", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("router", ROUTERS)
def test_any_cache_or_none_generates_the_same(router, how, model_and_pool):
    model, pool = model_and_pool()
    batch = prompts(make_batch(model, [4, 7, 1]))
    route(model, pool, ROUTERS[router]())
    wanted = model.generate(**batch, max_new_tokens=6)
    assert torch.equal(model.generate(**batch, max_new_tokens=6, **how), wanted)


def test_generation_follows_restrictions(model_and_pool):
    model, pool = model_and_pool()
    batch = prompts(make_batch(model, [4, 7]))
    base = model.generate(**batch, max_new_tokens=8)
    route(model, pool)
    routed = model.generate(**batch, max_new_tokens=8)
    with restrict(model, []):
        assert torch.equal(model.generate(**batch, max_new_tokens=8), base)
    assert not torch.equal(routed, base)
    assert torch.equal(unroute(model).generate(**batch, max_new_tokens=8), base)


@pytest.fixture
def tokenizer():
    """Words w1, w2 and so on are the ids 1, 2 and so on."""
    words = {"<pad>": PAD, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    words_only = Tokenizer(WordLevel(words, unk_token="<pad>"))
    words_only.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words_only, pad_token="<pad>", padding_side="left"
    )


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_text_generation_pipeline(batch_size, tokenizer, model_and_pool):
    model, pool = model_and_pool()
    texts = ["w5 w6 w7", "w8", "w3 w3"]
    run = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")

    def complete():
        how = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
        answers = run(texts, batch_size=batch_size, **how)
        return [
            answer[0]["generated_text"].strip() for answer in answers
        ]  # some versions put a space first

    base = complete()
    route(model, pool)
    wanted = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=5)[0, -5:]
        wanted.append(tokenizer.decode(new, skip_special_tokens=True))
    with record(model) as trace:
        assert complete() == wanted
    assert wanted != base
    assert len(trace.tokens["decoder"].ids) == 6 + 3 * 4  # the last new token is never read
    assert complete() == wanted
    unroute(model)
    assert complete() == base
