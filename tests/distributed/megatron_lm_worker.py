"""Megatron-LM's own pretrain(), arguments from the command line, on the CPU.

Beyond what our trainer needs to run megatron-core without CUDA, its training names CUDA in places of its own. They are
redirected here and nowhere in the package, for on GPUs nothing of this is there.
"""

import functools
import sys

import torch
import torch.distributed as dist

from simpo_megatron.mcore import cpu_patches

cpu_patches.install()

from megatron.training import arguments, initialize, training  # noqa: E402

from simpo_megatron.megatron_lm.pretrain import pretrain_arguments  # noqa: E402

_ALLOCATES_ON_CUDA = ("megatron.training", "megatron.core.rerun_state_machine", "megatron.core.timers")


def let_training_do_without_cuda() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith(_ALLOCATES_ON_CUDA) and getattr(module, "torch", None) is torch:
            module.torch = cpu_patches.TorchOnCpu()
    training.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    # It warms up fused CUDA kernels, and one check of arguments asks for the GPU's generation.
    training.set_jit_fusion_options = lambda **sizes: None
    arguments.get_device_arch_version = lambda: 9
    # Without a device it would set up neither groups nor random states.
    torch.cuda.device_count = lambda: 1


if __name__ == "__main__":
    let_training_do_without_cuda()
    dist.init_process_group("gloo")
    cpu_patches.keep_compiled_helpers()
    training.pretrain(**pretrain_arguments(training.pretrain))
    dist.destroy_process_group()
