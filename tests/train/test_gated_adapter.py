"""The gated forward against its formula, what it refuses, and that it leaves no trace."""

import math
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

from phatgoose.errors import ConfigError, UnsupportedAdapterError, UntrainedAdapterError
from phatgoose.train.gated_adapter import GatedAdapter
from tests.tolerances import TOLERANCE, assert_near
from tests.train.reference import Reference
from tests.train.toys import (
    BASES,
    TARGETS,
    add_lora,
    gpt2,
    joined,
    llama,
    make,
    make_batch,
    opt,
    t5,
)

NEAR = TOLERANCE[torch.float32]
GRADIENT = 1e-4  # relative: a gate hears of the loss through all the layers above it
ROUNDING = 1e-6  # absolute: what fp32 leaves of a gradient that cancels out, or of a shut gate's


@st.composite
def adapters(draw):
    """A kind of base, and a LoRA config with the scale each target should have."""
    kind = draw(st.sampled_from(["llama", "gpt2", "t5"]))
    targets = draw(st.lists(st.sampled_from(TARGETS[kind]), min_size=1, unique=True))
    ranks, alphas = st.integers(1, 5), st.integers(1, 12)
    config = {
        "target_modules": targets,
        "r": draw(ranks),
        "lora_alpha": draw(alphas),
        "rank_pattern": draw(st.dictionaries(st.sampled_from(targets), ranks, max_size=2)),
        "alpha_pattern": draw(st.dictionaries(st.sampled_from(targets), alphas, max_size=2)),
        "use_rslora": draw(st.booleans()),
        "lora_dropout": draw(st.sampled_from([0.0, 0.5])),
    }
    scales = {}
    for target in targets:
        rank = config["rank_pattern"].get(target, config["r"])
        alpha = config["alpha_pattern"].get(target, config["lora_alpha"])
        scales[target] = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
    return kind, config, scales


def reference_of(base, peft_model, scales):
    """The reference for a PeftModel, from its matrices as PEFT names them and our own scales."""
    state = peft_model.state_dict()
    adapter = {}
    for name, _ in base.named_modules():
        scale = scales.get(name.rpartition(".")[2])
        if scale is not None:
            a, b = (state[f"base_model.model.{name}.lora_{x}.default.weight"] for x in "AB")
            adapter[name] = (a, b, scale)
    return Reference(base, adapter)


def reference_and(kind, *, lora=None, seed=0):
    """A PeftModel with all the usual targets, and its reference."""
    torch.manual_seed(seed)
    base = BASES[kind]()
    peft_model = add_lora(deepcopy(base), r=3, lora_alpha=6, **(lora or {}))
    return peft_model, reference_of(base, peft_model, dict.fromkeys(TARGETS[kind], 2.0))


@given(
    adapter=adapters(),
    lengths=st.lists(st.integers(3, 7), min_size=1, max_size=4),
    left=st.booleans(),
    gate_size=st.sampled_from([0.0, 0.5, 2.0]),
    seed=st.integers(0, 2**16),
)
def test_output_loss_and_gradients_are_those_of_the_formula(
    adapter, lengths, left, gate_size, seed
):
    kind, config, scales = adapter
    torch.manual_seed(seed)
    base = BASES[kind]()
    peft_model = add_lora(deepcopy(base), seed=seed, **config).train()
    reference = reference_of(base, peft_model, scales)
    batch = make_batch(kind, seed=seed, lengths=lengths, left=left)

    gated = GatedAdapter(peft_model)
    assert set(gated.gates) == set(reference.gates)
    for name, gate in gated.gates.items():
        assert gate.dtype == torch.float32 and not gate.any()
        gate.data.normal_(0, gate_size) if gate_size else None
        reference.gates[name].data.copy_(gate.data)
    with gated.installed():
        output = peft_model(**batch)
        output.loss.backward()
    wanted = reference.loss(batch)
    wanted.backward()

    real = torch.ones_like(batch["labels"]) if kind == "t5" else batch["attention_mask"]
    logits = reference.logits(batch)[real.bool()].detach()
    assert_near(output.logits[real.bool()], logits, NEAR.output)
    assert_near(output.loss, wanted, NEAR.output)
    found = joined({name: gate.grad for name, gate in gated.gates.items()})
    expected = joined({name: gate.grad for name, gate in reference.gates.items()})
    assert (found - expected).norm() <= GRADIENT * expected.norm() + ROUNDING


def test_gates_are_applied_in_fp32_under_autocast():
    gated = GatedAdapter(make())
    with gated.installed(), torch.autocast("cpu", dtype=torch.bfloat16):
        gated.model(**make_batch()).loss.backward()
    for name, gate in gated.gates.items():
        assert not torch.equal(gate.grad.bfloat16().float(), gate.grad), name


def test_modules_carry_peft_s_matrices_and_scale():
    peft_model = make("gpt2", r=4, lora_alpha=6, use_rslora=True)
    modules = GatedAdapter(peft_model).modules()
    state = peft_model.state_dict()
    assert len(modules) == 8
    for name, module in modules.items():
        path = f"base_model.model.{name}.lora_%s.default.weight"
        assert torch.equal(module.a, state[path % "A"]) and torch.equal(module.b, state[path % "B"])
        assert module.scale == pytest.approx(6 / 2)


def snapshot(model):
    """Everything of a model that gate training could leave changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "trainable": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad is None for p in model.parameters()],
        "modes": [(name, module.training) for name, module in model.named_modules()],
        "hooks": [list(getattr(m, kind)) for m in model.modules() for kind in hooks],
        "floats": [
            sorted((k, v) for k, v in vars(m).items() if isinstance(v, float))
            for m in model.modules()
        ],
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    for name, value in before.pop("state").items():
        assert torch.equal(after["state"][name], value), name
    after.pop("state")
    assert after == before


def untidy(kind):
    """A model in a state of its own: half in training mode, some parameters frozen or not."""
    peft_model = make(kind, lora_dropout=0.5)
    peft_model.train()
    first, last = (list(GatedAdapter(peft_model).layers.values())[i] for i in (0, -1))
    first.eval()
    first.lora_A["default"].weight.requires_grad_(False)
    last.base_layer.weight.requires_grad_(True)
    return peft_model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", list(BASES))
def test_the_model_comes_back_as_it_was(kind, checkpointing):
    peft_model = untidy(kind)
    if checkpointing:
        peft_model.gradient_checkpointing_enable()
    gated, before = GatedAdapter(peft_model), snapshot(peft_model)
    with gated.installed():
        assert not any(p.requires_grad for p in peft_model.parameters())
        peft_model(**make_batch(kind)).loss.backward()
    assert_unchanged(peft_model, before)
    assert all(gate.grad.any() for gate in gated.gates.values())


def test_the_model_comes_back_as_it_was_after_an_error():
    peft_model = untidy("gpt2")
    peft_model.gradient_checkpointing_enable()
    before = snapshot(peft_model)
    with pytest.raises(KeyError), GatedAdapter(peft_model).installed():
        raise KeyError
    assert_unchanged(peft_model, before)


def test_outputs_are_bit_for_bit_those_of_before():
    peft_model, batch = make(), make_batch()
    before = peft_model(**batch).logits
    with GatedAdapter(peft_model).installed():
        during = peft_model(**batch).logits
    assert not torch.equal(during, before)
    assert torch.equal(peft_model(**batch).logits, before)


@pytest.mark.parametrize("kind", list(BASES))
def test_no_dropout_of_any_kind(kind):
    """Half of everything dropped gives the loss of nothing dropped."""
    bases = {
        "llama": lambda p: llama(attention_dropout=p),
        "gpt2": lambda p: gpt2(resid_pdrop=p, embd_pdrop=p, attn_pdrop=p),
        "t5": lambda p: t5(dropout_rate=p),
        "opt": lambda p: opt(dropout=p, attention_dropout=p, layerdrop=p),
    }
    losses = []
    for rate in (0.0, 0.5):
        torch.manual_seed(0)
        peft_model = add_lora(bases[kind](rate), lora_dropout=rate).train()
        with GatedAdapter(peft_model).installed():
            losses.append(peft_model(**make_batch(kind)).loss.item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", list(BASES))
def test_gradient_checkpointing_changes_no_gradient(kind, reentrant):
    """GPT-2, T5 and OPT drop a tenth in training mode, which checkpointing needs."""
    calls = []
    peft_model, batch = make(kind, lora_dropout=0.5), make_batch(kind)
    site = next(iter(GatedAdapter(peft_model).layers.values()))
    site.register_forward_hook(lambda *_: calls.append(1))

    def loss_and_gradients():
        calls.clear()
        gated = GatedAdapter(peft_model)
        for number, gate in enumerate(gated.gates.values()):
            gate.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(number))
        with gated.installed():
            loss = peft_model(**batch).loss
            loss.backward()
        return loss.item(), joined({name: gate.grad for name, gate in gated.gates.items()})

    loss, gradients = loss_and_gradients()
    assert len(calls) == 1
    peft_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found_loss, found = loss_and_gradients()
    assert len(calls) == 2, "nothing was computed twice, so nothing was checkpointed"
    assert found_loss == pytest.approx(loss, rel=1e-6)  # T5 goes without its cache
    assert_near(found, gradients, 1e-5)  # T5 sums over its layers in another order


def test_a_module_that_no_batch_uses_has_a_gate_too():
    """T5's decoder has no part in a loss on the encoder alone."""
    gated = GatedAdapter(make("t5"))
    with gated.installed():
        gated.model.get_encoder()(make_batch("t5")["input_ids"])[0].sum().backward()
    used = {name for name, gate in gated.gates.items() if gate.grad is not None}
    assert used == {name for name in gated.gates if name.startswith("encoder")}


def refused(model):
    """The error's class and message; it is one line and says what to do."""
    with pytest.raises((ConfigError, UnsupportedAdapterError, UntrainedAdapterError)) as caught:
        GatedAdapter(model)
    assert "\n" not in str(caught.value)
    return caught.type, str(caught.value)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all", "target_modules": ["c_attn"], "kind": "gpt2"}, "bias"),
        ({"bias": "lora_only", "target_modules": ["c_attn"], "kind": "gpt2"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "model.embed_tokens"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_what_is_no_plain_lora(lora, words):
    error, message = refused(make(**lora))
    assert error is UnsupportedAdapterError
    assert words in message and "'default'" in message


def test_refuses_other_kinds_of_adapters():
    for config in (
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        VeraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
    ):
        error, message = refused(get_peft_model(llama(), config))
        assert error is UnsupportedAdapterError and "LORA" in message


def test_refuses_lora_on_a_convolution():
    """Its lora_A is no matrix, so v·u has no meaning."""
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(3, 4, 3))
    peft_model = get_peft_model(net, LoraConfig(target_modules=["conv"], init_lora_weights=False))
    assert refused(peft_model) == (
        UnsupportedAdapterError,
        "adapter 'default': has LoRA on conv, a Conv2d, which is not supported. Train a LoRA on "
        "linear layers only.",
    )


def test_refuses_an_untrained_adapter():
    peft_model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    error, message = refused(peft_model)
    assert error is UntrainedAdapterError and "'default'" in message


def test_one_trained_module_is_enough():
    peft_model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    peft_model.base_model.model.model.layers[1].self_attn.q_proj.lora_B.default.weight.data[3] = 1
    assert len(GatedAdapter(peft_model).gates) == 2


def test_refuses_a_model_without_adapter():
    error, message = refused(llama())
    assert error is ConfigError and "LlamaForCausalLM" in message


def test_refuses_two_active_adapters():
    peft_model = make()
    peft_model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    peft_model.base_model.set_adapter(["default", "other"])
    error, message = refused(peft_model)
    assert error is ConfigError and "default" in message and "set_adapter" in message


def test_gates_the_active_adapter_of_several():
    peft_model = make()
    other = LoraConfig(target_modules=["v_proj"], init_lora_weights=False, r=2)
    peft_model.add_adapter("other", other)
    peft_model.set_adapter("other")
    gated = GatedAdapter(peft_model)
    assert [name.rpartition(".")[2] for name in gated.gates] == ["v_proj", "v_proj"]
    assert {module.rank for module in gated.modules().values()} == {2}


def test_refuses_a_merged_adapter():
    peft_model = make()
    peft_model.merge_adapter()
    error, message = refused(peft_model)
    assert error is ConfigError and "unmerge_adapter" in message
    peft_model.unmerge_adapter()
    GatedAdapter(peft_model)
