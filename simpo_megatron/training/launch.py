"""From a command line to running ranks: starts the local ranks that are missing, and turns errors into exit codes."""

from __future__ import annotations

import json
import os
import shlex
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from simpo_megatron.config import Config, load_config
from simpo_megatron.errors import PeerFailedError, SimPOError, report_error
from simpo_megatron.logs import ignore_known_warnings
from simpo_megatron.mcore import device
from simpo_megatron.nemo import load_nemo_command, names_nemo_config


def main(argv: Sequence[str], script: str) -> int:
    """The exit code of one process of the run `script argv`: 0 done, else the error's own (errors.py), 1 unexpected.

    Every rank reads the same configuration and finds the same mistake in it before any collective; the first one
    says it.
    """
    # CUDA reads it when it starts: megatron-core's tensor parallelism relies on kernels being queued in order.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    ignore_known_warnings(has_cuda=device.has_cuda())
    try:
        config, notes = _read(argv)
        # Only now, for megatron takes ten seconds to import: a mistake in the configuration is told before, and the
        # processes that tokenise, which import the script again, do without.
        from simpo_megatron.training.assembly import plan_run
        from simpo_megatron.training.loop import train

        num_ranks = config.parallel.sizes.fewest_ranks
        if _world_size() == 1 and num_ranks > 1:
            plan_run(config, num_ranks)
            return _start_local_ranks(num_ranks, script, argv)
        if notes and _rank() == 0:
            print(*notes, sep="\n", flush=True)
        train(config)
    except SimPOError as error:
        # Peers that stop because of another rank's error, or share rank 0's, stay quiet about it.
        if _rank() == 0 and not isinstance(error, PeerFailedError):
            report_error(error, rank=0)
        _tell_torchrun(error)
        return error.exit_code
    except Exception as error:
        report_error(error, rank=_rank())
        _tell_torchrun(error)
        traceback.print_exc()
        return 1
    return 0


def _read(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """The configuration, and for the reader what became of the keys of a NeMo file, if it is one."""
    if not names_nemo_config(argv):
        return load_config(argv), []
    config, report = load_nemo_command(argv)
    return config, report.lines()


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _tell_torchrun(error: Exception) -> None:
    """Put the line where torchrun looks for what its report calls the root cause."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        line = f"{type(error).__name__}: {error}"
        told = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": told}), encoding="utf-8")


def _start_local_ranks(num_ranks: int, script: str, argv: Sequence[str]) -> int:
    """The exit code of a local torchrun of `num_ranks` ranks over the same script and arguments."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    device.require_local_ranks(num_ranks)
    arguments = ["--nproc-per-node", str(num_ranks), script, *argv]
    print(
        f"1 rank runs, the layout needs {num_ranks}; starting them here: torchrun {shlex.join(arguments)}",
        flush=True,
    )
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    try:
        torchrun(["--standalone", *arguments])
    except ChildFailedError as failure:
        return failure.get_first_failure()[1].exitcode
    return 0
