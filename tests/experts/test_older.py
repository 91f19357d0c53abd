"""Folders of releases before format 2 of signatures: read as they are, and replaced whole."""

import json
from dataclasses import asdict

import pytest
from safetensors.torch import load_file, save_file

from phatgoose.default import tiny
from phatgoose.errors import ExpertFormatError
from phatgoose.experts import load_expert
from phatgoose.experts.kinds import GATES, KINDS
from phatgoose.experts.signatures import vectors_hash

GATES_FILE, (RECORD_FILE,) = KINDS[GATES].file, KINDS[GATES].older


def copies(vectors):
    """Not what is mapped from the file that is about to be written."""
    return {name: vector.clone() for name, vector in vectors.items()}


def write_as_before(folder, gates):
    """The two files that release 0.1 wrote."""
    save_file(copies(gates.vectors), folder / GATES_FILE, {"format": "pt"})
    record = {"format_version": 1, **asdict(gates.record), "gates": vectors_hash(gates.vectors)}
    record["base"] = gates.record.base.to_json()  # less what they did not know
    (folder / RECORD_FILE).write_text(json.dumps(record))


def write_others_as_before(folder, signatures):
    about = {
        "format": "pt",
        "format_version": "1",
        "kind": signatures.kind,
        "base": json.dumps(signatures.base.to_json(), sort_keys=True),
        "adapter": signatures.adapter,
        "examples": str(signatures.examples),
        "tokens": str(signatures.tokens),
    }
    save_file(copies(signatures.vectors), folder / KINDS[signatures.kind].file, about)


@pytest.fixture
def older_dir(complete_dir):
    """A folder with gates in their old format."""
    write_as_before(complete_dir, load_expert(complete_dir).gates)
    return complete_dir


def test_reads_as_it_was(expert, older_dir):
    found = load_expert(older_dir)
    assert set(found.signatures) == set(KINDS)
    assert found.gates.record == expert.gates.record
    assert vectors_hash(found.gates.vectors) == vectors_hash(expert.gates.vectors)
    for signatures in found.signatures.values():
        assert signatures.base == expert.base
        assert signatures.examples == (0 if signatures.kind == GATES else 3)


def test_the_default_pool_has_the_newer_format():
    for folder in tiny.expert_folders():
        found = load_expert(folder)
        assert {GATES, "average_activation", "prompt_mean"} <= set(found.signatures)
        assert found.gates.steps == 100 and not (folder / RECORD_FILE).exists()


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {GATES}))
def test_vectors_that_no_hash_covers_are_refused(kind, complete_dir, one_line):
    write_others_as_before(complete_dir, load_expert(complete_dir).signatures[kind])
    with pytest.raises(ExpertFormatError, match="without a hash .* experts derive") as info:
        load_expert(complete_dir)
    assert KINDS[kind].file in one_line(info)


def test_saving_anew_replaces_both_files(older_dir):
    for signatures in load_expert(older_dir).signatures.values():
        signatures.save(older_dir)
    assert not (older_dir / RECORD_FILE).exists()
    assert load_expert(older_dir).gates.steps == 100


def test_a_record_in_the_header_counts_alone(older_dir, make_gates):
    """What a new file stands beside for a moment, and for good if that moment is the last."""
    stale = (older_dir / RECORD_FILE).read_bytes()
    new = make_gates(older_dir, steps=7)
    new.save(older_dir)
    for left in (stale, b"no json"):
        (older_dir / RECORD_FILE).write_bytes(left)
        assert load_expert(older_dir).gates.steps == 7


def test_an_older_release_may_write_over_a_new_file(expert_dir, make_gates):
    write_as_before(expert_dir, make_gates(expert_dir, steps=11))
    assert load_expert(expert_dir).gates.steps == 11


@pytest.mark.parametrize("gone", [GATES_FILE, RECORD_FILE])
def test_half_a_pair_is_a_format_error(gone, older_dir):
    (older_dir / gone).unlink()
    with pytest.raises(ExpertFormatError, match=gone):
        load_expert(older_dir)


def test_vectors_of_another_pair_are_refused(older_dir, one_line):
    tensors = load_file(older_dir / GATES_FILE)
    save_file({name: v + 1 for name, v in tensors.items()}, older_dir / GATES_FILE)
    with pytest.raises(ExpertFormatError, match="hash differs") as info:
        load_expert(older_dir)
    assert GATES_FILE in one_line(info)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_versions_are_refused(version, older_dir, edit_json, one_line):
    edit_json(older_dir / RECORD_FILE, format_version=version)
    with pytest.raises(ExpertFormatError, match="format_version") as info:
        load_expert(older_dir)
    assert repr(version) in one_line(info)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff", b'{"format_version": 1}', b"[" * 5000], ids=len
)
def test_a_bad_config_is_a_format_error(text, older_dir, one_line):
    (older_dir / RECORD_FILE).write_bytes(text)
    with pytest.raises(ExpertFormatError) as info:
        load_expert(older_dir)
    one_line(info)


@pytest.mark.parametrize(
    "fields",
    [{"base": None}, {"base": {"name": "x"}}, {"base": []}, {"colour": "red"}, {"adapter": None}],
    ids=str,
)
def test_fields_of_another_kind_are_a_format_error(fields, older_dir, edit_json, one_line):
    edit_json(older_dir / RECORD_FILE, **fields)
    with pytest.raises(ExpertFormatError, match="missing or unknown") as info:
        load_expert(older_dir)
    one_line(info)


@pytest.mark.parametrize("field", ["base", "adapter", "gates"])
def test_a_missing_field_is_a_format_error(field, older_dir):
    path = older_dir / RECORD_FILE
    config = json.loads(path.read_text())
    del config[field]
    path.write_text(json.dumps(config))
    with pytest.raises(ExpertFormatError, match=field):
        load_expert(older_dir)


def test_an_interrupt_before_the_old_record_is_gone(older_dir, make_gates, monkeypatch):
    new = make_gates(older_dir, steps=3)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(older_dir), "unlink", interrupt)
        with pytest.raises(KeyboardInterrupt):
            new.save(older_dir)
    assert (older_dir / RECORD_FILE).exists()
    assert load_expert(older_dir).gates.steps == 3
