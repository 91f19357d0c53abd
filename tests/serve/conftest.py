"""Starting engines, and what they are compared with."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from phatgoose import ExpertPool, route, unroute

ROOT = Path(__file__).parents[2]
SECONDS = 600  # for an engine to start, compile, and answer


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:
        skip = pytest.mark.skip(reason="vLLM is not installed here: make test-vllm")
        for item in items:
            if "engine" in getattr(item, "fixturenames", ()):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """engine(model, settings, rounds, ...): the answers of a vLLM engine that serves the pool."""
    cache = tmp_path_factory.mktemp("vllm")

    def run(model, settings, rounds, *, tokens=24, fails=False, environment=None, **llm):
        folder = tmp_path_factory.mktemp("engine")
        ranks = llm.get("tensor_parallel_size", 1)
        job = {
            "llm": {
                "model": str(model),
                "dtype": "float32",
                "max_model_len": 512,
                "load_format": "phatgoose",
                "skip_tokenizer_init": True,
                "additional_config": {} if settings is None else {"phatgoose": settings},
                **llm,
            },
            "tokens": tokens,
            "rounds": rounds,
        }
        (folder / "job.json").write_text(json.dumps(job))
        done = subprocess.run(
            [sys.executable, "-m", "tests.serve.engine", folder / "job.json", folder / "out.json"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={
                **os.environ,
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "|".join("01"[:ranks]),
                "VLLM_CACHE_ROOT": str(cache),
                "VLLM_NO_USAGE_STATS": "1",
                **(environment or {}),
            },
        )
        if fails:
            assert done.returncode != 0, "the engine started"
            assert not (folder / "out.json").exists()
            return done.stdout + done.stderr
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
        return json.loads((folder / "out.json").read_text())

    return run


@pytest.fixture(scope="session")
def reference():
    """reference(model, experts, prompts, ...): greedy answers of `route` on transformers."""

    def answer(model, experts, prompts, *, tokens=24, **settings):
        if experts:
            route(model, ExpertPool.load(experts), **settings)
        answers = [_greedy(model, prompt, tokens) for prompt in prompts]
        if experts:
            unroute(model)
        return answers

    return answer


@torch.no_grad()
def _greedy(model, prompt, tokens):
    """Not `generate`, which stops at an end of sequence or forbids it."""
    cache, ids, answer = None, torch.tensor([prompt]), {"tokens": [], "logprobs": []}
    for _ in range(tokens):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        logprob, token = output.logits[0, -1].log_softmax(-1).max(-1)
        cache, ids = output.past_key_values, token.view(1, 1)
        answer["tokens"].append(int(token))
        answer["logprobs"].append(float(logprob))
    return answer
