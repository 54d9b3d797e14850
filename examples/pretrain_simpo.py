"""SimPO on megatron-core: `torchrun --nproc-per-node 8 examples/pretrain_simpo.py --tp 8 --model DIR --data FILE`.

The same as `simpo train`. Without arguments it trains a tiny model on bundled pairs. Started on fewer ranks than the
layout needs, also without torchrun, it starts the missing ones here.
"""

import sys

from simpo_megatron.cli import run

# Processes that tokenise are spawned and import this file again: only the real start may train.
if __name__ == "__main__":
    run(["train", *sys.argv[1:]], __file__)
