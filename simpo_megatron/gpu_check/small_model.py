"""A small random model in this process, with the layers of a run on this device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from simpo_megatron import parallel
from simpo_megatron.config import config_from
from simpo_megatron.data import BatchOptions, TokenizedPair, collate
from simpo_megatron.gpu_check.verdict import CheckSetting
from simpo_megatron.mcore import cpu_patches, device
from simpo_megatron.mcore.families import describe_hf_config
from simpo_megatron.mcore.microbatch import Microbatch, to_microbatch
from simpo_megatron.mcore.model import build_model, wrap_in_ddp
from simpo_megatron.parallel_sizes import ParallelSizes


@contextmanager
def random_model(setting: CheckSetting, *, bf16: bool) -> Iterator[DistributedDataParallel]:
    """A Llama of a few layers with eight query heads for each key head, and weights of a fixed seed.

    Its gradients go to `main_grad` as in a run: on a GPU megatron's layers add them there themselves.
    """
    cpu_patches.install()
    heads = setting.size(16, 8)
    shape = {
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": setting.size(4, 2),
        "hidden_size": setting.size(2048, 64),
        "intermediate_size": setting.size(5632, 96),
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "vocab_size": setting.size(32_000, 257),
        "tie_word_embeddings": False,
    }
    dist.init_process_group(device.backend(), store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups = parallel.initialize(ParallelSizes(), backend=device.backend())
        parallel.seed_everything(1)
        config = config_from(model="m", data=("d",), bf16=bf16)
        (model,) = wrap_in_ddp(build_model(describe_hf_config(shape, "config.json"), config, groups), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.02)
        yield model
    finally:
        parallel.shut_down()


def random_pairs(setting: CheckSetting, num_pairs: int, longest: int) -> list[TokenizedPair]:
    """Pairs of odd lengths up to `longest` tokens a part, one response of a single token included."""
    random = np.random.default_rng(3)
    lengths = [(1, longest, 1), *random.integers(2, longest, (num_pairs - 1, 3)).tolist()]
    vocab = setting.size(32_000, 257)
    return [TokenizedPair(*(random.integers(1, vocab, n).astype(np.int32) for n in pair)) for pair in lengths]


def microbatch_of(pairs: list[TokenizedPair], setting: CheckSetting, **options: bool) -> Microbatch:
    """The pairs in one pack on the check's device."""
    # The sequence has room for a prompt in front of each response.
    num_tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    batch_options = BatchOptions(global_batch_size=len(pairs), tokens_per_microbatch=num_tokens, **options)
    return to_microbatch(collate(pairs, range(len(pairs)), batch_options), setting.device)
