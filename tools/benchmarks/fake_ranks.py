"""Messages and bytes of a run's guards, counted at ranks of which nothing else is real.

    python tools/benchmarks/fake_ranks.py
    python tools/benchmarks/fake_ranks.py --worlds 2,256,1024,4096
    python tools/benchmarks/fake_ranks.py --processes 256

Messages are counted at ranks that are threads with one store in memory. Bytes are counted on rank 0 of a world whose
collectives move nothing: all that they would bring to this rank. So nothing of this depends on the machine.
`--processes` forks that many ranks, which meet at one real store and watch each other for some seconds.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simpo_megatron import parallel
from simpo_megatron.checkpoint.manifest import Digest
from simpo_megatron.config import Config
from simpo_megatron.mcore import cpu_patches
from simpo_megatron.parallel_sizes import ParallelSizes
from simpo_megatron.ranks import gather_on_first_rank, names_of_all_ranks, on_first_rank, sync_status
from simpo_megatron.training.peers import meeting
from simpo_megatron.training.peers.consistency import check_same, check_same_model, startup_facts, unchanged_model
from simpo_megatron.training.peers.watchdog import Watchdog, poll_seconds

WORLDS = (2, 16, 64, 256)
NUM_TENSORS = 3000
"""Names in the checkpoint of a large model: 80 layers of nine weights, each with its moments."""


class CountedStore:
    """A store that counts the messages that one rank sends it."""

    def __init__(self, store: dist.Store) -> None:
        self.messages: Counter[str] = Counter()
        self._store = store

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.messages[name] += 1
            return getattr(self._store, name)(*arguments)

        return counted


class CountedMeeting(meeting.Meeting):
    """A meeting all of whose connections are the same counted store."""

    def another_connection(self) -> Any:
        return self.store


def stores_of(world: int) -> list[CountedStore]:
    """For each rank, its connection to one store."""
    store = dist.HashStore()
    return [CountedStore(store) for _ in range(world)]


def messages_to_meet(world: int, *, late_seconds: float = 0.0) -> tuple[float, float]:
    """(Messages that a rank sends until all have arrived, the mean over ranks; the seconds that this took).

    Args:
        late_seconds: after the others, the last one arrives.
    """
    stores, begun = stores_of(world), time.monotonic()

    def arrive(rank: int) -> None:
        time.sleep(late_seconds if rank == world - 1 else 0.0)
        meeting.arrive(stores[rank], rank, world, time.monotonic() + 60.0)

    with ThreadPoolExecutor(world) as ranks:
        list(ranks.map(arrive, range(world)))
    return sum(store.messages.total() for store in stores) / world, time.monotonic() - begun


@contextmanager
def watched(world: int) -> Iterator[tuple[list[CountedStore], list[Watchdog]]]:
    """The stores and the watchdogs of all ranks, which ask for alarms while the context lasts."""
    stores = stores_of(world)
    with ExitStack() as stack:
        dogs = [Watchdog(CountedMeeting(rank, world, 0, stores[rank]), SimpleNamespace()) for rank in range(world)]
        yield stores, [stack.enter_context(dog) for dog in dogs]


def messages_of_a_watch(world: int, seconds: float, num_steps: int) -> tuple[float, float]:
    """(Messages that a rank sends within `seconds` and so many steps, a mean over ranks; the seconds it took)."""
    begun = time.monotonic()
    with watched(world) as (stores, dogs):
        for step in range(num_steps):
            for dog in dogs:
                dog.enter_phase(f"step {step}", timeout=3600.0)
        time.sleep(seconds)
        return sum(store.messages.total() for store in stores) / world, time.monotonic() - begun


def messages_of_a_verdict(world: int, num_silent: int) -> tuple[int, int]:
    """(The most messages of a rank that answers an alarm, those of the rank that then says who is missing).

    Args:
        num_silent: ranks that do not answer, at most as many as are named.
    """
    with watched(world) as (stores, dogs):
        for dog in dogs:
            dog.enter_phase("step 3", timeout=3600.0)
        for store in stores:
            store.messages.clear()
        for dog in dogs[: world - num_silent]:
            dog._answer()
        most = max(store.messages["append"] for store in stores)
        stores[0].messages.clear()
        assert f"rank {world - num_silent} (last phase: step 3) stopped responding" in dogs[0]._verdict()
        # Its thread asks for alarms meanwhile, so what asks is known: one question for each that is silent.
        return most, stores[0].messages.total() - stores[0].messages["check"] + num_silent


class Received(TorchDispatchMode):
    """Counts the bytes of the tensors that collectives fill on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = self.num_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            self.num_calls += 1
            # The first argument is what is filled, also where the tensors to send are one of their own.
            self.num_bytes += sum(leaf.nbytes for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


@contextmanager
def world_of(size: int) -> Iterator[None]:
    """While the context lasts, this process is rank 0 of a world of `size`, whose collectives move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def guards(model: Path) -> dict[str, Callable[[], Any]]:
    """The questions of a run to all ranks together, by when it asks; `model` is a folder with a model."""
    names = {f"decoder.layers.{number}.self_attention.linear_qkv.weight" for number in range(NUM_TENSORS)}
    digests = {"__0_0.distcp": Digest(1 << 30, "f" * 64), "__0_1.distcp": Digest(1 << 30, "f" * 64)}

    def unchanged() -> None:
        with unchanged_model([model]):
            pass

    return {
        "start: options, code, versions": lambda: check_same(startup_facts(Config())),
        "start: files of the model": lambda: check_same_model([model]),
        "start: model unchanged meanwhile": unchanged,
        "resume: names of tensors": lambda: names_of_all_ranks(names, names),
        "step: status": lambda: sync_status(None, 0, checksum=1),
        "save: work of rank 0": lambda: on_first_rank(lambda: (Path("iter_0000001"), 1)),
        "save: digests of shards": lambda: gather_on_first_rank(lambda: digests),
    }


def bytes_of_guards(world: int, model: Path) -> dict[str, int]:
    """The bytes that each of `guards` brings to rank 0 of `world`."""
    found = {}
    for name, guard in guards(model).items():
        with world_of(world), Received() as received:
            guard()
        found[name] = received.num_bytes
    return found


def seconds_of_groups(world: int) -> float:
    """CPU seconds of rank 0 of `world` to make its process groups, of which none connects; up to tp 8 and pp 8."""
    cpu_patches.import_uncompiled()
    tensor = math.gcd(world, 8)
    sizes = ParallelSizes(tensor=tensor, pipeline=math.gcd(world // tensor, 8))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    begun = time.process_time()
    try:
        parallel.initialize(sizes, backend="fake")
        return time.process_time() - begun
    finally:
        parallel.shut_down()


def write_model(folder: Path) -> Path:
    """A folder that looks like a model, for guards that compare its files."""
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"")
    return folder


def meet_and_watch(world: int, watch_seconds: float) -> dict[str, float]:
    """The costs of `world` forked ranks that meet at one store, and then watch each other."""
    port, (until, ends) = str(free_port()), os.pipe()
    pipes = [os.pipe() for _ in range(world)]
    begun = time.perf_counter()
    ranks = [_start(rank, world, port, pipe[1], until, ends) for rank, pipe in enumerate(pipes)]
    try:
        met = [float(os.read(pipe, 100)) for pipe, _ in pipes]
        (store,) = psutil.Process(ranks[0]).children()
        connections = [one for one in store.net_connections("tcp") if one.status == psutil.CONN_ESTABLISHED]
        cpu_to_meet = sum(store.cpu_times()[:2])
        time.sleep(watch_seconds)
        watch = sum(store.cpu_times()[:2]) - cpu_to_meet
    finally:
        os.close(ends)
        for rank in ranks:
            os.waitpid(rank, 0)
    return {
        "seconds until the last has met": max(met) - begun,
        "connections of a rank": len(connections) / world,
        "the store's CPU ms a rank to meet": 1e3 * cpu_to_meet / world,
        "the store's CPU s a second to watch": watch / watch_seconds,
    }


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def _start(rank: int, world: int, port: str, answer: int, until: int, ends: int) -> int:
    """The process of a rank that meets the others, says when, and watches until no process holds `ends` open."""
    process = os.fork()
    if process == 0:
        os.close(ends)
        own = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in own.items()})
        try:
            met = meeting.meet()
            with Watchdog(met, SimpleNamespace()) as dog:
                dog.enter_phase("the benchmark", timeout=3600.0)
                os.write(answer, str(time.perf_counter()).encode())
                os.read(until, 1)
        finally:
            os._exit(0)
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default=",".join(map(str, WORLDS)), help="numbers of ranks")
    parser.add_argument("--processes", type=int, metavar="N", help="fork N ranks instead")
    asked = parser.parse_args()
    if asked.processes:
        for name, value in meet_and_watch(asked.processes, 6.0).items():
            print(f"{name:36}{value:12.3f}")
        return
    worlds = [int(world) for world in asked.worlds.split(",")]
    threading.stack_size(1 << 18)
    print(f"{'messages at the store':36}" + "".join(f"{world:>12,}" for world in worlds))
    rows: dict[str, Callable[[int], float]] = {
        "to meet, a rank": lambda world: messages_to_meet(world)[0],
        "a watch, a rank and second": lambda world: 1 / poll_seconds(world),
        "a watch, all ranks a second": lambda world: world / poll_seconds(world),
        "to say who is missing": lambda world: messages_of_a_verdict(world, 1)[1],
    }
    for name, row in rows.items():
        print(f"{name:36}" + "".join(f"{row(world):12.1f}" for world in worlds))
    print("bytes to rank 0")
    with tempfile.TemporaryDirectory() as folder:
        columns = [bytes_of_guards(world, write_model(Path(folder))) for world in worlds]
    for name in columns[0]:
        print(f"{name:36}" + "".join(f"{column[name]:12,}" for column in columns))


if __name__ == "__main__":
    main()
