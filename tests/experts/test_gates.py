"""Gates on disk: written whole, and never read beside an adapter they were not trained for."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from phatgoose.errors import ExpertFormatError, IncompatibleExpertError
from phatgoose.experts import BaseIdentity, GateRecord, Gates, load_expert
from phatgoose.experts.gates import CONFIG_FILE, GATES_FILE, gates_hash
from phatgoose.experts.lora import WEIGHTS_FILE


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_round_trip(save_adapter, make_gates, make_base):
    folder = save_adapter()
    gates = make_gates(
        folder,
        make_base("llama"),
        training={"lr": 5e-3, "steps": 100, "schedule": ["warmup", "linear"]},
        steps=100,
        examples=3200,
        tokens=12345,
        first_loss=2.75,
        last_loss=0.1,
    )
    assert gates.save(str(folder)) == folder
    found = Gates.load(folder)
    assert found.record == gates.record
    assert set(found.vectors) == set(gates.vectors)
    for name, vector in gates.vectors.items():
        torch.testing.assert_close(found.vectors[name], vector, rtol=0, atol=0)
    assert load_expert(folder).base == gates.record.base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_stored_in_fp32_whatever_the_dtype(dtype, save_adapter, make_gates):
    folder = save_adapter()
    gates = make_gates(folder)
    gates = replace(gates, vectors={name: v.to(dtype) for name, v in gates.vectors.items()})
    gates.save(folder)
    found = Gates.load(folder).vectors
    assert {v.dtype for v in found.values()} == {torch.float32}
    for name, vector in gates.vectors.items():
        torch.testing.assert_close(found[name], vector.float(), rtol=0, atol=0)


def test_trainable_and_strided_vectors_are_stored(save_adapter, make_gates):
    folder = save_adapter()
    gates = make_gates(folder)
    vectors = {
        name: torch.stack([v, v], 1).requires_grad_()[:, 0] for name, v in gates.vectors.items()
    }
    replace(gates, vectors=vectors).save(folder)
    assert gates_hash(Gates.load(folder).vectors) == gates_hash(gates.vectors)


def test_an_adapter_without_gates_loads(save_adapter):
    expert = load_expert(save_adapter())
    assert expert.gates is None and expert.base is None
    assert expert.name == "adapter"


def test_saving_twice_replaces_both_files(expert_dir, make_gates):
    second = make_gates(expert_dir, steps=7)
    second.save(expert_dir)
    found = Gates.load(expert_dir)
    assert found.record.steps == 7
    assert gates_hash(found.vectors) == gates_hash(second.vectors)


def scale_lora_b(tensors):
    key = next(key for key in sorted(tensors) if "lora_B" in key)
    tensors[key] *= 1.01


def test_a_changed_adapter_is_refused(expert_dir, edit_tensors, one_line):
    gates = Gates.load(expert_dir)
    edit_tensors(expert_dir / WEIGHTS_FILE, scale_lora_b)
    before = contents(expert_dir)
    for action in (lambda: load_expert(expert_dir), lambda: gates.save(expert_dir)):
        with pytest.raises(IncompatibleExpertError, match=gates.record.adapter[:12]) as info:
            action()
        assert str(expert_dir) in one_line(info)
    assert contents(expert_dir) == before


def test_a_changed_scale_is_refused(expert_dir, edit_json):
    edit_json(expert_dir / "adapter_config.json", lora_alpha=6)
    with pytest.raises(IncompatibleExpertError, match="trained for adapter"):
        load_expert(expert_dir)


def test_saving_beside_no_adapter_is_refused(expert_dir, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ExpertFormatError, match=r"adapter_config\.json"):
        Gates.load(expert_dir).save(empty)
    assert not contents(empty)


def test_gates_of_another_expert_are_refused(expert_dir, save_adapter, make_gates, one_line):
    other = save_adapter(folder="other", r=2)
    make_gates(other).save(other)
    shutil.copy(other / GATES_FILE, expert_dir)
    with pytest.raises(ExpertFormatError, match="hash differs") as info:
        load_expert(expert_dir)
    assert GATES_FILE in one_line(info)
    shutil.copy(other / CONFIG_FILE, expert_dir)
    with pytest.raises(IncompatibleExpertError, match="trained for adapter"):
        load_expert(expert_dir)


def change_one(vectors):
    """The vectors, and a name among them to tamper with."""
    return dict(vectors), sorted(vectors)[1]


@pytest.mark.parametrize(
    ("shape", "found"), [((11,), r"\[11\]"), ((1, 12), r"\[1, 12\]"), ((), r"\[\]")]
)
def test_wrong_shapes_are_refused(shape, found, expert_dir, one_line):
    gates = Gates.load(expert_dir)
    before = contents(expert_dir)
    vectors, name = change_one(gates.vectors)
    bad = replace(gates, vectors={**vectors, name: torch.ones(shape)})
    with pytest.raises(IncompatibleExpertError, match=found) as info:
        bad.save(expert_dir)
    assert name in one_line(info)
    assert contents(expert_dir) == before
    bad.write(expert_dir)  # an importer might; the reader still looks
    with pytest.raises(IncompatibleExpertError, match=found):
        load_expert(expert_dir)


@pytest.mark.parametrize("missing", [1, 2])
def test_missing_modules_are_refused(missing, expert_dir):
    gates = Gates.load(expert_dir)
    names = sorted(gates.vectors)
    vectors = {name: gates.vectors[name] for name in names[missing:]}
    tail = " and 1 more modules" if missing == 2 else r"\."
    with pytest.raises(IncompatibleExpertError, match=f"no gate for {names[0]}{tail}"):
        replace(gates, vectors=vectors).save(expert_dir)
    replace(gates, vectors=vectors).write(expert_dir)
    with pytest.raises(IncompatibleExpertError, match=f"no gate for {names[0]}"):
        load_expert(expert_dir)


def test_extra_modules_are_refused(expert_dir):
    gates = Gates.load(expert_dir)
    vectors = {**gates.vectors, "model.layers.7.up": torch.ones(12)}
    with pytest.raises(IncompatibleExpertError, match=r"unadapted model\.layers\.7\.up"):
        replace(gates, vectors=vectors).save(expert_dir)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_versions_are_refused(version, expert_dir, edit_json, one_line):
    edit_json(expert_dir / CONFIG_FILE, format_version=version)
    with pytest.raises(ExpertFormatError, match="format_version") as info:
        load_expert(expert_dir)
    assert repr(version) in one_line(info)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff", b'{"format_version": 1}'], ids=repr
)
def test_a_bad_config_is_a_format_error(text, expert_dir, one_line):
    (expert_dir / CONFIG_FILE).write_bytes(text)
    with pytest.raises(ExpertFormatError, match=CONFIG_FILE) as info:
        load_expert(expert_dir)
    one_line(info)


@pytest.mark.parametrize(
    "fields",
    [{"base": None}, {"base": {"name": "x"}}, {"base": []}, {"colour": "red"}, {"adapter": None}],
)
def test_fields_of_another_kind_are_a_format_error(fields, expert_dir, edit_json, one_line):
    edit_json(expert_dir / CONFIG_FILE, **fields)
    with pytest.raises(ExpertFormatError, match="field is missing or unknown") as info:
        load_expert(expert_dir)
    one_line(info)


@pytest.mark.parametrize("field", ["base", "adapter", "gates"])
def test_a_missing_field_is_a_format_error(field, expert_dir):
    path = expert_dir / CONFIG_FILE
    config = json.loads(path.read_text())
    del config[field]
    path.write_text(json.dumps(config))
    with pytest.raises(ExpertFormatError, match=field):
        load_expert(expert_dir)


@pytest.mark.parametrize("gone", [GATES_FILE, CONFIG_FILE])
def test_half_a_pair_is_a_format_error(gone, expert_dir):
    (expert_dir / gone).unlink()
    with pytest.raises(ExpertFormatError, match=gone):
        load_expert(expert_dir)


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_truncated_gates_are_a_format_error(keep, expert_dir, one_line):
    path = expert_dir / GATES_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ExpertFormatError, match="not a readable safetensors file") as info:
        load_expert(expert_dir)
    one_line(info)


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_an_interrupted_save_leaves_the_old_files(call, expert_dir, make_gates, monkeypatch):
    before = contents(expert_dir)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, call, interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_gates(expert_dir).save(expert_dir)
    assert contents(expert_dir) == before
    assert load_expert(expert_dir).gates.record.steps == 100


@pytest.mark.parametrize("old", [True, False])
def test_an_interrupt_between_the_two_files_changes_neither(
    old, expert_dir, make_gates, monkeypatch
):
    second = make_gates(expert_dir, steps=3)
    if not old:
        for name in (GATES_FILE, CONFIG_FILE):
            (expert_dir / name).unlink()
    before = contents(expert_dir)
    real = os.replace

    def interrupt_config(source, target):
        if os.path.basename(target) == CONFIG_FILE:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt_config)
        with pytest.raises(KeyboardInterrupt):
            second.save(expert_dir)
    assert contents(expert_dir) == before
    second.save(expert_dir)
    assert load_expert(expert_dir).gates.record.steps == 3


def test_files_are_plain_and_readable_by_others(expert_dir):
    config = json.loads((expert_dir / CONFIG_FILE).read_text())
    tensors = load_file(expert_dir / GATES_FILE)
    assert config["format_version"] == 1
    assert config["gates"] == gates_hash(tensors)
    assert set(config["base"]) == {"name", "revision", "shape", "tokenizer"}
    if os.name == "posix":
        assert (expert_dir / GATES_FILE).stat().st_mode & 0o777 == 0o644


vectors = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


@given(vectors)
@settings(max_examples=40, deadline=None)
def test_written_gates_read_back(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("gates")
    tensors = {name: torch.tensor(numbers) for name, numbers in values.items()}
    record = GateRecord(BaseIdentity("owner/base", None, "shape", None), "adapter")
    Gates(tensors, record).write(folder)
    found = Gates.load(folder)
    assert found.record == record
    assert {name: v.tolist() for name, v in found.vectors.items()} == values


def test_hash_sees_names_and_values_only():
    plain = {"a": torch.arange(3.0), "b": torch.ones(2)}
    stored = {"b": torch.ones(2, dtype=torch.float64), "a": torch.arange(6.0)[::2] / 2}
    assert gates_hash(stored) == gates_hash(plain)
    swapped = {"a": plain["b"], "b": plain["a"]}
    nudged = {**plain, "a": plain["a"] + 1e-6}
    assert len({gates_hash(v) for v in (plain, swapped, nudged, {"a": plain["a"]})}) == 4
