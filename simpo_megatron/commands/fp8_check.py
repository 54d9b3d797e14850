"""Shows how FP8 changes the log-probs and margins of a batch of pairs, compared with bf16.

simpo fp8-check --recipe tensorwise --pairs 64 --model DIR --data pairs.jsonl
torchrun --nproc-per-node 8 -m simpo_megatron fp8-check --recipe blockwise --config FILE --model DIR --data pairs.jsonl

Every option of the trainer may follow; ranks and memory are those of a training run with the same options.
gamma_beta_ratio is the target margin. With a GPU the layers are Transformer Engine's. Without one FP8 is EMULATED:
weights and activations of the layers' matrix products are rounded to e4m3 in software with the recipe's scales, and
multiplied in bf16. Emulation covers the rounding, nothing else of the hardware.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from simpo_megatron.commands.parsing import CommandParser
from simpo_megatron.config import load_config
from simpo_megatron.errors import SimPOError, report_error

RECIPES = ("tensorwise", "blockwise", "delayed")


def main(argv: Sequence[str], prog: str = "simpo fp8-check") -> int:
    """The exit code, as the trainer's."""
    parser = CommandParser(prog, __doc__, takes_trainer_options=True)
    parser.add_argument("--recipe", choices=RECIPES, default=RECIPES[0], help=f"FP8 recipe, default {RECIPES[0]}")
    parser.add_argument("--pairs", type=int, default=64, metavar="N", help="pairs to compare, default 64")
    own, of_the_trainer = parser.parse_known_args(argv)
    if own.pairs < 1:
        parser.error(f"argument --pairs: found {own.pairs}, expected a number above 0")
    # megatron's messages to its own developers are nothing that a user can act on.
    warnings.simplefilter("ignore")
    try:
        config = load_config(of_the_trainer)
        # Only now, for it loads torch.
        from simpo_megatron.training.fp8_noise import check

        check(config, own.recipe, own.pairs)
    except SimPOError as error:
        return report_error(error)
    return 0
