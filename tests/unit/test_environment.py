"""The variables of a run on GPUs: set by default, never against the user, and refused beside --deterministic."""

from __future__ import annotations

import ctypes
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from simpo_megatron.config import config_from
from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore import device
from simpo_megatron.training.start import environment
from simpo_megatron.training.start.environment import deterministic, prepare_environment

HOPPER, BLACKWELL = (9, 0), (10, 0)
ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
ALWAYS = {**ALLOCATOR, "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
IN_ORDER = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
MARGINS = {"NVTE_FWD_LAYERNORM_SM_MARGIN": "16", "NVTE_BWD_LAYERNORM_SM_MARGIN": "16"}
DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}


@pytest.fixture
def gpus(monkeypatch):
    """Sets the architecture that the driver tells and the variables that the user has set."""

    def arrange(architecture, *, engine=False, **variables):
        monkeypatch.setattr(device, "gpu_architecture", lambda: architecture)
        monkeypatch.setattr(os, "environ", dict(variables))
        monkeypatch.setattr(environment, "_set_here", {})
        monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
        found = SimpleNamespace() if engine else None
        monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: found)

    return arrange


def config(**options):
    return config_from(model="somewhere", data=("pairs.jsonl",), **options)


@pytest.mark.parametrize(
    ("architecture", "engine", "options", "expected"),
    [
        (HOPPER, False, {}, ALWAYS),
        (HOPPER, True, {}, ALWAYS),
        (HOPPER, False, {"tp": 2}, {**ALWAYS, **IN_ORDER}),
        (HOPPER, True, {"cp": 2}, {**ALWAYS, **IN_ORDER, **MARGINS}),
        (HOPPER, True, {"overlap_grad_reduce": True}, {**ALWAYS, **MARGINS}),
        (HOPPER, False, {"pp": 2}, ALWAYS),
        (BLACKWELL, True, {"tp": 2}, {**ALWAYS, **MARGINS}),
        (HOPPER, False, {"deterministic": True}, {**ALWAYS, **DETERMINISTIC}),
        (None, True, {"tp": 2, "deterministic": True}, {}),
    ],
)
def test_each_machine_and_layout_gets_its_variables(gpus, architecture, engine, options, expected):
    gpus(architecture, engine=engine)
    assert prepare_environment(config(**options)) == expected == os.environ
    assert prepare_environment(config(**options)) == expected, "what this process has set is told again"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_has_set_stays(gpus, name):
    own = {name: "max_split_size_mb:512", "CUDA_DEVICE_MAX_CONNECTIONS": "32", "NCCL_ALGO": "^NVLS"}
    gpus(HOPPER, **own)
    found = prepare_environment(config(tp=2, deterministic=True))
    rest = {name: value for name, value in {**ALWAYS, **DETERMINISTIC}.items() if name not in (*own, *ALLOCATOR)}
    assert found == rest and os.environ == own | rest


def test_torch_before_its_2_9_is_told_by_its_own_name(gpus, monkeypatch):
    gpus(HOPPER)
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    assert prepare_environment(config())["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_ALGO", "Ring,Tree"),
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0"),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"),
    ],
)
def test_variables_against_determinism_are_refused(gpus, name, value):
    gpus(HOPPER, **{name: value})
    prepare_environment(config())
    with pytest.raises(ConfigError, match=f"^{name}: found '{value}' in the environment, expected .* --deterministic"):
        prepare_environment(config(deterministic=True))


def test_torch_is_deterministic_as_long_as_the_run_lasts():
    assert not torch.are_deterministic_algorithms_enabled()
    for asked in (True, False):
        with deterministic(config(deterministic=asked)):
            assert torch.are_deterministic_algorithms_enabled() is asked
        assert not torch.are_deterministic_algorithms_enabled()


class Driver:
    """NVML's place: one call after the other gives 0, which is success, or what `failing` says."""

    def __init__(self, failing=None):
        self.failing = failing

    def __getattr__(self, name):
        def call(*arguments):
            if name == "nvmlDeviceGetCudaComputeCapability":
                arguments[1]._obj.value, arguments[2]._obj.value = 9, 0
            return 15 if name == self.failing else 0

        return call


def test_the_driver_is_asked_and_cuda_is_not_started(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert device.gpu_architecture() == HOPPER
    for name in ("nvmlInit_v2", "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetCudaComputeCapability"):
        monkeypatch.setattr(ctypes, "CDLL", lambda _, name=name: Driver(name))
        assert device.gpu_architecture() is None
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.gpu_architecture() is None
    assert "torch.cuda" in sys.modules and not torch.cuda.is_initialized()
