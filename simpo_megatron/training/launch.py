"""From a command line to running ranks: starts the local ranks that are missing, and turns errors into exit codes."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence

from simpo_megatron.config import Config, load_config
from simpo_megatron.errors import ConfigError, SimPOError


def main(argv: Sequence[str], train: Callable[[Config], None], script: str) -> int:
    """The exit code of one process of the run `script argv`: 0 done, else the error's own (errors.py), 1 unexpected.

    Every rank reads the same configuration and finds the same mistake in it, before any collective; the first
    one says it.
    """
    try:
        config = load_config(argv)
        num_missing = _num_ranks_to_start(config)
        if num_missing:
            return _start_local_ranks(num_missing, script, argv)
        train(config)
    except SimPOError as error:
        if isinstance(error, ConfigError) and _rank() != 0:
            return error.exit_code
        print(f"ERROR simpo_megatron rank {_rank()}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception:
        print(f"ERROR simpo_megatron rank {_rank()}: unexpected error", file=sys.stderr, flush=True)
        traceback.print_exc()
        return 1
    return 0


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _num_ranks_to_start(config: Config) -> int:
    """Local ranks to start because torchrun started one where the layout needs more; 0 when the ranks are there."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    parallel = config.parallel
    needed = parallel.sizes.model
    if world_size >= needed or world_size > 1:
        return 0
    return needed


def _start_local_ranks(num_ranks: int, script: str, argv: Sequence[str]) -> int:
    """The exit code of a local torchrun of `num_ranks` ranks over the same script and arguments."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    from simpo_megatron.mcore import device

    device.require_local_ranks(num_ranks)
    arguments = ["--nproc-per-node", str(num_ranks), script, *argv]
    print(f"1 rank runs, the layout needs {num_ranks}; starting them here: torchrun {shlex.join(arguments)}", flush=True)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    try:
        torchrun(["--standalone", *arguments])
    except ChildFailedError as failure:
        return failure.get_first_failure()[1].exitcode
    return 0
