"""SimPO for Megatron-LM's own training script: arguments, data, model and loss as its `pretrain()` takes them."""

from simpo_megatron.megatron_lm.arguments import add_simpo_args
from simpo_megatron.megatron_lm.datasets import train_valid_test_datasets_provider
from simpo_megatron.megatron_lm.hooks import forward_step, loss_func, model_provider
from simpo_megatron.megatron_lm.pretrain import pretrain, pretrain_arguments

__all__ = [
    "add_simpo_args",
    "forward_step",
    "loss_func",
    "model_provider",
    "pretrain",
    "pretrain_arguments",
    "train_valid_test_datasets_provider",
]
