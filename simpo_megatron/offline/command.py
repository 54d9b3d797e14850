"""The frame of every command on whole models."""

from __future__ import annotations

from collections.abc import Callable

from simpo_megatron.errors import SimPOError, report_error
from simpo_megatron.logs import ignore_known_warnings, logged
from simpo_megatron.mcore import cpu_patches, device
from simpo_megatron.parallel import ParallelGroups, alone


def run_command(work: Callable[[ParallelGroups], int]) -> int:
    """The exit code of a command: what `work` returns, or that of its error, which is printed in one line.

    Modules that import megatron are to be imported by `work`, which runs after megatron is made to run on this machine.
    """
    ignore_known_warnings(has_cuda=device.has_cuda())
    cpu_patches.install()
    try:
        with logged(), alone() as groups:
            return work(groups)
    except SimPOError as error:
        return report_error(error)
