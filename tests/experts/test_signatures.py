"""Signatures on disk: written whole, and never read beside an adapter they were not made for."""

import json
import os
import shutil
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from phatgoose.errors import ExpertFormatError, IncompatibleExpertError
from phatgoose.experts import BaseIdentity, GateRecord, Gates, Signatures, load_expert
from phatgoose.experts.kinds import GATES, KINDS
from phatgoose.experts.lora import WEIGHTS_FILE
from phatgoose.experts.signatures import HEADER, vectors_hash

GATES_FILE = KINDS[GATES].file


FIELDS = [field.name for field in fields(Signatures) if field.name != "vectors"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def record_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[HEADER])


def edit_record(path, change):
    """Rewrite the record in a file's header: change(record), or a text in its place."""
    text = change if isinstance(change, str) else json.dumps(change(record_of(path)))
    save_file(load_file(path), path, {HEADER: text})


def same(one, other):
    """Whether two signatures are equal, vectors and all."""
    return (
        all(getattr(one, name) == getattr(other, name) for name in FIELDS)
        and one.vectors.keys() == other.vectors.keys()
        and all(torch.equal(one.vectors[name], other.vectors[name]) for name in one.vectors)
    )


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_reads_back_as_it_was(kind, complete_dir):
    found = load_expert(complete_dir).signatures[kind]
    assert (type(found) is Gates) == (kind == GATES)
    changed = replace(found, training={"seed": 3, "names": ["a", "b"]}, steps=5, first_loss=0.25)
    assert changed.save(complete_dir) == complete_dir
    again = load_expert(complete_dir).signatures[kind]
    assert same(again, changed) and not same(again, found)
    assert record_of(complete_dir / KINDS[kind].file)["vectors"] == vectors_hash(found.vectors)


def test_a_file_is_the_same_each_time_it_is_written(complete_dir):
    before = contents(complete_dir)
    for signatures in load_expert(complete_dir).signatures.values():
        signatures.save(complete_dir)
    assert contents(complete_dir) == before


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_kind_of_another_base_is_refused(kind, complete_dir, one_line):
    found = load_expert(complete_dir).signatures[kind]
    replace(found, base=replace(found.base, shape="another")).save(complete_dir)
    with pytest.raises(IncompatibleExpertError, match="on different bases") as info:
        load_expert(complete_dir)
    assert KINDS[kind].words in one_line(info)


@pytest.mark.parametrize("kind", list(KINDS))
def test_other_values_than_the_record_was_written_with_are_refused(kind, complete_dir, one_line):
    path = complete_dir / KINDS[kind].file
    tensors, text = load_file(path), json.dumps(record_of(path))
    name = sorted(tensors)[0]
    tensors[name][3] += 1e-6
    save_file(tensors, path, {HEADER: text})
    with pytest.raises(ExpertFormatError, match="hash differs") as info:
        load_expert(complete_dir)
    assert path.name in one_line(info)


def test_gates_are_vectors_and_a_record_or_fields(expert):
    gates = expert.gates
    assert same(Gates(gates.vectors, gates.record), gates)
    assert Gates(gates.vectors, gates.record).kind == GATES
    moved = replace(gates, record=replace(gates.record, steps=9))
    assert moved.steps == moved.record.steps == 9 and moved.base == gates.base
    assert replace(expert, gates=None).gates is None
    assert replace(expert, gates=moved).signatures[GATES] is moved
    assert replace(expert, name="x").gates is gates


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
    assert vectors_hash(Gates.load(folder).vectors) == vectors_hash(gates.vectors)


def test_an_adapter_without_gates_loads(save_adapter):
    expert = load_expert(save_adapter())
    assert expert.gates is None and expert.base is None
    assert expert.name == "adapter"


def test_saving_twice_replaces_the_file(expert_dir, make_gates):
    second = make_gates(expert_dir, steps=7)
    second.save(expert_dir)
    found = Gates.load(expert_dir)
    assert found.record.steps == 7
    assert vectors_hash(found.vectors) == vectors_hash(second.vectors)


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
    with pytest.raises(IncompatibleExpertError, match="made for adapter"):
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
    with pytest.raises(IncompatibleExpertError, match="gates were made for adapter") as info:
        load_expert(expert_dir)
    assert f"phatgoose gate {expert_dir}" in one_line(info)


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
    with pytest.raises(IncompatibleExpertError, match=f"gates lack {names[0]}{tail}"):
        replace(gates, vectors=vectors).save(expert_dir)
    replace(gates, vectors=vectors).write(expert_dir)
    with pytest.raises(IncompatibleExpertError, match=f"gates lack {names[0]}"):
        load_expert(expert_dir)


def test_a_mean_prompt_is_a_vector_too(complete_dir):
    """Though the adapter need not have its module."""
    path, tensors = complete_dir / KINDS["prompt_mean"].file, {"x": torch.ones(2, 3)}
    record = {**record_of(path), "vectors": vectors_hash(tensors)}
    save_file(tensors, path, {HEADER: json.dumps(record)})
    with pytest.raises(IncompatibleExpertError, match=r"wanted \[in_features\]"):
        load_expert(complete_dir)


def test_extra_modules_are_refused(expert_dir):
    gates = Gates.load(expert_dir)
    vectors = {**gates.vectors, "model.layers.7.up": torch.ones(12)}
    with pytest.raises(IncompatibleExpertError, match=r"unadapted model\.layers\.7\.up"):
        replace(gates, vectors=vectors).save(expert_dir)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_other_versions_are_refused(version, expert_dir, one_line):
    edit_record(expert_dir / GATES_FILE, lambda record: {**record, "format_version": version})
    with pytest.raises(ExpertFormatError, match="format_version") as info:
        load_expert(expert_dir)
    assert repr(version) in one_line(info)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "1", '{"format_version": 2}', "[" * 5000], ids=lambda t: t[:20]
)
def test_a_bad_record_is_a_format_error(text, expert_dir, one_line):
    edit_record(expert_dir / GATES_FILE, text)
    with pytest.raises(ExpertFormatError, match=GATES_FILE) as info:
        load_expert(expert_dir)
    one_line(info)


@pytest.mark.parametrize(
    "changed",
    [
        {"base": None},
        {"base": {"name": "x"}},
        {"base": []},
        {"base": {"name": None, "revision": None, "shape": None, "tokenizer": None}},
        {"base": {"name": 3, "revision": None, "shape": "s", "tokenizer": None}},
        {"colour": "red"},
        {"adapter": None},
        {"kind": "arrow"},
        {"kind": []},
        {"steps": "many"},
        {"training": []},
        {"first_loss": "low"},
        {"vectors": None},
    ],
    ids=str,
)
def test_fields_of_another_kind_are_a_format_error(changed, expert_dir, one_line):
    edit_record(expert_dir / GATES_FILE, lambda record: {**record, **changed})
    with pytest.raises(ExpertFormatError, match="field of its record") as info:
        load_expert(expert_dir)
    one_line(info)


@pytest.mark.parametrize("field", ["base", "adapter", "vectors", "kind", "format_version"])
def test_a_missing_field_is_a_format_error(field, expert_dir):
    def without(record):
        del record[field]
        return record

    edit_record(expert_dir / GATES_FILE, without)
    with pytest.raises(ExpertFormatError, match=field):
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


def test_files_are_plain_and_readable_by_others(expert_dir):
    record, tensors = record_of(expert_dir / GATES_FILE), load_file(expert_dir / GATES_FILE)
    assert record["format_version"] == 2 and record["kind"] == "gates"
    assert record["vectors"] == vectors_hash(tensors)
    assert set(record["base"]) == {"name", "revision", "shape", "tokenizer"}
    if os.name == "posix":
        assert (expert_dir / GATES_FILE).stat().st_mode & 0o777 == 0o644


seen = st.characters(exclude_categories=["C", "Zl", "Zp"])  # no others are in names
vectors = st.dictionaries(
    st.text(seen, min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=4),
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
    assert vectors_hash(stored) == vectors_hash(plain)
    swapped = {"a": plain["b"], "b": plain["a"]}
    nudged = {**plain, "a": plain["a"] + 1e-6}
    assert len({vectors_hash(v) for v in (plain, swapped, nudged, {"a": plain["a"]})}) == 4
