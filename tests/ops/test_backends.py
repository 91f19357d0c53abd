"""Every backend of the routed layer's operators, against a float64 loop over tokens."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import phatgoose
from phatgoose.errors import ConfigError
from phatgoose.nn import RoutingSettings
from phatgoose.ops import backend_names, backends, choose_backend, routed_lora
from phatgoose.ops import routed_lora_reference as definition
from phatgoose.ops.backends import sorting
from tests.ops.gated import check_far_from_zero, check_gated, check_given, problems
from tests.ops.test_lora import gradients
from tests.ops.test_lora import problems as lora_problems
from tests.tolerances import TOLERANCE, assert_near

ROOT = Path(__file__).parents[2]
ON_CPU = ["reference", "torch"]
FEW = sorting.FEW_PAIRS
TOKENS = st.sampled_from([0, 1, 2, 7, FEW // 2, FEW // 2 + 1, FEW, FEW + 1, 131])


@pytest.mark.parametrize("backend", ON_CPU)
@given(problem=problems(TOKENS, tuple(TOLERANCE)))
def test_scored_by_gate(backend, problem):
    check_gated(problem, backend)


@pytest.mark.parametrize("backend", ON_CPU)
@given(problem=problems(TOKENS, tuple(TOLERANCE)))
def test_chosen_elsewhere(backend, problem):
    check_given(problem, backend)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("tokens", [3, 131])
def test_a_mean_far_from_zero(tokens, backend):
    check_far_from_zero(tokens, backend)


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=20)
@given(problem=lora_problems(dtypes=(torch.float64,)))
def test_gradients(backend, problem):
    def op(*call):
        return routed_lora(*call, backend=backend)

    found = gradients(op, problem, 0)
    wanted, size = (gradients(definition, problem, sign) for sign in (0, 1))
    for each in zip(found, wanted, size, strict=True):
        assert_near(*each[:2], TOLERANCE[torch.float32].output, each[2])


@pytest.mark.slow
def test_triton_s_kernels_interpreted():
    pytest.importorskip("triton", reason="Triton's interpreter runs its kernels on a CPU")
    source = str(Path(phatgoose.__file__).parents[1])
    paths = (source, str(ROOT), os.environ.get("PYTHONPATH", "."))
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/ops/interpreted.py",
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTEST_ADDOPTS": "",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def calls(tokens, backend):
    """Arguments of every operator, consistent with each other."""
    random = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=random)

    parts, slots, rank, width, out = 2, 4, 3, 9, 7
    operators = torch.ops.phatgoose
    x, signatures = normal(tokens, width), normal(parts, slots, width)
    a, b, y = normal(parts, slots, rank, width), normal(slots, out, rank), normal(tokens, out)
    opened = torch.rand(parts, slots, generator=random) < 0.8
    gates = signatures.flatten(0, 1), signatures.sum(-1), opened
    gated = (x, *gates, a, normal(tokens, slots), None, backend, 2, 1.0, False, None)
    experts, weights, z, *plan = operators.gated_down(*gated)
    mine = experts[:, 1].clone(), weights[:, 1].clone()
    learned = [v.clone().requires_grad_() for v in (x, a[1], b)]
    return {
        "gated_down": gated,
        "routed_down": (x, a, experts, weights, backend),
        "routed_up_": (y, b, z, experts, *plan, 1, backend),
        "routed_lora": (*learned, mine[0], mine[1].requires_grad_(), backend),
        "routed_lora_backward": (y, x, a[1], b, *(v.detach() for v in mine)),
    }


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("tokens", [0, 3, 100])
def test_operators_are_what_they_declare(tokens, backend):
    """Schema, shapes without data, gradients, and all of them under a compiler."""
    for name, call in calls(tokens, backend).items():
        operator = getattr(torch.ops.phatgoose, name).default
        torch.library.opcheck(operator, call)


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choose_backend.cache_clear()
    yield
    choose_backend.cache_clear()


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_cpu_takes_torch(dtype):
    assert choose_backend("auto", "cpu", dtype) == "torch"
    assert [choose_backend(name, "cpu", dtype) for name in ON_CPU] == ON_CPU
    with pytest.raises(ConfigError, match="^backend='triton': .*Leave backend at 'auto'"):
        choose_backend("triton", "cpu", dtype)


@pytest.mark.usefixtures("no_interpreter")
def test_triton_on_a_cpu_is_refused_by_the_operator_and_by_route(model_and_pool):
    x, a, b = torch.ones(2, 3), torch.ones(1, 1, 3), torch.ones(1, 4, 1)
    routing = phatgoose.types.Routing(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
    with pytest.raises(ConfigError, match="the model is on cpu, Triton needs an NVIDIA GPU"):
        routed_lora(x, a, b, routing, backend="triton")
    model, pool = model_and_pool()
    with pytest.raises(ConfigError, match="the model is on cpu, Triton needs an NVIDIA GPU"):
        phatgoose.route(model, pool, backend="triton")
    phatgoose.route(model, pool)  # the refusal left nothing behind


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_float64_never_takes_triton(device, caplog):
    choose_backend.cache_clear()
    assert choose_backend("auto", device, torch.float64) == "torch"
    assert any("float64" in record.message for record in caplog.records) == (device == "cuda")
    with pytest.raises(ConfigError, match="float64"):
        choose_backend("triton", device, torch.float64)


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    choose_backend.cache_clear()
    assert choose_backend("auto", "cpu") == "torch"
    with pytest.raises(ConfigError, match="pip install triton"):
        choose_backend("triton", "cpu")
    choose_backend.cache_clear()


def test_unknown_backends_are_refused():
    for name in backend_names():
        assert RoutingSettings(backend=name).backend == name
    with pytest.raises(ConfigError, match=r"backend must be one of \('auto',.*got 'cuda'"):
        RoutingSettings(backend="cuda")


def test_a_choice_is_logged_once(caplog):
    choose_backend.cache_clear()
    with caplog.at_level("INFO", logger=backends.__name__):
        for _ in range(3):
            choose_backend("reference", "cpu")
    assert [record.message for record in caplog.records] == [
        "routed layers on cpu in torch.float32: backend reference"
    ]
