"""Starting engines, and what they are compared with."""

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from phatgoose import ExpertPool, assign, route, unroute
from tests.serve.server import on_cores

ROOT = Path(__file__).parents[2]
SECONDS = 600  # for an engine to start, compile, and answer


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:
        skip = pytest.mark.skip(reason="vLLM is not installed here: make test-vllm")
        for item in items:
            if {"engine", "load", "server", "starts"} & set(getattr(item, "fixturenames", ())):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """engine(model, settings, rounds, ...): the answers of a vLLM engine that serves the pool.

    With `runs`, another module than `tests.serve.run_engine`, `rounds` are what that module takes.
    """
    cache = tmp_path_factory.mktemp("vllm")

    def run(
        model,
        settings,
        rounds,
        *,
        runs="tests.serve.run_engine",
        tokens=24,
        fails=False,
        environment=None,
        **llm,
    ):
        folder = tmp_path_factory.mktemp("engine")
        ranks = llm.get("tensor_parallel_size", 1) * llm.get("pipeline_parallel_size", 1)
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
            [sys.executable, "-m", runs, folder / "job.json", folder / "out.json"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={
                **os.environ,
                "VLLM_CPU_KVCACHE_SPACE": "1",
                **on_cores(ranks),
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
def load(tmp_path_factory):
    """load(model, settings): the model as a vLLM worker would load it, and vLLM's configuration."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    meeting = f"file://{tmp_path_factory.mktemp('group') / 'meeting'}"

    def run(model, settings, **more):
        config = EngineArgs(
            model=str(model),
            dtype="float32",
            max_model_len=64,
            load_format="phatgoose",
            skip_tokenizer_init=True,
            enforce_eager=True,
            additional_config={} if settings is None else {"phatgoose": settings},
            **more,
        ).create_engine_config()
        with set_current_vllm_config(config):
            if not torch.distributed.is_initialized():
                init_distributed_environment(1, 0, meeting, 0, "gloo")
            destroy_model_parallel()  # its groups depend on the model
            initialize_model_parallel(1, 1)
            loader = get_model_loader(config.load_config)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as a CPU worker
                loaded = loader.load_model(vllm_config=config, model_config=config.model_config)
        return loaded, config

    return run


@pytest.fixture(scope="session")
def reference():
    """reference(model, experts, prompts, ...): greedy answers of `route` on transformers.

    With `choice`, every prompt asks for it.
    """

    def answer(model, experts, prompts, *, tokens=24, choice=None, **settings):
        if not experts:
            return [{**_greedy(model, prompt, tokens), "gap": math.inf} for prompt in prompts]
        route(model, ExpertPool.load(experts), **settings)
        rows = contextlib.nullcontext() if choice is None else assign(model, [choice])
        with rows, _watching(model) as gaps:
            answers = []
            for prompt in prompts:
                gaps.clear()
                answers.append(
                    {**_greedy(model, prompt, tokens), "gap": min(gaps, default=math.inf)}
                )
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


@contextlib.contextmanager
def _watching(model):
    """A list that gets, from every routed layer, the least gap between the last chosen candidate's
    score and that of the first one left out."""
    gaps, handles = [], []

    def look(site, x):
        bank, settings = site.bank, site.state.settings
        signatures = bank.signatures[site.part]
        scores = site.state.router.score(x.flatten(0, -2), signatures)
        forward = site.state.forward()
        prior = site.state.prior(forward, *site.state.keeper.find(site.name, x, forward))
        if prior is not None:
            scores = scores + site._of_slots(prior, scores.shape[1])
        scores = scores[:, bank.open[site.part]]
        if settings.null_score is not None:
            null = scores.new_full((len(scores), 1), settings.null_score)
            scores = torch.cat([scores, null], dim=1)
        kept = settings.kept(scores.shape[1])
        if scores.shape[1] > kept:
            best = scores.sort(dim=1, descending=True).values
            gaps.append(float((best[:, kept - 1] - best[:, kept]).min()))

    for site in model._phatgoose.sites.values():
        handles.append(
            site.layer.register_forward_pre_hook(lambda _, inputs, site=site: look(site, inputs[0]))
        )
    yield gaps
    for handle in handles:
        handle.remove()
