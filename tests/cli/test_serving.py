"""serve: the command line that vLLM gets. tests/serve/test_server.py starts a server."""

import importlib.util
import json
import os
import sys

import pytest

from phatgoose.cli import serving
from phatgoose.cli.main import parse
from phatgoose.cli.serving import SPARE, vllm_flags
from phatgoose.default import CHAT_TEMPLATE, smollm2, tiny
from phatgoose.errors import ConfigError
from phatgoose.models import SMOLLM2, Base
from phatgoose.models import named as named_bases
from phatgoose.serve.http import access


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv(access.ADMIN_KEY, raising=False)


def flags(*words):
    """By name, with what follows; and those that were handed on."""
    _, asked = parse(["serve", *words])
    found, more = vllm_flags(asked), asked.more
    ours = found[: len(found) - len([word for word in more if word in found[-len(more) :]])]
    named = dict(zip(ours[::2], ours[1::2], strict=True))
    config = json.loads(named["--additional-config"])
    return named, config, found


def test_the_tiny_pool_by_name():
    named, config, _ = flags("--base", "tiny")
    assert named["--model"] == str(tiny.BASE)
    assert named["--chat-template"] == str(CHAT_TEMPLATE)
    assert named["--served-model-name"] == "pool"
    assert named["--load-format"] == "phatgoose"
    assert named["--host"] == "127.0.0.1"
    experts = [str(path) for path in tiny.expert_folders()]
    assert config == {"phatgoose": {"routing": True, "experts": experts}}


@pytest.fixture(autouse=True)
def found(monkeypatch):
    """The default base, as if it had been fetched."""
    base = Base(SMOLLM2, "/cache/base", "abc", "the Hub's weights")
    monkeypatch.setattr(named_bases, "smollm2_on_disk", lambda: base)


def test_alone_it_serves_the_default_pool():
    """From wherever its base is on this disk."""
    named, config, _ = flags()
    assert named["--model"] == "/cache/base"
    assert named["--chat-template"] == str(CHAT_TEMPLATE)
    assert config["phatgoose"]["experts"] == [str(path) for path in smollm2.expert_folders()]


def test_own_experts_of_the_default_base_keep_its_chat_template():
    folder = smollm2.expert_folders()[0]
    for more in ((), ("--base", smollm2.BASE)):  # which the expert names
        named, _, _ = flags("--experts", str(folder), *more)
        assert "--chat-template" not in named
        assert named["--model"] == flags()[0]["--model"]


def test_the_base_is_what_the_experts_name(tmp_path):
    for name, base in (
        ("a", "my/base"),
        ("b", "mirror/base-bnb-4bit"),
        ("c", None),
        ("d", "other"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        config = {"peft_type": "LORA", "base_model_name_or_path": base}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    assert flags("--experts", a, f"two={b}", c)[0]["--model"] == "my/base"
    for wrong, said in (([c], "names a base model"), ([a, d], "its base is other")):
        with pytest.raises(ConfigError, match=f"{said}.*[Pp]ass --base"):
            flags("--experts", *wrong)
    assert flags("--experts", a, d, "--base", "x", "--same-base")[1]["phatgoose"]["same_base"]


def test_what_is_given():
    named, config, _ = flags(
        *"--base b --experts x y --router average_activation --top-k 3 --temperature 0.5".split(),
        *"--scale unit --null-score 0.1 --capacity 9 --max-rank 8 --port 1 --background f".split(),
        *"--max-mixture 4".split(),
    )
    assert named["--model"] == "b"
    assert named["--port"] == "1"
    assert "--chat-template" not in named
    assert config["phatgoose"] == {
        "routing": True,
        "experts": ["x", "y"],
        "router": "average_activation",
        "top_k": 3,
        "temperature": 0.5,
        "scale": "unit",
        "null_score": 0.1,
        "capacity": 9,
        "max_rank": 8,
        "max_mixture": 4,
        "background": "f",
    }


def test_where_experts_may_be_added_there_is_room(monkeypatch):
    _, config, _ = flags("--base", "b", "--experts", "x", "--admin-key", "k")
    assert config["phatgoose"]["capacity"] == 1 + SPARE
    monkeypatch.setenv(access.ADMIN_KEY, "k")
    assert flags("--base", "b", "--experts", "x")[1]["phatgoose"]["capacity"] == 1 + SPARE


def test_keys_are_not_on_the_command_line():
    _, _, found = flags("--api-key", "secret1", "--admin-key", "secret2")
    assert not any("secret" in word for word in found)


def test_the_rest_is_for_vllm():
    more = ["--dtype", "float32", "-tp", "2", "--max-model-len=512", "--enforce-eager"]
    _, _, found = flags("--base", "b", "--experts", "x", *more, "--port", "1")
    assert found[-len(more) :] == more


def test_names_and_templates_that_vllm_is_given_stand():
    _, _, found = flags("--served-model-name", "mine", "--chat_template=t.jinja")
    assert found.count("--served-model-name") == 1
    assert "--chat-template" not in found


@pytest.mark.parametrize("flag", ["--additional-config", "--additional_config"])
def test_settings_without_a_flag(flag):
    text = json.dumps({"other": 1, "phatgoose": {"targets": ["q_proj"], "top_k": 1}})
    for words in ([flag, text], [f"{flag}={text}"]):
        _, config, _ = flags("--base", "b", "--experts", "x", "--top-k", "2", *words)
        assert config["other"] == 1
        assert config["phatgoose"]["targets"] == ["q_proj"]
        assert config["phatgoose"]["top_k"] == 2  # the flag wins


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["some/model"], "Say --base"),
        (["--model", "x"], "Say --base"),
        (["--load_format=auto"], "base_load_format"),
        (["--worker-cls", "x"], "ours"),
        (["--api-server-count", "2"], "one front end"),
        (["--headless"], "vLLM itself"),
        (["--additional-config", "{"], "must be a JSON object"),
        (["--additional-config"], "must be a JSON object"),
        (["--additional-config", "[]"], "must be a JSON object"),
        (["--additional-config", '{"phatgoose": 3}'], "must be a JSON object"),
    ],
)
def test_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        flags(*words)


@pytest.fixture
def asked(monkeypatch):
    """asked(word, ...): what serve hands to vLLM's server, which is not started."""
    started = []
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(serving.runpy, "run_module", lambda *_, **__: started.append(sys.argv))
    monkeypatch.setattr(serving, "_log_to_stderr", lambda: None)
    for name in (access.API_KEY, access.ALLOW_NO_KEY, access.EXPERTS_ROOT, access.ALLOW_HUB):
        monkeypatch.setenv(name, "x")  # so that what serve sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", [])

    def ask(*words):
        serving.serve(parse(["serve", *words])[1])
        return started.pop()

    return ask


def test_without_a_key_only_this_machine_is_served(asked):
    for host in ("0.0.0.0", "::", "", "192.0.2.1"):
        with pytest.raises(ConfigError, match="Set --api-key"):
            asked("--host", host)
    assert "0.0.0.0" in asked("--host", "0.0.0.0", "--allow-no-key")
    del os.environ[access.ALLOW_NO_KEY]
    assert "0.0.0.0" in asked("--host", "0.0.0.0", "--api-key", "k")
    assert "127.0.0.1" in asked("--api-key", "")
    assert "--uds" in asked("--host", "0.0.0.0", "--uds", "/tmp/socket")
    with pytest.raises(ConfigError, match="Set --api-key"):
        asked("--host", "0.0.0.0", "--api-key", "")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm(run):
    result = run("serve")
    assert (result.code, result.out) == (1, "")
    assert "pip install 'phatgoose[vllm]'" in result.err
