"""Evidence over the context: its table from the formula, and the same however a text is read."""

from dataclasses import replace

import pytest
import torch

from phatgoose import ExpertPool, record, route, unroute
from phatgoose.errors import ConfigError, ExpertFormatError, MissingGateError
from phatgoose.experts import adapter_hash, identify_base
from phatgoose.experts.signatures import Signatures
from phatgoose.routers import (
    AdapterEvidenceRouter,
    EvidenceRouter,
    PhatgooseRouter,
    entropy,
    make_router,
)
from phatgoose.routers.entropy import PENALTY, most_even
from phatgoose.routers.evidence import SHRINK
from tests.models import VOCABULARY, make_batch, make_model, save_experts, take_row
from tests.tolerances import assert_near

FIRST = "model.layers.0.self_attn.q_proj"


def with_prompts(model, pool, first=FIRST):
    """The pool with a mean prompt for each expert."""
    width = model.get_submodule(first).weight.shape[-1]
    experts = []
    for number, expert in enumerate(pool):
        random = torch.Generator().manual_seed(number)
        mean = 0.3 * torch.randn(width, generator=random)
        found = Signatures(
            "prompt_mean", {first: mean}, identify_base(model), adapter_hash(expert.modules)
        )
        experts.append(
            type(expert)(
                expert.name, expert.modules, expert.gates, None, signatures={"prompt_mean": found}
            )
        )
    return ExpertPool(experts)


@pytest.fixture
def prompted(model_and_pool):
    model, pool = model_and_pool("llama", 4)
    return model, with_prompts(model, pool)


def newton(x, mean):
    """log p of the penalised maximum-entropy fit, by Newton's method on its objective."""
    penalty = PENALTY * x.var(0, correction=0).mean()

    def objective(theta):
        return (x @ theta).logsumexp(0) - theta @ mean + penalty / 2 * theta @ theta

    theta = torch.zeros_like(mean)
    for _ in range(60):
        p = (x @ theta).softmax(0)
        gradient = p @ x - mean + penalty * theta
        hessian = torch.cov(x.T, aweights=p, correction=0) + penalty * torch.eye(len(mean))
        step, size = torch.linalg.solve(hessian, gradient), 1.0
        while objective(theta - size * step) > objective(theta) + 1e-12 and size > 1e-9:  # rounding
            size /= 2
        theta = theta - size * step
        if gradient.norm() < 1e-10:
            return (x @ theta).log_softmax(0)
    raise AssertionError("the reference found nothing")


def test_the_table_is_the_log_likelihood_ratio(prompted):
    model, pool = prompted
    background = torch.randint(1, VOCABULARY, (8, 40))
    router = EvidenceRouter(background=background)
    router.prepare(model, pool.experts)
    norm = model.model.layers[0].input_layernorm
    x = norm(model.get_input_embeddings().weight).detach().double()
    plain = newton(x, x[background.flatten()].mean(0))
    for expert in pool:
        at = expert.signatures["prompt_mean"].vectors[FIRST].double()
        assert_near(router.worth([expert])[:, 0], newton(x, at) - plain, 1e-4)


def test_many_distributions_in_parts_are_those_alone(monkeypatch):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(90, 12, generator=random)
    means = torch.stack([x[torch.randperm(90, generator=random)[:20]].mean(0) for _ in range(7)])
    wanted = torch.stack([newton(x.double(), mean.double()) for mean in means])
    metric = torch.cov(x.double().T)
    assert_near(most_even(x, means, metric), wanted, 1e-4)
    assert_near(most_even(x, means, torch.eye(12).double()), wanted, 1e-4)
    monkeypatch.setattr(entropy, "TOKENS", 32)
    monkeypatch.setattr(entropy, "FITTED", 3)
    assert_near(most_even(x, means, metric), wanted, 1e-4)
    assert_near(most_even(x, means[4:5], metric), wanted[4:5], 1e-4)


def test_a_mean_that_no_text_has_is_refused(prompted, monkeypatch):
    model, pool = prompted
    monkeypatch.setattr(entropy, "STEPS", 1)
    with pytest.raises(ConfigError, match=r"5 of 5 distributions.*experts derive"):
        route(model, pool, "evidence")
    pool["e1"].signatures["prompt_mean"].vectors[FIRST].fill_(float("nan"))
    with pytest.raises(ExpertFormatError, match=r"e1: its mean prompt.*experts derive"):
        route(model, pool, "evidence")


def test_an_adapter_s_own_space_is_evidence_without_data(prompted):
    model, pool = prompted
    background = torch.randint(1, VOCABULARY, (8, 40))
    router = AdapterEvidenceRouter(background=background)
    router.prepare(model, pool.experts)
    norm = model.model.layers[0].input_layernorm
    x = norm(model.get_input_embeddings().weight).detach().double()
    text = x[background.flatten()]
    covariance = torch.cov(text.T, correction=0)
    covariance += SHRINK * covariance.diagonal().mean() * torch.eye(len(covariance))
    values, axes = torch.linalg.eigh(covariance)
    white = (x - text.mean(0)) @ axes @ (values**-0.5).diag() @ axes.T
    for expert in pool:
        rows = [lora.a for name, lora in expert.modules.items() if name in router.readers]
        basis = torch.linalg.qr(torch.cat(rows).double().T).Q
        lengths = (white @ basis).norm(dim=1)
        seen = lengths[background.flatten()]
        wanted = (lengths - seen.mean()) / seen.std(correction=0)
        assert_near(router.worth([expert])[:, 0], wanted, 1e-4)


def test_an_adapter_that_reads_no_embeddings_is_refused(tmp_path):
    model = make_model("llama")
    pool = ExpertPool.load(save_experts(tmp_path, model, [("down_proj",), ("q_proj",)]))
    with pytest.raises(MissingGateError, match=r"e0: adapts none of.*q_proj"):
        route(model, pool, "adapter_evidence")


@pytest.mark.parametrize("name", ["evidence", "phatgoose+evidence", "arrow+adapter_evidence"])
def test_alone_is_batched_and_prefill_is_decode(name, prompted):
    model, pool = prompted
    route(model, pool, name)
    batch = make_batch(model, [6, 9, 4])
    with record(model) as together:
        logits = model(**batch).logits
    alone = take_row(batch, 1)
    with record(model) as single:
        wanted = model(**alone).logits
    assert_near(logits[1], wanted[0], 1e-5)
    rows = together.tokens["decoder"].sequence == 1
    for module in single.experts:
        assert torch.equal(together.experts[module][rows], single.experts[module])
    cache, parts = None, []
    for token in range(9):
        output = model(
            input_ids=alone["input_ids"][:, token : token + 1],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        parts.append(output.logits)
    assert_near(torch.cat(parts, 1), wanted, 1e-5)
    unroute(model)


def test_the_prior_is_the_mean_over_the_context_and_the_same_everywhere(prompted):
    model, pool = prompted
    router = EvidenceRouter(strength=3.0)
    route(model, pool, router)
    batch = make_batch(model, [5])
    with record(model) as trace:
        model(**batch)
    worth = router.worth(pool.experts)
    seen = worth[batch["input_ids"][0]].cumsum(0) / torch.arange(1, 6).unsqueeze(1)
    assert trace.experts[FIRST][:, 0].tolist() == seen.argmax(1).tolist()
    assert (trace.weights[FIRST] == 1).all()


@pytest.mark.parametrize("name", ["prompt_evidence", "phatgoose+adapter_prompt_evidence"])
def test_a_prompt_may_be_known_ahead(name, prompted):
    model, pool = prompted
    router = make_router(name)
    route(model, pool, router)
    worth = router.worth(pool.experts).double()
    batch = make_batch(model, [6, 9, 4], side="right")
    seen = []
    original = router.prior
    router.prior = lambda *given: seen.append(original(*given)) or seen[-1]
    output = model(**batch, use_cache=True)
    for row, length in enumerate([6, 9, 4]):
        mean = worth[batch["input_ids"][row, :length]].mean(0)
        found = seen[0].view(3, 9, -1)[row]
        assert_near(found, router.strength * mean.expand_as(found), 1e-5)
    alone = take_row(batch, 2)
    assert_near(model(**alone).logits[0], output.logits[2, :4], 1e-5)
    # What is generated adds to it.
    seen.clear()
    first = model(**take_row(batch, 1), use_cache=True)
    model(input_ids=torch.tensor([[7]]), past_key_values=first.past_key_values)
    ids = [*batch["input_ids"][1].tolist(), 7]
    assert_near(seen[-1][0], router.strength * worth[torch.tensor(ids)].mean(0), 1e-5)


def test_it_is_added_to_another_router_s_scores(prompted):
    model, pool = prompted
    batch = make_batch(model, [7])
    route(model, pool)
    with record(model) as plain:
        wanted = model(**batch).logits
    unroute(model)
    route(model, pool, EvidenceRouter(PhatgooseRouter(), strength=0.0))
    with record(model) as none:
        assert_near(model(**batch).logits, wanted, 1e-5)
    assert torch.equal(plain.experts[FIRST], none.experts[FIRST])
    unroute(model)
    route(model, pool, EvidenceRouter(PhatgooseRouter(), strength=1e4), top_k=1)
    with record(model) as strong:
        model(**batch)
    unroute(model)
    route(model, pool, "evidence")
    with record(model) as alone:
        model(**batch)
    assert torch.equal(strong.experts[FIRST], alone.experts[FIRST])


def test_an_expert_joins_a_live_model(prompted):
    model, pool = prompted
    late = pool["e3"]
    pool.remove("e3")
    route(model, pool, "phatgoose+evidence")
    pool.add(late)
    batch = make_batch(model, [5])
    found = model(**batch).logits
    unroute(model)
    route(model, pool, "phatgoose+evidence")
    assert_near(model(**batch).logits, found, 1e-5)


def test_another_expert_of_the_same_name(prompted):
    model, pool = prompted
    route(model, pool, "evidence")
    batch = make_batch(model, [5])
    model(**batch)
    first, last = pool["e0"], pool["e3"]
    pool.remove("e3")
    pool.add(
        replace(
            last,
            signatures=first.signatures
            | {
                "prompt_mean": replace(
                    first.signatures["prompt_mean"], adapter=adapter_hash(last.modules)
                )
            },
        )
    )
    found = model(**batch).logits
    unroute(model)
    route(model, pool, "evidence")
    assert torch.equal(model(**batch).logits, found)


def test_what_it_needs_is_said(model_and_pool):
    model, pool = model_and_pool("llama", 3)
    with pytest.raises(MissingGateError, match=r"e0: has no mean prompt.*experts derive"):
        route(model, pool, "evidence")
    assert not model._forward_pre_hooks  # nothing is left behind
    seq2seq, pool = model_and_pool("t5", 3)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        route(seq2seq, pool, "phatgoose+evidence")


def test_embeddings_cannot_be_looked_up(prompted):
    model, pool = prompted
    route(model, pool, make_router("evidence"))
    with pytest.raises(ConfigError, match="needs the ids.*given as embeddings"):
        model(inputs_embeds=torch.randn(1, 3, 24))


def test_gpt2_s_table_has_the_first_position():
    from phatgoose.routers.inputs import first_readers, token_inputs

    model = make_model("gpt2")
    assert first_readers(model) == ["transformer.h.0.attn.c_attn"]
    readers = ["q_proj", "k_proj", "v_proj"]
    assert first_readers(make_model("llama")) == [f"model.layers.0.self_attn.{n}" for n in readers]
    weights = model.transformer
    wanted = weights.h[0].ln_1(weights.wte.weight + weights.wpe.weight[0])
    assert_near(token_inputs(model, VOCABULARY), wanted.detach(), 1e-6)
