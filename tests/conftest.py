"""Settings of all tests: no GPU, this checkout, and the tests that may start processes."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
from ranks import REPOSITORY

# Before torch is imported, and for every process that a test starts: numbers are those of the CPU, wherever tests run,
# and children find this checkout from any folder.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
_INHERITED = [str(REPOSITORY), str(REPOSITORY / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(_INHERITED)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# At its import newer megatron-core would start git for its version, also in a test that may start no process.
os.environ["NO_VCS_VERSION"] = "1"

# These folders exist for tests of several processes; elsewhere a test bears the mark itself.
_FOLDERS_OF_PROCESSES = {"distributed", "faults", "end_to_end", "slurm", "smollm2"}
_running: list[pytest.Item] = []
_cache = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    # While torch, megatron and the tests are imported, a quarter of the time went into a search for garbage.
    gc.disable()
    # A cache of the tests' own, which goes with them; workers of one session share it.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ["SIMPO_MEGATRON_CACHE"] = config.stash[_cache] = tempfile.mkdtemp(prefix="simpo-tests-")


def pytest_collection_finish() -> None:
    # Nor does any later search walk over modules.
    gc.freeze()
    gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _cache in config.stash:
        shutil.rmtree(config.stash[_cache], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _FOLDERS_OF_PROCESSES & set(item.path.relative_to(REPOSITORY / "tests").parts):
            item.add_marker("processes")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _running.append(item)
    try:
        return (yield)
    finally:
        _running.pop()


def _guarded(start: Callable) -> Callable:
    """`start`, which fails a test without the mark."""

    @functools.wraps(start)
    def guarded(*arguments: Any, **options: Any) -> Any:
        if _running and not _running[-1].get_closest_marker("processes"):
            raise RuntimeError(f"{_running[-1].nodeid}: starts a process without the mark `processes`: {arguments}")
        return start(*arguments, **options)

    return guarded


for _owner, _name in (
    (subprocess.Popen, "__init__"),
    (BaseProcess, "start"),
    (os, "fork"),
    (os, "posix_spawn"),
):
    setattr(_owner, _name, _guarded(getattr(_owner, _name)))


@pytest.fixture
def world_of_one():
    """A process group of this process alone, without megatron's own groups."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, as far as it shows before anything is computed."""
    from simpo_megatron.mcore import device

    monkeypatch.setattr(device, "has_cuda", lambda: True)


@pytest.fixture
def tp_group():
    """The tensor-parallel group of a process that trains alone, its random state seeded."""
    from simpo_megatron import parallel

    with parallel.alone() as groups:
        parallel.seed_everything(1)
        yield groups.tp
