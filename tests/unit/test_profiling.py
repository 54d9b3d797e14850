"""Profiles and step times: what is asked for that cannot be is refused, and what is timed is what was done."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from simpo_megatron.config import Machine, config_from, resolve
from simpo_megatron.errors import ConfigError
from simpo_megatron.training import profiling
from simpo_megatron.training.profiling import Profiler, describe_profile
from simpo_megatron.training.step import FORWARD, gather_paces, slowest_rank
from simpo_megatron.training.step.step_times import Pace, StepTimes

MODEL = {"num_layers": 4, "num_attention_heads": 8, "hidden_size": 64, "ffn_hidden_size": 128}


def resolved(machine=None, **options):
    config = config_from(model="m", data=("d",), **options)
    return resolve(config, world_size=2, model=MODEL, machine=machine or Machine())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"profile": True}, "profile: found True, expected a CUDA device, and none is there; --use-pytorch-profiler"),
        ({"record_memory_history": True}, "record_memory_history: found True, expected a CUDA device"),
        ({"profile": True, "use_pytorch_profiler": True}, "expected save or tensorboard_dir with it"),
        ({"use_pytorch_profiler": True}, "use_pytorch_profiler: found True, expected profile with it"),
        (
            {"profile": True, "use_pytorch_profiler": True, "save": "s", "profile_ranks": (0, 2)},
            "profile_ranks: found 2, expected a rank of this run, below 2",
        ),
        ({"profile_step_start": 4, "profile_step_end": 4}, "profile_step_end: found 4, expected more than"),
        ({"profile_step_start": -1}, "profile_step_start: found -1"),
    ],
)
def test_what_cannot_be_profiled_is_refused_before_the_run(options, said):
    with pytest.raises(ConfigError, match=said):
        resolved(**options)


def test_what_can_be_profiled_is_not_refused():
    resolved(profile=True, use_pytorch_profiler=True, tensorboard_dir="t")
    resolved(Machine(has_cuda=True), profile=True, record_memory_history=True, save="s")


@pytest.fixture
def calls(monkeypatch):
    """The profiler's calls to CUDA and PyTorch, in order; this process is rank 1 of 2."""
    asked = []
    monkeypatch.setattr(profiling, "dist", SimpleNamespace(get_rank=lambda: 1, get_world_size=lambda: 2))
    cuda = SimpleNamespace(
        profiler=SimpleNamespace(start=lambda: asked.append("start"), stop=lambda: asked.append("stop")),
        memory=SimpleNamespace(
            _record_memory_history=lambda enabled="all", **_: asked.append(("history", enabled)),
            _dump_snapshot=lambda path: asked.append(path),
        ),
    )
    emit_nvtx = torch.autograd.profiler.emit_nvtx(enabled=False)
    monkeypatch.setattr(
        profiling,
        "torch",
        SimpleNamespace(
            cuda=cuda,
            profiler=torch.profiler,
            autograd=SimpleNamespace(profiler=SimpleNamespace(emit_nvtx=lambda **_: emit_nvtx)),
        ),
    )
    monkeypatch.setattr(profiling, "configure_nvtx_profiling", lambda enabled: asked.append(("ranges", enabled)))
    return asked


def steps_taken(config, calls, first_step, last_step):
    with Profiler(config, first_step) as profiler:
        for iteration in range(first_step, last_step + 1):
            with profiler.step(iteration):
                calls.append(iteration)


@pytest.mark.parametrize(
    ("first_step", "last_step", "expected"),
    [
        (1, 5, [1, 2, "start", 3, 4, "stop", 5]),
        (4, 5, ["start", 4, "stop", 5]),
        (5, 6, [5, 6]),
        (1, 3, [1, 2, "start", 3, "stop"]),
    ],
)
def test_nsight_sees_the_steps_after_the_first_number_up_to_the_second(calls, first_step, last_step, expected):
    options = {"profile": True, "profile_step_start": 2, "profile_step_end": 4}
    steps_taken(config_from(model="m", profile_ranks=(1,), **options), calls, first_step, last_step)
    assert [call for call in calls if not isinstance(call, tuple)] == expected
    starts = expected.count("start")
    assert [call for call in calls if isinstance(call, tuple)] == [("ranges", True), ("ranges", False)] * starts
    calls.clear()
    steps_taken(config_from(model="m", **options), calls, first_step, last_step)
    assert all(isinstance(call, int) for call in calls), "rank 0 alone is profiled when nothing is said"


def test_the_history_of_memory_is_written_also_when_a_step_fails(calls, tmp_path):
    config = config_from(model="m", record_memory_history=True, save=str(tmp_path / "run"))
    with pytest.raises(ZeroDivisionError), Profiler(config, 1) as profiler, profiler.step(1):
        raise ZeroDivisionError
    assert calls == [("history", "all"), str(tmp_path / "run/profile/memory_rank0001.pickle"), ("history", None)]
    assert (tmp_path / "run/profile").is_dir()


def test_a_profile_of_steps_that_are_not_taken_is_told():
    config = config_from(model="m", save="s", profile=True, use_pytorch_profiler=True)
    assert describe_profile(config_from(model="m"), 1, 100) == []
    assert describe_profile(config, 1, 100) == [
        "profile   steps 11 to 12 on ranks 0: PyTorch's profiler, into s/profile"
    ]
    (line,) = describe_profile(config, 1, 8)
    assert line.startswith(
        "WARNING   profile: found profile_step_start 10 and profile_step_end 12, expected steps from 1"
    )


def test_phases_are_summed_until_they_are_cleared():
    times = StepTimes()
    for _ in range(2):
        with times.phase(FORWARD):
            time.sleep(0.01)
    assert 0.02 <= times.seconds()[FORWARD] < 10
    assert times.seconds()["data"] == 0
    times.clear()
    assert times.seconds()[FORWARD] == 0


def paces(*rows):
    return [Pace(*row) for row in rows]


def test_a_rank_is_slow_beside_its_likes_and_not_beside_other_stages():
    even = paces((0, 0, 1.0), (1, 0, 3.0), (0, 1, 1.05), (1, 1, 3.0))
    assert slowest_rank(even) is None
    assert slowest_rank(even[:3] + paces((1, 1, 3.6))) == (3, pytest.approx(0.2))
    # Of several, the one furthest behind; of ranks that wait for each other, the first.
    four = paces((0, 0, 1.0), (0, 1, 1.0), (0, 2, 1.15), (0, 3, 1.3))
    assert slowest_rank(four) == (3, pytest.approx(0.3))
    together = paces((0, 0, 1.0), (0, 0, 1.0), (0, 1, 1.5), (0, 1, 1.5))
    assert slowest_rank(together) == (2, pytest.approx(0.5))


def test_one_copy_of_the_model_has_nothing_to_be_compared_with():
    assert slowest_rank(paces((0, 0, 1.0), (0, 0, 9.0), (1, 0, 5.0))) is None
    assert slowest_rank(paces((0, 0, 0.0), (0, 1, 0.0))) is None


def test_every_rank_hears_the_pace_of_all(world_of_one):
    alone = torch.distributed.group.WORLD
    assert gather_paces(3.0, 2.0, SimpleNamespace(pp=alone, dp=alone)) == [Pace(0, 0, 1.5)]
    assert gather_paces(3.0, 0.0, SimpleNamespace(pp=alone, dp=alone)) == [Pace(0, 0, 0.0)]
