"""One rank of a sweep, or of the run that one of its trials would be alone.

`sweep_worker.py sweep JSON`: JSON has `argv` and `axes`, and what else `read_sweep` takes.
`sweep_worker.py run CONFIG SAVE`: the run of the trial's config.yaml, in another folder.

Under fp8_param_gather, the FP8 tensors are stand-ins (tests/fp8_stand_in.py): Transformer Engine's need a GPU.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from simpo_megatron.mcore import cpu_patches

cpu_patches.install()

import fp8_stand_in  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.optimizer import MegatronOptimizer  # noqa: E402

from simpo_megatron.config import Config, Machine, load_config  # noqa: E402
from simpo_megatron.sweep import driver  # noqa: E402
from simpo_megatron.sweep.request import read_sweep  # noqa: E402
from simpo_megatron.training import session  # noqa: E402
from simpo_megatron.training.run import train  # noqa: E402
from simpo_megatron.training.start import run_plan, setup  # noqa: E402


def stand_in_for_fp8(config: Config) -> None:
    """Let runs of `config` plan for a GPU, and keep the linear layers of their models in stand-ins for FP8 tensors."""
    if not config.precision.fp8_param_gather:
        return
    fp8_stand_in.install()
    run_plan.device = SimpleNamespace(
        machine=lambda: Machine(has_cuda=True, has_transformer_engine=True, compute_capability=(9, 0))
    )
    build = setup.build_model

    def build_in_fp8(*arguments):
        chunks = build(*arguments)
        # The recipe keeps the first and the last layer in bf16.
        for layer in chunks[0].decoder.layers[1:-1]:
            fp8_stand_in.keep_layer_in_fp8(layer)
        return chunks

    setup.build_model = build_in_fp8


def counting_optimizers(run_in, found: list[int]):
    """`run_in`, which notes how many optimizers are in memory after each run."""

    def run_and_count(*arguments):
        try:
            return run_in(*arguments)
        finally:
            gc.collect()
            found.append(sum(isinstance(thing, MegatronOptimizer) for thing in gc.get_objects()))

    return run_and_count


def counting_calls(function, calls: list[int]):
    """`function`, whose calls are counted in `calls`."""

    def called(*arguments):
        calls[0] += 1
        return function(*arguments)

    return called


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "run":
        config = load_config(["--config", rest[0]], save=rest[1])
        stand_in_for_fp8(config)
        train(config)
    else:
        asked = json.loads(Path(rest[0]).read_text())
        counts: list[int] = []
        driver.run_in = counting_optimizers(driver.run_in, counts)
        passes = [0]
        session.validation_log_probs = counting_calls(session.validation_log_probs, passes)
        sweep = read_sweep(asked.pop("argv"), asked.pop("axes"), **asked)
        stand_in_for_fp8(sweep.base)
        is_first = os.environ["RANK"] == "0"
        driver.run_sweep(sweep)
        assert not dist.is_initialized()
        if is_first:
            kept = {"optimizers": counts, "initial_passes": passes[0]}
            (sweep.folder / "counts.json").write_text(json.dumps(kept))
