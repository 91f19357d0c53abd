"""Reading PEFT folders: exact where we accept, refused where we would not be exact."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer

from phatgoose.errors import ConfigError, ExpertFormatError, UnsupportedAdapterError
from phatgoose.experts import LoraModule, adapter_hash, load_expert
from phatgoose.experts.lora import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_adapter,
    refuse_unsupported,
    scale_of,
)
from phatgoose.experts.targets import Targets

# For each base, patterns that match some of what its adapters adapt.
RANKS = {
    "llama": {"k_proj": 4, r"layers\.0\.self_attn\.q_proj": 5},
    "gpt2": {"c_attn": 2, r"h\.1\.mlp\.c_proj": 1},
    "t5": {"wo": 7, r"encoder\.block\.0\.layer\.0\.SelfAttention\.q": 6},
}
ALPHAS = {
    "llama": {"q_proj": 9, r"layers\.1\.mlp\.down_proj": 1},
    "gpt2": {"c_attn": 32, r"attn\.c_proj": 2.5},
    "t5": {"wi_0": 2, "SelfAttention.q": 3},
}


def drop(*endings):
    """An edit that removes the tensors whose names end so, from the first module only."""

    def change(tensors):
        for ending in endings:
            del tensors[next(key for key in sorted(tensors) if key.endswith(ending))]

    return change


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("ranks", [False, True], ids=["one_rank", "rank_pattern"])
@pytest.mark.parametrize("alphas", [False, True], ids=["one_alpha", "alpha_pattern"])
def test_reads_what_peft_saved(kind, rslora, ranks, alphas, peft_model, tmp_path):
    options = {
        "use_rslora": rslora,
        "rank_pattern": RANKS[kind] if ranks else {},
        "alpha_pattern": ALPHAS[kind] if alphas else {},
    }
    model = peft_model(kind, **options)
    model.save_pretrained(tmp_path)
    config, modules = read_adapter(tmp_path)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert config["peft_type"] == "LORA"
    assert set(modules) == set(layers)
    assert (len({module.rank for module in modules.values()}) > 1) is ranks
    assert (len({module.scale for module in modules.values()}) > 1) is (ranks or alphas)
    for name, layer in layers.items():
        module = modules[name]
        torch.testing.assert_close(module.a, layer.lora_A["default"].weight.data, rtol=0, atol=0)
        torch.testing.assert_close(module.b, layer.lora_B["default"].weight.data, rtol=0, atol=0)
        assert module.scale == pytest.approx(layer.scaling["default"], rel=1e-12)
        assert module.rank == layer.r["default"]
        assert (module.in_features, module.out_features) == (layer.in_features, layer.out_features)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_module_adds_what_peft_adds(kind, peft_model, tmp_path):
    model = peft_model(kind, use_rslora=True)
    model.save_pretrained(tmp_path)
    for name, module in read_adapter(tmp_path)[1].items():
        layer = model.base_model.model.get_submodule(name)
        x = torch.randn(4, module.in_features)
        with torch.no_grad():
            wanted = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(module.scale * x @ module.a.T @ module.b.T, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keeps_the_stored_dtype(dtype, save_adapter, edit_tensors):
    folder = save_adapter()
    edit_tensors(folder / WEIGHTS_FILE, lambda ts: {k: t.to(dtype) for k, t in ts.items()})
    _, modules = read_adapter(folder)
    assert {m.dtype for module in modules.values() for m in (module.a, module.b)} == {dtype}


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": None}, "None"),
        ({"use_dora": True}, "no lora_magnitude_vector"),
        ({"lora_bias": True}, r"no lora_B\.bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "token"),
        ({"target_parameters": ["experts.up"]}, "parameters"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "replication"),
        ({"alora_invocation_tokens": [1, 2]}, "activated"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "LoftQ"}, "loftq"),
    ],
)
def test_refuses_settings_it_would_not_compute(fields, word, save_adapter, edit_json, one_line):
    folder = save_adapter()
    edit_json(folder / CONFIG_FILE, **fields)
    with pytest.raises(UnsupportedAdapterError, match=word) as info:
        load_expert(folder)
    assert str(folder) in one_line(info)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_accepts_initialisations_that_leave_the_base_alone(init):
    refuse_unsupported({"peft_type": "LORA", "init_lora_weights": init}, "x")


def test_refuses_dora_tensors_the_config_hides(save_adapter, edit_json):
    folder = save_adapter(use_dora=True)
    edit_json(folder / CONFIG_FILE, use_dora=False)
    match = r"has a lora_magnitude_vector, and .* use_dora: false"
    with pytest.raises(UnsupportedAdapterError, match=match):
        load_expert(folder)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_refuses_a_bias_the_config_hides(save_adapter, edit_json):
    folder = save_adapter(lora_bias=True)
    edit_json(folder / CONFIG_FILE, lora_bias=False)
    with pytest.raises(UnsupportedAdapterError, match=r"has a lora_B.bias, and .*lora_bias: false"):
        load_expert(folder)


def test_refuses_tensors_of_no_kind(save_adapter, edit_tensors):
    folder = save_adapter()
    edit_tensors(
        folder / WEIGHTS_FILE, lambda ts: {**ts, "base_model.model.x.lora_C": torch.ones(2)}
    )
    with pytest.raises(UnsupportedAdapterError, match="lora_C is a tensor that no kind"):
        load_expert(folder)


def test_refuses_a_pickle_without_opening_it(save_adapter, tmp_path, one_line):
    folder = save_adapter()
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(UnsupportedAdapterError, match="pickle") as info:
        load_expert(folder)
    assert "adapter_model.bin" in one_line(info)


def test_prefers_safetensors_over_a_pickle_beside_it(save_adapter):
    folder = save_adapter()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert len(load_expert(folder).modules) == 6


@given(share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=25, deadline=None)
def test_every_truncation_is_a_format_error(share, tmp_path_factory, whole_file):
    config, weights = whole_file
    folder = tmp_path_factory.mktemp("cut")
    (folder / CONFIG_FILE).write_text(config)
    (folder / WEIGHTS_FILE).write_bytes(weights[: int(share * len(weights))])
    with pytest.raises(ExpertFormatError) as info:
        read_adapter(folder)
    assert WEIGHTS_FILE in str(info.value) and "\n" not in str(info.value)


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    """The contents of a valid adapter's two files, written by hand for its small header."""
    from safetensors.torch import save

    tensors = {
        "base_model.model.up.lora_A.weight": torch.ones(2, 3),
        "base_model.model.up.lora_B.weight": torch.ones(4, 2),
    }
    return json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}), save(tensors)


def test_the_whole_file_is_read(whole_file, tmp_path):
    config, weights = whole_file
    (tmp_path / CONFIG_FILE).write_text(config)
    (tmp_path / WEIGHTS_FILE).write_bytes(weights)
    (module,) = read_adapter(tmp_path)[1].values()
    assert (module.rank, module.in_features, module.out_features, module.scale) == (2, 3, 4, 1.0)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 64, b"PK\x03\x04" + b"\0" * 60])
def test_garbage_is_a_format_error(content, save_adapter, one_line):
    folder = save_adapter()
    (folder / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(ExpertFormatError, match="not a readable safetensors file") as info:
        load_expert(folder)
    assert WEIGHTS_FILE in one_line(info)


@pytest.mark.parametrize("half", ["A", "B"])
def test_names_the_missing_half(half, save_adapter, edit_tensors):
    folder = save_adapter()
    edit_tensors(folder / WEIGHTS_FILE, drop(f"lora_{half}.weight"))
    with pytest.raises(ExpertFormatError, match=rf"layers\.0\.\S+ has no lora_{half}"):
        load_expert(folder)


def test_missing_files_are_named(save_adapter, tmp_path):
    folder = save_adapter()
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(ExpertFormatError, match=WEIGHTS_FILE):
        load_expert(folder)
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(ExpertFormatError, match=f"no {CONFIG_FILE}"):
        load_expert(folder)


def test_no_matrices_is_a_format_error(save_adapter, edit_tensors):
    folder = save_adapter()
    edit_tensors(folder / WEIGHTS_FILE, lambda tensors: {})
    with pytest.raises(ExpertFormatError, match="holds no lora_A"):
        load_expert(folder)


@pytest.mark.parametrize("shape", [(4, 3), (12,), (12, 3, 1)])
def test_halves_of_different_rank_or_dimension(shape, save_adapter, edit_tensors):
    folder = save_adapter()

    def change(tensors):
        key = next(key for key in sorted(tensors) if "lora_A" in key)
        tensors[key] = torch.ones(shape if shape != (4, 3) else (4, tensors[key].shape[1]))

    edit_tensors(folder / WEIGHTS_FILE, change)
    said = "with one rank" if len(shape) > 1 else "shards were not gathered"
    with pytest.raises(ExpertFormatError, match=said):
        load_expert(folder)


def test_a_rank_of_zero_is_a_format_error(whole_file, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / CONFIG_FILE).write_text('{"peft_type": "LORA", "r": 0, "lora_alpha": 1}')
    tensors = {"m.lora_A.weight": torch.ones(0, 3), "m.lora_B.weight": torch.ones(4, 0)}
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ExpertFormatError, match="lora_A"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    "fields", [{"r": 4}, {"rank_pattern": {"k_proj": 2}}, {"r": None}, {"r": "3"}]
)
def test_the_config_must_know_the_rank(fields, save_adapter, edit_json, one_line):
    folder = save_adapter()
    edit_json(folder / CONFIG_FILE, **fields)
    with pytest.raises(ExpertFormatError, match="rank 3") as info:
        load_expert(folder)
    assert CONFIG_FILE in one_line(info)


@pytest.mark.parametrize("alpha", [None, "16", [1]])
def test_alpha_must_be_a_number(alpha, save_adapter, edit_json):
    folder = save_adapter()
    edit_json(folder / CONFIG_FILE, lora_alpha=alpha)
    with pytest.raises(ExpertFormatError, match="lora_alpha"):
        load_expert(folder)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", [["q_proj"], "q_proj", 3, {"(": 4}])
def test_patterns_must_be_mappings_of_patterns(field, value, save_adapter, edit_json):
    folder = save_adapter()
    edit_json(folder / CONFIG_FILE, **{field: value})
    with pytest.raises(ExpertFormatError, match=field):
        load_expert(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"null", b'"x"', b"\xff\xfe{}", b"{'r': 1}"])
def test_a_bad_config_is_a_format_error(text, save_adapter, one_line):
    folder = save_adapter()
    (folder / CONFIG_FILE).write_bytes(text)
    with pytest.raises(ExpertFormatError, match="JSON") as info:
        load_expert(folder)
    assert CONFIG_FILE in one_line(info)


@given(alpha=st.floats(-100, 100), rank=st.integers(1, 512), rslora=st.booleans())
@settings(deadline=None)
def test_scale_law(alpha, rank, rslora):
    config = {"lora_alpha": alpha, "use_rslora": rslora}
    wanted = alpha / (math.sqrt(rank) if rslora else rank)
    assert scale_of(config, "m", rank) == pytest.approx(wanted)


def test_the_first_matching_alpha_pattern_wins_as_in_peft():
    config = {"lora_alpha": 8, "alpha_pattern": {"q": 2, r"layer\.1\.q": 4}}
    found = [scale_of(config, name, 2) for name in ("layer.0.q", "layer.1.q", "layer.1.kq")]
    assert found == [1.0, 1.0, 4.0]


def modules():
    generator = torch.Generator().manual_seed(1)
    return {
        name: LoraModule(
            torch.randn(2, 3, generator=generator), torch.randn(4, 2, generator=generator), 0.5
        )
        for name in ("first", "second")
    }


def test_hash_ignores_order_and_exact_storage():
    plain = modules()
    stored = {
        name: LoraModule(m.a.double(), m.b.T.contiguous().T, m.scale)
        for name, m in reversed(plain.items())
    }
    assert adapter_hash(stored) == adapter_hash(plain)
    assert len(adapter_hash(plain)) == 64


def test_hash_sees_every_change():
    a, b = modules()["first"].a, modules()["first"].b
    variants = [
        modules()["first"],
        LoraModule(a, b, 0.25),
        LoraModule(a + 1e-6, b, 0.5),
        LoraModule(a, b.flip(0), 0.5),
        LoraModule(a.reshape(3, 2), b, 0.5),
        LoraModule(torch.full_like(a, math.nan), b, 0.5),
    ]
    hashes = [adapter_hash({**modules(), "first": module}) for module in variants]
    hashes += [adapter_hash({"first": modules()["first"]}), adapter_hash({})]
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, 1e308, 10**400, 1e39, True, "8", [8], None])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_alpha_beyond_float32_is_refused(alpha, rslora, save_adapter, edit_json, one_line):
    folder = save_adapter()
    edit_json(folder / CONFIG_FILE, lora_alpha=alpha, use_rslora=rslora)
    with pytest.raises(ExpertFormatError, match=r"lora_alpha|JSON") as info:
        load_expert(folder)
    one_line(info)


@pytest.mark.parametrize("factor", [1e300, 1e37, math.nan])
@pytest.mark.parametrize("half", ["A", "B"])
def test_values_whose_product_overflows_are_refused(factor, half, save_adapter, edit_tensors):
    folder = save_adapter()
    edit_tensors(
        folder / WEIGHTS_FILE,
        lambda ts: {
            k: t.double() * factor if f"lora_{half}" in k else t.double() for k, t in ts.items()
        },
    )
    with pytest.raises(ExpertFormatError, match="float32"):
        load_expert(folder)


def test_scale_times_b_that_overflows_is_refused(save_adapter, edit_json):
    folder = save_adapter()
    edit_json(folder / CONFIG_FILE, lora_alpha=3e38)
    with pytest.raises(ExpertFormatError, match="may exceed float32"):
        load_expert(folder)


@pytest.mark.parametrize("beside", [True, False])
def test_a_key_that_peft_would_leave_out_is_refused(beside, save_adapter, edit_tensors):
    folder = save_adapter()

    def again(tensors):
        key = min(tensors)
        bare = tensors[key] + 1 if beside else tensors.pop(key)
        return {**tensors, key.removeprefix("base_model.model."): bare}

    edit_tensors(folder / WEIGHTS_FILE, again)
    with pytest.raises(ExpertFormatError, match="does not begin with"):
        load_expert(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"base_model_name_or_path": 5},
        {"base_model_name_or_path": "x/\x1b]0;owned\x07y"},
        {"base_model_name_or_path": "x\nCRITICAL fake"},
        {"use_rslora": "false"},
        {"r": 3.0},
        {"r": "3"},
        {"rank_pattern": {"q_proj": True}},
        {"rank_pattern": {"(?=q_proj)": 3}},
        {"alpha_pattern": {"(?:[a-z_.0-9]+)+!(?<!q)": 3}},
        {"alpha_pattern": ["q_proj"]},
    ],
)
def test_fields_of_another_kind_are_refused(fields, save_adapter, edit_json, one_line):
    folder = save_adapter()
    edit_json(folder / CONFIG_FILE, **fields)
    with pytest.raises(
        ExpertFormatError, match=f"{CONFIG_FILE}.* {next(iter(fields))}|rank 3"
    ) as i:
        load_expert(folder)
    assert "\x1b" not in one_line(i)


def test_a_pattern_that_hangs_re_is_read_at_once(save_adapter, edit_json):
    folder = save_adapter()
    wanted = adapter_hash(load_expert(folder).modules)
    for field in ("rank_pattern", "alpha_pattern"):
        edit_json(folder / CONFIG_FILE, **{field: {"(?:[a-z_.0-9]+)+!": 7}})
    assert adapter_hash(load_expert(folder).modules) == wanted


def test_a_name_that_cannot_be_seen(save_adapter):
    folder = save_adapter()
    hidden = folder.rename(folder.with_name("a\x1b[2Kb"))
    with pytest.raises(ConfigError, match="cannot be seen"):
        load_expert(hidden)
    assert load_expert(hidden, name="plain").name == "plain"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"target_modules": ["q_proj"]}, False),
        ({"exclude_modules": ["q_proj"]}, False),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, False),
        ({"target_modules": ["self_attn.q_proj", "k_proj", "mlp.down_proj"]}, True),
        ({"target_modules": None}, True),
        ({"target_modules": r".*\.(q|k|down)_proj"}, True),
        ({"target_modules": r".*\.(q|k)_proj"}, False),
        ({"target_modules": r"(q|k|down)_proj"}, False),
        ({"exclude_modules": r".*down_proj"}, False),
        ({"target_modules": "all-linear"}, True),
        ({"layers_to_transform": [0, 1]}, True),
        ({"layers_to_transform": [0]}, False),
        ({"layers_to_transform": 1}, False),
        ({"target_modules": r".*(?<!v)_proj"}, True),  # not matched: PEFT saved what it found by it
    ],
)
def test_matrices_that_peft_would_leave_out_are_refused(fields, named, save_adapter, edit_json):
    folder = save_adapter()
    edit_json(folder / CONFIG_FILE, **fields)
    if named:
        assert len(load_expert(folder).modules) == 6
        return
    with pytest.raises(ExpertFormatError, match="PEFT would leave them out"):
        load_expert(folder)


def test_targets_that_would_take_long_are_refused(save_adapter, edit_json, monkeypatch):
    folder = save_adapter()
    edit_json(folder / CONFIG_FILE, target_modules=r".*\.(q|k|down)_proj")
    monkeypatch.setattr("phatgoose.experts.patterns.MOST_WORK", 20)
    with pytest.raises(ExpertFormatError, match="target_modules: the patterns take too long"):
        load_expert(folder)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("said", [{"q_proj": 1}, 3, True])
def test_targets_that_are_no_names_are_refused(field, said):
    """PEFT goes through a mapping's keys, so `{"q_proj": ...}` excludes q_proj there."""
    with pytest.raises(ExpertFormatError, match=f"{field} is .*wanted is a list of names"):
        Targets({field: said})
