"""Worker processes: one that fails or is killed is reported with its current records, and none outlives its parent."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from simpo_megatron.errors import DataError, SimPOError, listed

Item = TypeVar("Item")
Result = TypeVar("Result")


class LostWorkersError(DataError):
    """A worker process died; finished work is kept."""


# In a worker process: the function for an item, and the one that names items.
_job: tuple[Callable[[Any], Any], Callable[[Any, Any], str]]


def map_in_processes(
    work: Callable[[Item], Result],
    items: Iterator[Item],
    *,
    num_workers: int,
    prepare: Callable[..., None],
    arguments: tuple,
    describe: Callable[[Item, Item], str],
) -> Iterator[Result]:
    """Yields `work(item)` for each of `items`, in order, by processes in each of which `prepare(*arguments)` ran first.

    Args:
        describe: names the items from one to another, for an error.

    Raises: what `work` raised, as it is when it is a SimPOError; DataError, with process and items, for any other
    error; LostWorkersError when a process died.
    """
    # Spawned, because the caller may run threads (gloo, NCCL), which a forked child would find dead.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    workers: set[multiprocessing.process.BaseProcess] = set()
    sent: deque[Item] = deque()
    futures: deque[Future[Any]] = deque()
    with ProcessPoolExecutor(num_workers, context, _start, (work, prepare, arguments, describe)) as pool:

        def send(how_many: int) -> None:
            for item in islice(items, how_many):
                sent.append(item)
                futures.append(pool.submit(_work, item))
                workers.update(set(multiprocessing.active_children()) - others)

        try:
            send(2 * num_workers)
            while futures:
                result = futures[0].result()
                sent.popleft(), futures.popleft()
                yield result
                send(1)
            return
        except BrokenProcessPool:
            pass  # How each process ended is known once all have.
    raise LostWorkersError(
        f"{describe(sent[0], sent[-1])}: found that {_ended_first(workers)} while it tokenised these records, "
        "expected it to finish; look at the kernel's log for out of memory, and start again: records before these "
        "are kept"
    )


def _ended_first(workers: Iterable[multiprocessing.process.BaseProcess]) -> str:
    # The pool ends the others with a SIGTERM.
    ends = {worker.pid: worker.exitcode for worker in workers if worker.exitcode not in (None, 0, -signal.SIGTERM)}
    if not ends:
        return "a worker process ended"
    return listed((f"worker process {pid} ended ({_how(code)})" for pid, code in ends.items()), most=4)


def _how(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _start(work: Callable, prepare: Callable[..., None], arguments: tuple, describe: Callable) -> None:
    global _job
    _job = work, describe
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(*arguments)


def _end_with_parent() -> None:
    """End with the parent: a worker holds both ends of the queue it reads, and would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was started by a pool"
    parent.join()
    os._exit(1)


def _work(item: Item) -> object:
    work, describe = _job
    try:
        return work(item)
    except SimPOError:
        raise
    except Exception as error:
        raise DataError(
            f"{describe(item, item)}: found one that worker process {os.getpid()} failed on ({type(error).__name__}: "
            f"{error}), expected records that can be tokenised"
        ) from error
