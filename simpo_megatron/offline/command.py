"""The common frame of commands on whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from simpo_megatron.collector import collector_at_rest
from simpo_megatron.errors import SimPOError, report_error
from simpo_megatron.logs import ignore_known_warnings, logged

if TYPE_CHECKING:
    from simpo_megatron.parallel import ParallelGroups


def run_command(work: Callable[[ParallelGroups], int]) -> int:
    """Runs `work` and returns its exit code, or that of its error, which is printed in one line.

    `work` must import modules that need torch or megatron itself: the command line is read without torch, and megatron
    is patched for this machine before it is imported.
    """
    with collector_at_rest():
        from simpo_megatron.mcore import cpu_patches, device
        from simpo_megatron.parallel import alone

        ignore_known_warnings(has_cuda=device.has_cuda())
    try:
        cpu_patches.install()
        with logged(), alone() as groups:
            return work(groups)
    except SimPOError as error:
        return report_error(error)
