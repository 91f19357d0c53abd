"""The benchmark of serving, with vLLM: at sizes where its figures say nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_serving.py"


@pytest.mark.thorough
def test_a_pool_is_measured(tmp_path):
    """One contender, for a start takes a minute."""
    pytest.importorskip("vllm.version", reason="vLLM is not installed here: make test-vllm")
    if not SCRIPT.exists():
        pytest.skip("the source archive has no benchmarks")
    out = tmp_path / "serving.json"
    options = "--device cpu --eager --contenders phatgoose --experts 3 --requests 4 --concurrency 2"
    subprocess.run(
        [sys.executable, SCRIPT, *options.split(), "--folder", tmp_path / "run", "--out", out],
        check=True,
        timeout=600,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
    )
    [row] = json.loads(out.read_text())["rows"]
    assert row.get("note") is None, (tmp_path / "run" / "phatgoose.log").read_text()[-6000:]
    assert row["output_tokens_per_s"] > 0
    assert row["experts_used"] == 3
