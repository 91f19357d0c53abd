"""Importing published pools, from synthetic checkpoints in the authors' format."""

import hashlib
import json
import os
import warnings
import zipfile

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, LlamaConfig, PreTrainedTokenizerFast

from phatgoose.errors import (
    ConfigError,
    ExpertFormatError,
    ExpertNotFoundError,
    IncompatibleExpertError,
)
from phatgoose.experts import (
    identify_base,
    linear_modules,
    load_expert,
    lora,
    released,
    verify_expert,
)
from phatgoose.experts.lora import CONFIG_FILE, WEIGHTS_FILE
from phatgoose.experts.released import FLAN_NAMES, P3_NAMES, import_released
from phatgoose.files import PARTIAL

RANK = 16
LAYER1, LAYER2 = "_addons.expert_lora.layer1__", "_addons.expert_lora.layer2__"
GATE = "_addons.router.expert_embeddings__"
SITE = "encoder.block.0.layer.0.SelfAttention.q"


def published(sizes, experts, *, rank=RANK, dtype=torch.float32):
    """A checkpoint as the authors save it: random experts for modules of these sizes."""
    tensors = {
        f"{side}.embed_tokens.weight": torch.randn(20, 12) for side in ("encoder", "decoder")
    }
    for name, (inputs, outputs) in sizes.items():
        for i in range(experts):
            tensors[f"{name}.{LAYER1}{i}"] = torch.randn(inputs, rank).to(dtype)
            tensors[f"{name}.{LAYER2}{i}"] = torch.randn(rank, outputs).to(dtype)
            tensors[f"{name}.{GATE}{i}"] = torch.randn(inputs).to(dtype)
    return tensors


@pytest.fixture
def model(make_base):
    return make_base("t5").eval()


@pytest.fixture
def sizes(model):
    """What the authors adapt: every linear layer but the head."""
    return {name: size for name, size in linear_modules(model).items() if name != "lm_head"}


@pytest.fixture
def base(model, tmp_path):
    """A folder with the base's config and nothing else."""
    model.config.save_pretrained(tmp_path / "tiny-t5")
    return str(tmp_path / "tiny-t5")


@pytest.fixture
def few(sizes):
    """Five experts of four modules: enough for everything but the counts."""
    return published(dict(list(sizes.items())[::7]), 5)


@pytest.fixture
def run(base, tmp_path):
    """run(tensors, ...): save them as best.pt and import them into tmp_path/out."""

    def call(tensors=None, **options):
        path = tmp_path / "best.pt"
        if tensors is not None:
            torch.save(tensors, path)
        options = {"base": base, "out": tmp_path / "out", "progress": False, **options}
        return import_released(path, options.pop("base"), options.pop("out"), **options)

    return call


def contents(folder):
    """Every file below a folder, hidden ones too, by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def adapted(model, folder):
    """The model with the folder's adapter, loaded by PEFT, which warns about keys it misses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")
        warnings.filterwarnings("error", message=".*unexpected.*")
        loaded = PeftModel.from_pretrained(model, folder)
    missing, unexpected = loaded.load_adapter(folder, "again")
    assert not unexpected and not [key for key in missing if "lora_" in key and "again" in key]
    return loaded.eval()


@torch.no_grad()
def test_36_experts_load_in_peft_and_compute_the_published_product(run, sizes, model):
    tensors = published(sizes, 36)
    folders = run(tensors)
    assert [folder.name for folder in folders] == list(P3_NAMES)
    for i in (0, 17, 35):
        loaded = adapted(model, folders[i])
        layers = {
            name.removeprefix("base_model.model."): layer
            for name, layer in loaded.named_modules()
            if isinstance(layer, LoraLayer)
        }
        assert set(layers) == set(sizes)
        for name, layer in layers.items():
            x = torch.randn(3, sizes[name][0])
            product = x @ tensors[f"{name}.{LAYER1}{i}"] @ tensors[f"{name}.{LAYER2}{i}"] / RANK
            torch.testing.assert_close(layer(x), layer.base_layer(x) + product)
        model = loaded.unload()


def test_every_tensor_arrives_unchanged(run, sizes):
    tensors = published(sizes, 36)
    for i, folder in enumerate(run(tensors)):
        expert = load_expert(folder)
        assert set(expert.modules) == set(expert.gates.vectors) == set(sizes)
        for name, module in expert.modules.items():
            assert torch.equal(module.a.T, tensors[f"{name}.{LAYER1}{i}"])
            assert torch.equal(module.b.T, tensors[f"{name}.{LAYER2}{i}"])
            assert torch.equal(expert.gates.vectors[name], tensors[f"{name}.{GATE}{i}"])
            assert module.scale == 1 / RANK


def test_the_published_order():
    # The keys of the authors' full_dataset_dict (scripts/concatenate.py), one a line.
    digest = hashlib.sha256("\n".join(FLAN_NAMES).encode()).hexdigest()
    assert digest == "699090356852d97ee8ee47888704071b2f5fdf21422ae7e1c4d63649a496cfe7"
    assert (len(P3_NAMES), len(FLAN_NAMES), len({n.lower() for n in FLAN_NAMES})) == (36, 166, 166)
    assert FLAN_NAMES[:36] == P3_NAMES
    landmarks = {0: "P3Agnews", 35: "P3Dbpedia14", 36: "Flanv2zsAi2arceasy"}
    landmarks |= {71: "Flanv2zsWordsegment", 72: "Niv2zsTranslation", 146: "Niv2zsMisc"}
    landmarks |= {147: "P3Wscfixed", 165: "Flanv2zsWmt14translatefren"}
    assert {i: FLAN_NAMES[i] for i in landmarks} == landmarks


def test_166_experts_get_the_published_names(run, sizes):
    tensors = published({SITE: sizes[SITE]}, 166, rank=2)
    folders = run(tensors)
    assert [folder.name for folder in folders] == list(FLAN_NAMES)
    i = FLAN_NAMES.index("Niv2zsMisc")
    assert torch.equal(load_expert(folders[i]).modules[SITE].a.T, tensors[f"{SITE}.{LAYER1}{i}"])
    assert "Natural Instructions v2 category Misc" in (folders[i] / "README.md").read_text()


def test_other_counts_are_numbered(run, few, tmp_path):
    folders = run(few)
    assert folders == [tmp_path / "out" / f"expert_{i:03d}" for i in range(5)]
    assert "number 4 of its pool" in (folders[4] / "README.md").read_text()


def test_an_imported_expert_is_sound(run, few, model, base):
    for i, folder in enumerate(run(few)):
        assert verify_expert(folder, model) == []
        record = load_expert(folder).gates.record
        assert record.base == identify_base(model, name=base)
        assert record.base.name == "tiny-t5"
        assert record.training == {"imported_from": "best.pt", "index": i}
        assert set(contents(folder)) == {*released_files(), "README.md"}


def released_files():
    return {CONFIG_FILE, WEIGHTS_FILE, "phatgoose_gates.safetensors"}


def test_the_config_is_what_peft_writes(run, few, base, model):
    folder = run(few)[0]
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == base
    assert (config["peft_type"], config["task_type"]) == ("LORA", "SEQ_2_SEQ_LM")
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (RANK, 1, True)
    loaded = adapted(model, folder)
    loaded.save_pretrained(folder.parent / "again", selected_adapters=["default"])
    again = json.loads((folder.parent / "again" / CONFIG_FILE).read_text())
    assert set(config["target_modules"]) == set(load_expert(folder).modules)
    assert set(again) == set(config)
    assert load_expert(folder.parent / "again").modules.keys() == load_expert(folder).modules.keys()


@torch.no_grad()
def test_modules_may_differ_between_experts(run, sizes, model):
    names = [SITE, "encoder.block.1.layer.1.DenseReluDense.wo"]
    names.append("decoder.block.0.layer.1.EncDecAttention.k")
    tensors = published({name: sizes[name] for name in names}, 2)
    for part in (LAYER1, LAYER2, GATE):
        del tensors[f"{names[0]}.{part}1"]
    first, second = run(tensors)
    assert set(load_expert(first).modules) == set(names)
    assert set(load_expert(second).modules) == set(names[1:])
    layers = [n for n, m in adapted(model, second).named_modules() if isinstance(m, LoraLayer)]
    assert {name.removeprefix("base_model.model.") for name in layers} == set(names[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept_and_gates_are_fp32(dtype, run, sizes):
    tensors = published({SITE: sizes[SITE]}, 1, dtype=dtype)
    expert = load_expert(run(tensors)[0])
    assert expert.modules[SITE].a.dtype == expert.modules[SITE].b.dtype == dtype
    assert expert.gates.vectors[SITE].dtype == torch.float32
    assert torch.equal(expert.gates.vectors[SITE], tensors[f"{SITE}.{GATE}0"].float())


def test_tensors_that_share_memory_are_separated(run, sizes):
    gates = torch.randn(2, 12)
    tensors = published({SITE: sizes[SITE], "encoder.block.0.layer.0.SelfAttention.k": (12, 10)}, 2)
    tied = {k: gates[int(k[-1])] if GATE in k else t for k, t in tensors.items()}
    for i, folder in enumerate(run(tied)):
        vectors = load_expert(folder).gates.vectors
        assert len(vectors) == 2 and all(torch.equal(v, gates[i]) for v in vectors.values())


def test_two_imports_write_the_same_bytes(run, few, tmp_path):
    run(few)
    run(few, out=tmp_path / "second")
    assert contents(tmp_path / "out") == contents(tmp_path / "second")


def test_the_file_is_mapped_and_never_run(run, few, monkeypatch):
    calls = []
    real = torch.load

    def load(*args, **options):
        calls.append(options)
        return real(*args, **options)

    monkeypatch.setattr(torch, "load", load)
    run(few)
    assert calls == [{"weights_only": True, "mmap": True, "map_location": "cpu"}]


def test_given_names(run, few, tmp_path):
    names = ["boolq", "a.b", "C-3", "d_4", "5"]
    assert run(few, names=names) == [tmp_path / "out" / name for name in names]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], "holds 5 experts, got 2 names"),
        (list("abcdef"), "got 6 names"),
        ([], "got 0 names"),
        ("abcde", "got one string"),
        (["a", "b", "c", "d", "A"], "'A' comes twice"),
        (["a", "b", "c", "d", ""], "no safe folder name"),
        (["a", "b", "c", "d", ".."], "no safe folder name"),
        (["a", "b", "c", "d", ".e"], "no safe folder name"),
        (["a", "b", "c", "d", "e/f"], "no safe folder name"),
        (["a", "b", "c", "d", "e\n"], "no safe folder name"),
        (["a", "b", "c", "d", "é"], "no safe folder name"),
    ],
)
def test_bad_names_are_refused(names, message, run, few, tmp_path, one_line):
    with pytest.raises(ConfigError, match=message) as info:
        run(few, names=names)
    one_line(info)
    assert not (tmp_path / "out").exists()


# --- Interrupted and repeated imports


def test_an_interrupted_import_resumes(run, few, tmp_path, monkeypatch):
    out, done = tmp_path / "out", []
    real = lora.write_json

    def interrupt_third(path, value):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path)
        real(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(lora, "write_json", interrupt_third)
        with pytest.raises(KeyboardInterrupt):
            run(few)
    assert sorted(os.listdir(out)) == ["expert_000", "expert_001"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    leftover = out / f".expert_002{PARTIAL}"  # as a killed process leaves it
    leftover.mkdir()
    (leftover / "junk").write_text("half")
    assert len(run(few)) == 5
    assert sorted(os.listdir(out)) == [f"expert_{i:03d}" for i in range(5)]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "expert_002/junk" not in contents(out)
    whole = contents(out)
    run(few, out=tmp_path / "at-once")
    assert contents(tmp_path / "at-once") == whole


def test_a_second_import_changes_nothing(run, few, tmp_path):
    first = run(few)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert run(few) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def nudge(tensors):
    key = sorted(tensors)[0]
    tensors[key] = tensors[key] + 1


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder, edit: edit(folder / WEIGHTS_FILE, nudge), "gates were made for"),
        (lambda folder, edit: (folder / WEIGHTS_FILE).write_bytes(b"half"), "not a readable"),
        (lambda folder, edit: (folder / "phatgoose_gates.safetensors").unlink(), "it has no gates"),
        (
            lambda folder, edit: [p.unlink() for p in folder.glob("phatgoose_*")],
            "it has no gates",
        ),
        (lambda folder, edit: [p.unlink() for p in folder.iterdir()], "no adapter_config"),
    ],
    ids=["adapter", "truncated", "half", "no gates", "empty"],
)
def test_a_folder_that_changed_is_not_overwritten(
    spoil, reason, run, few, tmp_path, edit_tensors, one_line
):
    folder = run(few)[3]
    spoil(folder, edit_tensors)
    before = contents(tmp_path / "out")
    with pytest.raises(ExpertFormatError, match=reason) as info:
        run()
    assert one_line(info).startswith(f"{folder}: exists and is not the expert_003")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(("part", "reason"), [(LAYER2, "adapter differs"), (GATE, "gates differ")])
def test_another_pool_is_not_overwritten(part, reason, run, few, tmp_path):
    run(few)
    before = contents(tmp_path / "out")
    other = {k: t + 1 if k.endswith(f"{part}0") else t for k, t in few.items()}
    with pytest.raises(ExpertFormatError, match=reason):
        run(other)
    assert contents(tmp_path / "out") == before


def test_a_pool_of_another_base_is_not_overwritten(run, few, model, tmp_path):
    run(few)
    model.config.num_layers = 3
    model.config.save_pretrained(tmp_path / "deeper")
    with pytest.raises(ExpertFormatError, match="sizes of their linear layers"):
        run(base=str(tmp_path / "deeper"))


def test_a_file_in_the_way_is_not_overwritten(run, few, tmp_path, one_line):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "expert_001").write_text("mine")
    with pytest.raises(ExpertFormatError, match="not a folder but a file") as info:
        run(few)
    one_line(info)
    assert (tmp_path / "out" / "expert_001").read_text() == "mine"


# --- The base


def test_a_base_of_other_sizes_is_refused_before_anything_is_written(
    run, few, make_base, tmp_path, one_line
):
    make_base("t5", width=14).config.save_pretrained(tmp_path / "wide")
    with pytest.raises(IncompatibleExpertError, match="maps 12 to 10 features") as info:
        run(few, base=str(tmp_path / "wide"))
    assert "best.pt on " in one_line(info)
    assert not (tmp_path / "out").exists()


def test_a_module_the_base_lacks_is_refused(run, few, make_base, tmp_path, sizes):
    make_base("t5", gated=False).config.save_pretrained(tmp_path / "plain")
    name = "encoder.block.0.layer.1.DenseReluDense.wi_0"
    tensors = published({name: sizes[name]}, 2)
    with pytest.raises(IncompatibleExpertError, match="wi_0, which is no linear layer"):
        run(tensors, base=str(tmp_path / "plain"))


def test_a_decoder_only_base_is_refused(run, few, tmp_path, one_line):
    LlamaConfig(hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path / "llama")
    with pytest.raises(IncompatibleExpertError, match="no encoder-decoder") as info:
        run(few, base=str(tmp_path / "llama"))
    one_line(info)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "{}",
        "[1]",
        '{"model_type": "no-such-type"}',
        '{"model_type": "t5", "d_model": "wide"}',
    ],
)
def test_a_base_without_a_usable_config_is_refused(content, run, few, tmp_path, one_line):
    folder = tmp_path / "broken"
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(content)
    # transformers 5.2 does not look at a config's sizes before it makes the model.
    errors = ExpertNotFoundError, IncompatibleExpertError
    with pytest.raises(errors, match="config cannot be had|makes no model") as info:
        run(few, base=str(folder))
    assert one_line(info).startswith(str(folder))


def test_an_unreachable_base_is_one_line(run, few, monkeypatch, one_line):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your connection.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ExpertNotFoundError, match=r"owner/base.*couldn't connect") as info:
        run(few, base="owner/base")
    one_line(info)


def test_code_in_the_base_is_not_run(run, few, base, tmp_path, edit_json):
    folder = tmp_path / "tiny-t5"
    edit_json(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "code.MineConfig"})
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ExpertNotFoundError):
        run(few)
    assert not (tmp_path / "ran").exists()


def test_the_tokenizer_is_part_of_the_identity(run, few, base, model, tmp_path):
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "one": 3, "two": 4}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), unk_token="<unk>"
    )
    tokenizer.save_pretrained(base)
    found = load_expert(run(few)[0]).gates.record.base
    assert found.tokenizer == identify_base(model, tokenizer).tokenizer is not None


def test_no_tokenizer_is_made_up(run, few):
    """transformers invents one for a T5 without vocabulary; its hash would fit no other base."""
    assert load_expert(run(few)[0]).gates.record.base.tokenizer is None


def test_the_card_links_a_base_on_the_hub(run, few, base, monkeypatch):
    real = AutoConfig.from_pretrained
    monkeypatch.setattr(
        AutoConfig, "from_pretrained", lambda name, **options: real(base, **options)
    )
    monkeypatch.setattr(released, "_open_tokenizer", lambda name: None)
    folder = run(few, base="google/t5-xl-lm-adapt")[0]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: google/t5-xl-lm-adapt\n")
    assert "2402.05859" in card
    assert load_expert(folder).gates.record.base.name == "google/t5-xl-lm-adapt"
    assert load_expert(folder).base_name == "google/t5-xl-lm-adapt"


def test_the_card_of_a_local_base_links_nothing(run, few):
    card = (run(few)[0] / "README.md").read_text()
    assert "base_model" not in card and "2402.05859" in card


# --- Checkpoints that are none


def key(part, index=0, site=SITE):
    return f"{site}.{part}{index}"


@pytest.mark.parametrize("part", [LAYER1, LAYER2, GATE], ids=["layer1", "layer2", "gate"])
def test_a_missing_part_is_named(part, run, few, tmp_path, one_line):
    del few[key(part, 2)]
    with pytest.raises(ExpertFormatError) as info:
        run(few)
    assert f"but no {key(part, 2)}" in one_line(info)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "shared.weight",
        "lm_head.weight",
        f"{SITE}.weight",
        f"{SITE}._addons.expert_lora.layer1",
        f"{SITE}._addons.expert_lora.layer1__",
        f"{SITE}._addons.expert_lora.layer1__01",
        f"{SITE}._addons.expert_lora.layer1__1_0",
        f"{SITE}._addons.expert_lora.layer3__0",
        f"{SITE}._addons.expert_lora.expert_input_gate",
        "_addons.expert_lora.layer1__0",
        "",
        7,
    ],
)
def test_unexpected_keys_are_named(name, run, few, one_line):
    with pytest.raises(ExpertFormatError, match="no part of a published pool") as info:
        run({**few, name: torch.ones(2)})
    assert repr(name) in one_line(info)


def test_a_retrieval_checkpoint_has_no_gates_to_import(run, few):
    tensors = {k: t for k, t in few.items() if GATE not in k}
    tensors |= {f"encoder.{GATE}{i}": torch.ones(384) for i in range(5)}
    with pytest.raises(ExpertFormatError, match="but no"):
        run(tensors)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        (key(LAYER1), torch.ones(12), r"\[12\], wanted \[in_features, rank\]"),
        (key(LAYER1), torch.ones(12, 0), r"\[12, 0\]"),
        (key(LAYER2), torch.ones(8, 10), r"\[8, 10\], wanted \[16, out_features\]"),
        (key(LAYER2), torch.ones(16), r"\[16\]"),
        (key(GATE), torch.ones(1, 12), r"\[1, 12\], wanted \[12\]"),
        (key(GATE), torch.ones(11), r"\[11\], wanted \[12\]"),
        (key(GATE), torch.ones(12, dtype=torch.int64), "int64, a tensor of floats is wanted"),
        (key(GATE), [1.0, 2.0], "list, a tensor of floats is wanted"),
        (key(GATE), None, "NoneType, a tensor of floats is wanted"),
    ],
)
def test_wrong_tensors_are_named(name, value, found, run, few, one_line):
    with pytest.raises(ExpertFormatError, match=found) as info:
        run({**few, name: value})
    assert name in one_line(info)


def test_one_rank_for_an_expert(run, few, sizes):
    site = sorted(name for name in {k.split("._addons")[0] for k in few if "_addons" in k})[-1]
    inputs, outputs = sizes[site]
    few[key(LAYER1, 1, site)] = torch.ones(inputs, 4)
    few[key(LAYER2, 1, site)] = torch.ones(4, outputs)
    with pytest.raises(ExpertFormatError, match=r"layer1__1 has shape \[\d+, \d+\], wanted"):
        run(few)


def test_a_gap_in_the_numbers(run, few):
    tensors = {k: t for k, t in few.items() if not k.endswith("__3")}
    with pytest.raises(ExpertFormatError, match="4 experts up to number 4, but none with number 3"):
        run(tensors)


@pytest.mark.parametrize("value", [{}, {"encoder.embed_tokens.weight": torch.ones(2, 2)}])
def test_no_experts(value, run):
    with pytest.raises(ExpertFormatError, match="holds no experts"):
        run(value)


@pytest.mark.parametrize("value", [torch.ones(3), [1, 2], None], ids=["tensor", "list", "None"])
def test_not_a_mapping(value, run, tmp_path):
    torch.save(value, tmp_path / "best.pt")
    with pytest.raises(ExpertFormatError, match="a mapping of tensors is wanted"):
        run()


def test_a_config_that_makes_no_model_is_refused(run, few, base, tmp_path, edit_json, one_line):
    edit_json(tmp_path / "tiny-t5" / "config.json", d_ff=-1)
    with pytest.raises(IncompatibleExpertError, match="makes no model") as info:
        run(few)
    one_line(info)


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated_files(share, run, few, tmp_path, one_line):
    run(few)
    path = tmp_path / "best.pt"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ExpertFormatError, match="not a readable torch checkpoint") as info:
        run()
    assert one_line(info).startswith(str(path))


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 24000000000\n",
        b"\0" * 100,
        b"PK\x03\x04" + b"\0" * 100,
        b"\x80\x02}q\x00.",
    ],
    ids=["lfs", "zeros", "zip", "pickle"],
)
def test_other_files(content, run, tmp_path, one_line):
    (tmp_path / "best.pt").write_bytes(content)
    with pytest.raises(ExpertFormatError, match="not a readable torch checkpoint") as info:
        run()
    one_line(info)


def test_no_file(run, tmp_path, one_line):
    with pytest.raises(ExpertFormatError, match="no such file") as info:
        run()
    one_line(info)
    (tmp_path / "best.pt").mkdir()
    with pytest.raises(ExpertFormatError, match="is a folder"):
        run()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: t * torch.nan, "NaN or infinite"),
        (lambda t: t.double() * 1e300, "beyond float32"),
        (lambda t: t[:1, :1].clone().expand(t.shape), "without values of its own"),
        (lambda t: t.to_sparse(), "without values of its own"),
        (lambda t: t.to("meta"), "without values of its own"),
        (lambda t: t.to(torch.int32), "floats is wanted"),
    ],
)
@pytest.mark.parametrize("part", ["layer1", "expert_embeddings"])
def test_values_that_are_none(spoil, says, part, run, few, one_line, tmp_path):
    if part == "expert_embeddings" and says == "without values of its own":
        pytest.skip("tried with a matrix")
    key = next(key for key in few if part in key)
    with pytest.raises(ExpertFormatError, match=says) as info:
        run({**few, key: spoil(few[key])})
    assert one_line(info).startswith(str(tmp_path / "best.pt"))
    assert not (tmp_path / "out").exists()


def test_more_than_the_file_has(run, few, tmp_path):
    shared = max(few.values(), key=lambda tensor: tensor.numel())
    sizes = {k: t.shape for k, t in few.items()}
    views = {k: shared.flatten()[: size.numel()].view(size) for k, size in sizes.items()}
    with pytest.raises(ExpertFormatError, match="more than the file"):
        run(views)


def test_a_packed_archive_is_not_unpacked(run, few, tmp_path):
    path = tmp_path / "best.pt"
    torch.save(few, tmp_path / "plain.pt")
    packed = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(ExpertFormatError, match="is compressed"):
        run()


class RunsCode:
    """Pickled, it asks whoever opens it to make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(zipped, run, few, tmp_path, one_line):
    tensors = {**few, "x": RunsCode(tmp_path / "ran")}
    path = tmp_path / "best.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ExpertFormatError, match="pickle that wants" if zipped else "torch") as info:
        run()
    one_line(info)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # so the trap was a real one


def test_progress_goes_to_stderr(run, few, capsys):
    run(few)
    assert capsys.readouterr().err == ""
    run(few, progress=True)
    printed = capsys.readouterr()
    assert printed.out == "" and "experts" in printed.err and "5/5" in printed.err
