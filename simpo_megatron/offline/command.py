"""The frame of every command on whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from simpo_megatron.collector import collector_at_rest
from simpo_megatron.errors import SimPOError, report_error
from simpo_megatron.logs import ignore_known_warnings, logged

if TYPE_CHECKING:
    from simpo_megatron.parallel import ParallelGroups


def run_command(work: Callable[[ParallelGroups], int]) -> int:
    """The exit code of a command: what `work` returns, or that of its error, which is printed in one line.

    Modules that import torch or megatron are to be imported by `work`: a command line is read without torch, and
    megatron is made to run on this machine before it is imported.
    """
    with collector_at_rest():
        from simpo_megatron.mcore import cpu_patches, device
        from simpo_megatron.parallel import alone

        ignore_known_warnings(has_cuda=device.has_cuda())
        cpu_patches.install()
    try:
        with logged(), alone() as groups:
            return work(groups)
    except SimPOError as error:
        return report_error(error)
