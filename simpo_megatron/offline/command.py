"""What every command on whole models does around its work."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from simpo_megatron.errors import SimPOError, report_error
from simpo_megatron.mcore import cpu_patches
from simpo_megatron.parallel import ParallelGroups, alone


def run_command(work: Callable[[ParallelGroups], int]) -> int:
    """The exit code of a command: what `work` returns, or that of its error, which is printed in one line.

    Modules that import megatron are to be imported by `work`, which runs after megatron is made to run on this machine.
    """
    # Of what megatron, torch and transformers say to their own developers, nothing is the user's to mend.
    warnings.simplefilter("ignore")
    cpu_patches.install()
    try:
        with alone() as groups:
            return work(groups)
    except SimPOError as error:
        return report_error(error)
