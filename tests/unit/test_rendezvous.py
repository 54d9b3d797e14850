"""Ranks that cannot meet end in one line, soon, with the exit code of a configuration."""

from __future__ import annotations

import re
import socket
import time

import pytest
import torch.distributed as dist

import simpo_megatron.training.loop  # noqa: F401  # its import is not what is timed
from simpo_megatron.demo import prepare_demo
from simpo_megatron.training import launch
from simpo_megatron.training.peers import meeting

SCRIPT = "examples/pretrain_simpo.py"
BUSY = "the port of somebody else"
TOGETHER = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
CASES = {
    "half of torchrun": ({"RANK": "0"}, r"environment: found no WORLD_SIZE, MASTER_ADDR, MASTER_PORT, .* torchrun"),
    "no RANK": (TOGETHER | {"RANK": None}, r"environment: found no RANK, .*; start the ranks with torchrun"),
    "no MASTER_PORT": (TOGETHER | {"MASTER_PORT": None}, r"environment: found no MASTER_PORT"),
    "MASTER_PORT busy": (TOGETHER | {"MASTER_PORT": BUSY}, r"MASTER_PORT: rank 0 .* 127.0.0.1:\d+: .*EADDRINUSE"),
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    prepare_demo(folder / "demo")
    return folder


@pytest.mark.processes
@pytest.mark.parametrize("case", CASES)
def test_ranks_that_cannot_meet_say_why_in_one_line(case, cache, tmp_path, monkeypatch, capfd):
    environment, expected = CASES[case]
    with socket.create_server(("0.0.0.0", 0)) as busy:
        for name in TOGETHER:
            value = environment.get(name)
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value.replace(BUSY, str(busy.getsockname()[1])))
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        monkeypatch.setattr(meeting, "_OUTLIVES_SECONDS", 0.5)
        started = time.monotonic()
        options = ["--tp", environment.get("WORLD_SIZE", "1"), "--data-cache", str(cache)]
        code = launch.main([*options, "--save", str(tmp_path / "run")], SCRIPT)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("[W")]
    assert code == 2 and line.startswith("ERROR simpo_megatron rank") and re.search(expected, line), line
    assert time.monotonic() - started < meeting.MEETING_SECONDS / 2 and not dist.is_initialized()
