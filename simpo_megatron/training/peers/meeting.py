"""The rendezvous of ranks: each reports to a store outside the ranks that it has arrived, or why it failed.

torchrun's agent keeps such a store. Without an agent, a child process of rank 0 keeps it. The child outlives rank 0 by
some seconds, so that the others can still learn why rank 0 ended. A process that no launcher started is the only rank.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch.distributed as dist

from simpo_megatron.errors import ConfigError, ParallelError, PeerFailedError, SimPOError, StoppedBySignal, listed
from simpo_megatron.launched import PARENT, check_environment, has_agent, is_launched
from simpo_megatron.stop_signals import STOP_SIGNALS

MEETING_SECONDS = 120.0
"""Seconds that the ranks that are there wait for the others."""

_SPEAKING_SECONDS = 10.0
"""Seconds that a rank that failed looks for the others, before it speaks for itself alone."""
_OUTLIVES_SECONDS = 10.0
_POLL_SECONDS = 0.3
# Ranks that wait for others ask at once, and then less and less often, for all of them ask the same store.
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS, _PAUSE_GROWS = 0.05, 1.0, 1.5
_ARRIVED, _NUM_ARRIVED, _NUM_PRESENT = "arrived", "num_arrived", "num_present"
_OUTCOME, _ALL_MET = "outcome", "met"
# The time at which the rank 0 that started the store has ended; a key of the store, not of a run.
_FIRST_RANK_ENDED = "simpo_megatron/first_rank_ended"
_MAX_NAMED = 8

# Each run of a process has its own keys in the store, the same on all ranks.
_num_runs = 0
_is_kept_here = False


def tell(error: Exception) -> None:
    """Leave word of `error` for the ranks that wait for this one, which becomes its `speaker` unless another was."""
    rank = int(os.environ.get("RANK", 0))
    text = str(error) if isinstance(error, SimPOError) else f"{type(error).__name__}: {error}"
    if isinstance(error, SimPOError):
        error.speaker = rank
    try:
        store = _of_run(_connection(_SPEAKING_SECONDS), _num_runs)
        first = store.compare_set("said/" + hashlib.sha256(text.encode()).hexdigest()[:16], "", str(rank))
        said = {"rank": rank, "says": text, "exit_code": getattr(error, "exit_code", SimPOError.exit_code)}
        outcome = store.compare_set(_OUTCOME, "", json.dumps(said)).decode()
    except (SimPOError, dist.DistError):
        return
    if isinstance(error, SimPOError):
        error.speaker = int(first)
    if isinstance(error, StoppedBySignal) and outcome != _ALL_MET:
        # The signal of a launcher that ends all ranks because one failed: not a job to start again.
        error.exit_code = json.loads(outcome)["exit_code"]


@dataclass(frozen=True)
class Meeting:
    """The ranks of a run, all of which are there."""

    rank: int
    world: int
    number: int
    """Counts the runs of this process."""
    store: dist.Store
    """The store of the ranks, outside all collectives; for the main thread and the process groups only."""
    first_of_node: int | None = None
    """Process id of the first rank of this node, unless that is this rank."""

    def speaks_for_node(self) -> bool:
        """True on the first rank of a node, and on all others once that is not seen to live."""
        if self.first_of_node is None:
            return True
        try:
            return psutil.Process(self.first_of_node).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def another_connection(self) -> dist.Store:
        """A second connection, for another thread, so that neither waits for the other's requests."""
        if not is_launched():
            return self.store
        return _of_run(_connection(MEETING_SECONDS), self.number)

    def leave(self) -> None:
        """Report that this rank no longer needs the store."""
        if is_launched():
            with suppress(dist.DistError):
                self.store.add(_NUM_PRESENT, -1)


def meet() -> Meeting:
    """The ranks of this run, once all have arrived.

    Costs: two connections to the store, the other one for `another_connection`, and five messages, without torchrun's
    agent one more a connection; while ranks are missing, one a second.

    Raises:
        ConfigError: the environment is incomplete, or rank 0 cannot listen at its port.
        PeerFailedError: a rank failed before it arrived; it has printed why.
        ParallelError: ranks are missing after two minutes; one of those that arrived names them.
    """
    global _num_runs
    if not is_launched():
        return Meeting(0, 1, 0, dist.HashStore())
    check_environment()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, deadline = int(os.environ.get("LOCAL_RANK", 0)), time.monotonic() + MEETING_SECONDS
    if has_agent() and local_rank == 0:
        _allow_connections(PARENT)
    try:
        store = _of_run(_connection(MEETING_SECONDS), _num_runs)
        store.set(f"process/{rank}", str(os.getpid()))
        arrive(store, rank, world, deadline)
        first_of_node = int(store.get(f"process/{rank - local_rank}")) if 0 < local_rank <= rank else None
    except dist.DistError as error:
        raise _unreachable(str(error).splitlines()[0]) from error
    except StoppedBySignal as stopped:
        tell(stopped)
        raise
    meeting = Meeting(rank, world, _num_runs, store, first_of_node)
    _num_runs += 1
    return meeting


def arrive(store: dist.Store, rank: int, world: int, deadline: float) -> None:
    """Return once all ranks have arrived at `store`; `deadline` is a time of time.monotonic.

    Raises:
        PeerFailedError, ParallelError: as `meet`.
    """
    # torch's stubs lack `append`, which every store has.
    store.append(_ARRIVED, f"{rank} {socket.gethostname()}\n")  # type: ignore[attr-defined]
    store.add(_NUM_PRESENT, 1)
    if store.add(_NUM_ARRIVED, 1) == world:
        store.compare_set(_OUTCOME, "", _ALL_MET)
    pause = _FIRST_PAUSE_SECONDS
    while not store.check([_OUTCOME]):
        if time.monotonic() > deadline:
            missing = {"rank": rank, "is_missing": _who_is_missing(store.get(_ARRIVED).decode(), world)}
            store.compare_set(_OUTCOME, "", json.dumps(missing))
        else:
            time.sleep(pause)
            pause = min(_PAUSE_GROWS * pause, _LAST_PAUSE_SECONDS)
    outcome = store.get(_OUTCOME).decode()
    if outcome != _ALL_MET:
        raise _not_met(json.loads(outcome), rank)


def _not_met(said: dict, rank: int) -> ParallelError:
    if "is_missing" in said:
        missing = ParallelError(said["is_missing"])
        missing.speaker = said["rank"]
        return missing
    error = PeerFailedError(f"stopped because rank {said['rank']} failed before all ranks had met: {said['says']}")
    error.exit_code = said["exit_code"]
    # The failed rank has printed it; rank 0 repeats it for those who keep only rank 0's log.
    error.speaker, error.kind = (0 if rank == 0 else None), "STOPPED"
    return error


def _who_is_missing(arrived: str, world: int) -> str:
    """The message on ranks that are not among the lines `rank host` of `arrived`."""
    host_of_rank = {int(rank): host for rank, host in map(str.split, arrived.splitlines())}
    hosts: dict[str, list[int]] = {}
    for rank, host in sorted(host_of_rank.items()):
        hosts.setdefault(host, []).append(rank)
    missing = [rank for rank in range(world) if rank not in host_of_rank]
    came = (f"{host} (ranks {listed(ranks, _MAX_NAMED)})" for host, ranks in hosts.items())
    return (
        f"ranks: found {world - len(missing)} of {world} after {MEETING_SECONDS:.0f} s, expected all; "
        f"missing: rank{'s' if len(missing) > 1 else ''} {listed(missing, _MAX_NAMED)}; there: {listed(came, 4)}; see "
        f"whether the missing ones were started, what they say, and whether they reach {_address()}"
    )


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _unreachable(why: str) -> ConfigError:
    rank = int(os.environ.get("RANK", 0))
    error = ConfigError(
        f"MASTER_ADDR:MASTER_PORT: rank {rank} could not connect to {_address()}: {why}; choose a free port of rank "
        "0's machine, or let torchrun do it with --standalone"
    )
    error.speaker = rank
    return error


def _of_run(store: dist.Store, number: int) -> dist.Store:
    """`store` with the keys of run `number` of this process, and of this start of torchrun's."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"simpo_megatron/{restart}/{number}", store)


def _allow_connections(process: int) -> None:
    """Let `process`, which keeps the ranks' store, open as many files as the system allows it.

    Each rank has some connections there. The usual limit of 1,024 files ends that at some hundred ranks.
    """
    # Only Linux has prlimit.
    with suppress(AttributeError, OSError, ValueError):
        _, at_most = resource.prlimit(process, resource.RLIMIT_NOFILE)
        resource.prlimit(process, resource.RLIMIT_NOFILE, (at_most, at_most))


def _connection(seconds: float) -> dist.Store:
    """A connection to the ranks' store, which rank 0 starts where no agent keeps it.

    Raises: ConfigError, when it cannot be reached for so many seconds.
    """
    global _is_kept_here
    check_environment()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ["RANK"] == "0" and not has_agent() and not _is_kept_here:
        _keep_store(port)
        _is_kept_here = True
    deadline = time.monotonic() + seconds
    while True:
        try:
            # torch would print several lines a second until the store listens, and would not handle signals meanwhile.
            socket.create_connection((host, port), 2.0).close()
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=MEETING_SECONDS))
            if has_agent() or not _is_of_an_earlier_start(store):
                return store
            why = "the store of a run that has ended is still there"
        except (OSError, dist.DistError) as error:
            why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        if time.monotonic() > deadline:
            raise _unreachable(f"{why}, for {seconds:.0f} s")
        time.sleep(_POLL_SECONDS)


def _is_of_an_earlier_start(store: dist.Store) -> bool:
    """True when the rank 0 that started `store` had ended before this process began."""
    if not store.check([_FIRST_RANK_ENDED]):
        return False
    return float(store.get(_FIRST_RANK_ENDED)) < psutil.Process().create_time()


def _keep_store(port: int) -> None:
    """Keep the ranks' store in a child, until all ranks have left or some seconds after this process has ended.

    Raises: ConfigError, when it cannot listen at `port`.
    """
    world = int(os.environ["WORLD_SIZE"])
    (answer, answers), (lives, alive) = os.pipe(), os.pipe()
    if os.fork() == 0:
        try:
            os.close(alive)
            _serve(port, world, answers, lives)
        finally:
            os._exit(0)
    # `alive` is closed by the end of this process, however it ends, and that is what the child waits for.
    os.close(answers)
    os.close(lives)
    with os.fdopen(answer, "rb") as told:
        problem = told.read().decode()
    if problem:
        raise _unreachable(problem)


def _serve(port: int, world: int, answers: int, lives: int) -> None:
    """Keep the store; write what is wrong to `answers`, which is closed once there is a store."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        # Close the inherited output, so that readers of rank 0's output see its end when rank 0 ends.
        os.dup2(nowhere, descriptor)
    _allow_connections(os.getpid())
    deadline = time.monotonic() + 1.5 * _OUTLIVES_SECONDS
    while True:
        # The store of a run that has just ended stays for some seconds.
        try:
            store = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
            break
        except dist.DistError as error:
            if time.monotonic() > deadline:
                os.write(answers, str(error).splitlines()[0].encode())
                return
            time.sleep(_POLL_SECONDS)
    os.close(answers)
    os.read(lives, 1)
    store.set(_FIRST_RANK_ENDED, repr(time.time()))
    deadline, first = time.monotonic() + _OUTLIVES_SECONDS, _of_run(store, 0)
    while time.monotonic() < deadline:
        all_came = first.add(_NUM_ARRIVED, 0) >= world
        if all_came and first.add(_NUM_PRESENT, 0) == 0:
            return
        time.sleep(_POLL_SECONDS)
