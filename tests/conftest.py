"""What all tests share: no network, one thread, and hypothesis without a clock."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import pytest
import torch
from hypothesis import HealthCheck, settings

from phatgoose import ExpertPool
from tests.models import make_model, mixed_targets, save_experts

torch.set_num_threads(1)  # pytest-xdist has the other cores

settings.register_profile(
    "default", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


# What make test-oldest and make test-newest run: all that reads what a library names or computes.
CORE = (
    "cli/test_help.py",
    "cli/test_inference.py",
    "evaluation/test_harness.py",
    "evaluation/test_scoring.py",
    "experts/test_base.py",
    "experts/test_lora.py",
    "experts/test_save.py",
    "experts/test_signatures.py",
    "nn/test_context.py",
    "pool/test_generation.py",
    "pool/test_golden.py",
    "pool/test_merge.py",
    "pool/test_parity.py",
    "pool/test_routing.py",
    "routers/test_evidence.py",
    "train/test_adapter.py",
    "train/test_gates.py",
    "train/test_trainer.py",
    "train/loop/test_placement.py",
)


def pytest_collection_modifyitems(config, items):
    """Mark the core, and leave out what takes minutes of many threads unless it is asked for."""
    tests = Path(__file__).parent
    missing = [name for name in CORE if not (tests / name).exists()]
    if missing:
        raise pytest.UsageError(f"tests/conftest.py: CORE names {', '.join(missing)}: not there.")
    core = {tests / name for name in CORE}
    for item in items:
        if item.path in core:
            item.add_marker(pytest.mark.core)
    if "stress" not in config.option.markexpr:
        stress = [item for item in items if item.get_closest_marker("stress")]
        config.hook.pytest_deselected(items=stress)
        items[:] = [item for item in items if item not in stress]


@pytest.fixture(scope="session")
def saved_experts(tmp_path_factory):
    """saved_experts(family, count): folders made once, for all tests that only read them."""
    made = {}

    def save(family, count, **config):
        key = (family, count, repr(config))
        if key not in made:
            root, targets = tmp_path_factory.mktemp(family), mixed_targets(family, count)
            made[key] = save_experts(root, make_model(family), targets, **config)
        return made[key]

    return save


@pytest.fixture
def model_and_pool(saved_experts):
    """model_and_pool(family, count): a tiny model and a pool of experts of mixed layers for it."""

    def make(family="llama", count=4, **config):
        return make_model(family), ExpertPool.load(saved_experts(family, count, **config))

    return make
