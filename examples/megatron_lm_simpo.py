"""SimPO in Megatron-LM's own `pretrain()`: its arguments, its loop, its checkpoints; our data, model and loss.

    torchrun --nproc-per-node 8 examples/megatron_lm_simpo.py \\
        --use-checkpoint-args --pretrained-checkpoint checkpoints/llama3-8b --finetune --bf16 \\
        --tokenizer-model hf/llama3-8b --tensor-model-parallel-size 8 --sequence-parallel --use-distributed-optimizer \\
        --seq-length 2048 --micro-batch-size 2 --global-batch-size 128 --train-iters 480 \\
        --lr 1e-6 --min-lr 0 --lr-decay-style cosine --lr-warmup-fraction 0.1 --weight-decay 0 --adam-beta2 0.999 \\
        --simpo-beta 2.5 --simpo-gamma-beta-ratio 0.55 --simpo-data pairs.jsonl \\
        --simpo-valid-data validation.jsonl --eval-iters 4 --eval-interval 100 \\
        --save checkpoints/simpo --save-interval 100

Needs CUDA, and Megatron-LM's training: megatron-core has it from 0.17 on, with Python 3.12. `--help` lists Megatron's
arguments and, under SimPO, ours. A sample is a pair, and `--seq-length` holds a prompt with one of its responses. With
pipeline stages it is a row's tokens for each of its pairs, and `--simpo-max-length` limits a prompt with one response.

A script of your own needs no more than the hooks:

    from simpo_megatron.megatron_lm import add_simpo_args, forward_step, model_provider
    from simpo_megatron.megatron_lm import train_valid_test_datasets_provider
"""

import sys

from simpo_megatron.errors import SimPOError, report_error
from simpo_megatron.megatron_lm import pretrain

# Checkpoints are written by processes that import this file again: only the real start may train.
if __name__ == "__main__":
    try:
        pretrain()
    except SimPOError as error:
        sys.exit(report_error(error))
