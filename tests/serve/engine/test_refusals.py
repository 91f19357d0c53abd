"""What cannot be served is refused when vLLM loads the model, by the error that `route` raises."""

import os

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from phatgoose.errors import (
    ConfigError,
    ExpertNotFoundError,
    IncompatibleExpertError,
    MissingGateError,
    RoutingError,
    UnsupportedAdapterError,
)
from tests.models import save_expert
from tests.serve.models import save_base, save_pool

ATTENTION = ("q_proj", "o_proj")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a base and one sound expert, and the base itself."""
    folder = tmp_path_factory.mktemp("world")
    base = save_base(folder / "base", "llama")
    save_expert(folder / "sound", base, seed=0, targets=ATTENTION)
    return folder, base


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_sound_expert_is_loaded(top_k, world, load):
    """One is enough, whatever top_k is."""
    folder, _ = world
    model, config = load(folder / "base", {"experts": [str(folder / "sound")], "top_k": top_k})
    routed = [name for name, _ in model.named_modules() if name.endswith("phatgoose_bank")]
    assert sorted(routed) == sorted(
        f"model.layers.{layer}.self_attn.{name}.phatgoose_bank"
        for layer in (0, 1)
        for name in ("qkv_proj", "o_proj")
    )
    assert not [name for name in model.state_dict() if "phatgoose" in name]
    assert len(config.additional_config["phatgoose_layout"]) == 64


def test_other_shapes_have_another_compile_cache(world, load, tmp_path):
    _, base = world
    hashes = set()
    for rank in (2, 3, 2):
        save_pool(tmp_path / "pool", base, 2, rank=rank)
        _, config = load(world[0] / "base", {"experts": [str(tmp_path / "pool")]})
        hashes.add(config.compute_hash())
    assert len(hashes) == 2


def test_settings_are_wanted(world, load):
    with pytest.raises(ConfigError, match="wants its settings"):
        load(world[0] / "base", None)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"top_k": 1, "max_rank": 1}, ConfigError, "max_rank is 1, .* needs 3"),
        ({"top_k": 1, "experts": ["no/such"]}, ExpertNotFoundError, "no/such"),
        ({"top_k": 1, "backend": "triton"}, ConfigError, "triton"),
        ({"top_k": 1, "background": "no/such"}, ConfigError, "background: no/such cannot be read"),
        ({"top_k": 1, "background": os.devnull}, ConfigError, f"{os.devnull} is empty"),
    ],
)
def test_settings_that_do_not_fit(settings, error, message, world, load):
    folder, _ = world
    with pytest.raises(error, match=message):
        load(folder / "base", {"experts": [str(folder / "sound")], **settings})


def test_missing_gates(world, load):
    folder, base = world
    save_expert(folder / "gateless", base, seed=1, targets=ATTENTION, gates=False)
    with pytest.raises(MissingGateError, match="gateless"):
        load(folder / "base", {"experts": [str(folder / "gateless")], "top_k": 1})


def test_another_base(world, load, tmp_path):
    folder, _ = world
    other = save_base(tmp_path / "other", "llama", kv_heads=4)
    save_expert(tmp_path / "stranger", other, seed=0, targets=ATTENTION)
    with pytest.raises(IncompatibleExpertError, match="stranger: was made for another base"):
        load(folder / "base", {"experts": [str(tmp_path / "stranger")], "top_k": 1})


def test_output_heads(world, load):
    folder, base = world
    save_expert(folder / "head", base, seed=1, targets=("q_proj", "lm_head"))
    with pytest.raises(RoutingError, match="adapts lm_head.*not embeddings or output heads"):
        load(folder / "base", {"experts": [str(folder / "head")], "top_k": 1})


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_adapters(kind, world, load, tmp_path):
    folder, base = world
    save_expert(tmp_path / "other", base, seed=1, targets=ATTENTION, **kind)
    match = "vLLM: other at .* takes plain LoRA only, .* Route it on transformers"
    with pytest.raises(UnsupportedAdapterError, match=match):
        load(folder / "base", {"experts": [str(tmp_path / "other")], "top_k": 1})


def test_layers_that_vllm_has_not(load, tmp_path):
    from phatgoose.serve.engine.layers import Layers

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    mixture = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=2))
    mixture.save_pretrained(tmp_path / "base")
    save_expert(tmp_path / "e", mixture, seed=0, targets=ATTENTION)
    model, _ = load(tmp_path / "base", {"experts": [str(tmp_path / "e")], "top_k": 1})
    found = Layers(model)
    part = found.find("model.layers.0.self_attn.k_proj", "e")
    assert (part.layer, part.number) == ("model.layers.0.self_attn.qkv_proj", 1)
    with pytest.raises(RoutingError, match="e: adapts .*experts of a mixture"):
        found.find("model.layers.0.mlp.experts.0.w1", "e")
    with pytest.raises(RoutingError, match="VocabParallelEmbedding .*not embeddings"):
        found.find("model.embed_tokens", "e")


def test_rows_in_another_order(load, tmp_path):
    base = save_base(tmp_path / "base", "gpt2")
    save_expert(tmp_path / "mlp", base, seed=0, targets=("c_fc",), fan_in_fan_out=True)
    save_expert(tmp_path / "all", base, seed=0, targets=("c_attn",), fan_in_fan_out=True)
    load(tmp_path / "base", {"experts": [str(tmp_path / "mlp")], "top_k": 1})
    with pytest.raises(RoutingError, match="c_attn, which .* may keep in another order of rows"):
        load(tmp_path / "base", {"experts": [str(tmp_path / "all")], "top_k": 1})


def test_an_engine_does_not_start(world, engine):
    folder, _ = world
    settings = {"experts": [str(folder / "sound")], "max_rank": 1}
    said = engine(folder / "base", settings, [[[[1]]]], fails=True)
    assert "phatgoose: max_rank is 1" in said


@pytest.mark.parametrize(
    "broken",
    [
        "phatgoose.serve",
        pytest.param("phatgoose.serve.engine.loader", marks=pytest.mark.thorough),
        pytest.param("left out", marks=pytest.mark.thorough),
    ],
)
def test_a_broken_plugin_serves_nothing(broken, world, engine, tmp_path):
    folder, _ = world
    environment = {"VLLM_PLUGINS": "another"}
    if broken != "left out":
        (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{broken!r}] = None\n")
        environment = {"PYTHONPATH": str(tmp_path)}
    settings = {"experts": [str(folder / "sound")], "top_k": 1}
    said = engine(folder / "base", settings, [[[[1]]]], fails=True, environment=environment)
    loader = "phatgoose.serve.engine.loader"
    wanted = loader if broken == loader else "is not supported"
    assert wanted in said
