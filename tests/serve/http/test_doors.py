"""The routes of vLLM's own application, in every mode that it has: none is new to us."""

import json
import os
import subprocess
import sys

import pytest

from phatgoose.serve.http.routes import RULES

LOOK = """
import json, sys
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
from phatgoose.serve.http.routes import unknown

parser = make_arg_parser(FlexibleArgumentParser())
given = json.loads(sys.argv[1])
args = parser.parse_args(["--model", "x", *given["flags"]])
app = build_app(args, tuple(given["tasks"]), None)
print(json.dumps({"unknown": unknown(app.routes), "count": len(app.routes)}))
"""
TASKS = [
    ["generate"],
    ["generate", "transcription", "realtime"],
    ["embed", "classify", "token_embed", "token_classify"],
    ["render"],
]
FLAGS = ["--enable-offline-docs", "--enable-tokenizer-info-endpoint", "--enable-fault-tolerance"]
MODES = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
}


def look(tasks, flags, environment):
    given = json.dumps({"tasks": tasks, "flags": flags})
    done = subprocess.run(
        [sys.executable, "-c", LOOK, given],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "VLLM_NO_USAGE_STATS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("tasks", TASKS, ids=lambda tasks: tasks[0] + str(len(tasks)))
@pytest.mark.parametrize("environment", [{}, MODES], ids=["plain", "all modes"])
def test_every_route_of_vllms_is_in_our_list(tasks, environment):
    """A new version's new route fails here; until it is in the list, the server closes it."""
    pytest.importorskip("vllm.version", reason="vLLM is not installed here: make test-vllm")
    found = look(tasks, FLAGS if environment else [], environment)
    assert found["unknown"] == []
    assert found["count"] > 10


def test_the_list_would_notice(monkeypatch):
    """The control: without a line of the list, its route is new."""
    pytest.importorskip("vllm.version", reason="vLLM is not installed here: make test-vllm")
    assert any("POST /invocations" in lines for lines in RULES.values())
    script = LOOK.replace(
        "parser =",
        "from phatgoose.serve.http import routes\n"
        "routes._KNOWN[:] = [one for one in routes._KNOWN if one.path != '/invocations']\n"
        "parser =",
        1,
    )
    monkeypatch.setattr(sys.modules[__name__], "LOOK", script)
    assert look(["generate"], [], {})["unknown"] == ["POST /invocations"]
