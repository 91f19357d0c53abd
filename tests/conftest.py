"""What all tests share: no network, one thread, and hypothesis without a clock."""

import os

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


@pytest.fixture
def model_and_pool(tmp_path):
    """model_and_pool(family, count): a tiny model and a pool of experts of mixed layers for it."""

    def make(family="llama", count=4, **config):
        model = make_model(family)
        targets = mixed_targets(family, count)
        return model, ExpertPool.load(save_experts(tmp_path / family, model, targets, **config))

    return make
