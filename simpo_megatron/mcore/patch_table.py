"""The table of all changes to modules of megatron-core and torch, which `cpu_patches` makes and no other module."""

from __future__ import annotations

from typing import NamedTuple


class Patch(NamedTuple):
    """One change: which names it replaces, in which versions they need it, when it is made, and why."""

    places: str
    """Dotted names, with alternatives of the last part in braces."""
    versions: str
    """A requirement, as pip reads it."""
    when: str
    why: str


_ALL = "megatron-core>=0.16.1,<0.20"
# Modules that allocate with a literal device="cuda"; each gets its own view of `torch`, nobody else does.
MODULES_NAMING_CUDA = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.utils",
)
PATCHES = {
    "_replace_cuda_runtime": Patch(
        "torch.cuda.{current_device,synchronize,current_stream,default_stream,Stream,Event,stream,get_rng_state,"
        "set_rng_state,manual_seed} torch.Tensor.cuda",
        "torch>=2.6",
        "no CUDA",
        "megatron-core calls them unconditionally: groups, DDP, schedules, random states, dispatchers",
    ),
    "import_uncompiled": Patch(
        "torch.compile torch.compiler.disable",
        "torch>=2.6",
        "no CUDA, while megatron-core and transformers are imported",
        "decorators alone load dynamo and inductor, two seconds in every rank; nothing compiled is called",
    ),
    "_allocate_on_the_cpu": Patch(
        " ".join(f"{module}.torch" for module in MODULES_NAMING_CUDA),
        _ALL,
        "no CUDA",
        'they allocate with a literal device="cuda"',
    ),
    "_replace_random_state": Patch(
        "megatron.core.tensor_parallel.random.{_get_cuda_rng_state,_set_cuda_rng_state}",
        _ALL,
        "no CUDA",
        "they read CUDA's generators; dropout and recompute of the CPU draw from torch's own",
    ),
    "_name_cpu_tensors_as_the_optimizers_expect": Patch(
        "torch.Tensor.type",
        "torch>=2.6",
        "no CUDA, for callers in megatron.core.optimizer",
        "optimizers sort parameters by type() == 'torch.cuda.FloatTensor' and refuse others",
    ),
    "_define_te_general_gemm": Patch(
        "megatron.core.transformer.moe.moe_utils.te_general_gemm",
        "megatron-core>=0.16.1,<0.17",
        "no Transformer Engine",
        "the router's product names it, and without Transformer Engine it is not defined",
    ),
    "_route_tokens_on_the_cpu": Patch(
        "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
        _ALL,
        "no CUDA",
        "it turns into numpy only what it has moved from a GPU",
    ),
    "_scale_tensors_where_they_are": Patch(
        "megatron.core.optimizer.clip_grads.multi_tensor_scale_impl "
        "megatron.core.optimizer.optimizer.multi_tensor_scale_impl",
        _ALL,
        "no CUDA",
        "its torch form makes a scaled copy of every gradient and copies it back",
    ),
    "_rotate_in_one_pass": Patch(
        "megatron.core.models.common.embeddings.rope_utils._apply_rotary_pos_emb_bshd",
        _ALL,
        "no CUDA",
        "six tensors for queries and six for keys of every layer, and cosines and sines anew, which autograd keeps",
    ),
    "_recompute_parts_without_transformer_engine": Patch(
        "megatron.core.tensor_parallel.random.{FP8GlobalStateManager,activation_recompute_forward,fp8_autocast}",
        _ALL,
        "no Transformer Engine",
        "recompute of norms and activations always asks Transformer Engine whether they are FP8",
    ),
    "_compile_rotary_embedding": Patch(
        "megatron.core.models.common.embeddings.rope_utils._apply_rotary_pos_emb_bshd",
        _ALL,
        "CUDA without Transformer Engine",
        "twelve kernels for queries and twelve for keys of every layer, where Transformer Engine has one",
    ),
    "_restore_adam_step_of_the_distributed_optimizer": Patch(
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states",
        _ALL,
        "torch's AdamW",
        "the loader drops `step`: it fails on the missing key, or all parameters share one tensor, silently wrong",
    ),
    "_add_weight_gradients_by_torch": Patch(
        "megatron.core.tensor_parallel.layers.{fused_weight_gradient_mlp_cuda,_grad_accum_fusion_available}",
        _ALL,
        "no apex",
        "weight gradients are added to `main_grad` in fp32 by a kernel of apex alone, which torch has by now",
    ),
    "write_checkpoints_in_threads": Patch(
        "megatron.core.dist_checkpointing.strategies.filesystem_async.{mp,_results_queue}",
        _ALL,
        "before a checkpoint is written",
        "the writer forks (0.16) and spawns a process that imports torch and megatron again (all), seconds a rank",
    ),
    "drop_warning_of_incomplete_folder": Patch(
        "megatron.core.dist_checkpointing.serialization.logger",
        _ALL,
        "before a checkpoint is written",
        "a run puts small files into its draft first, and megatron-core warns of any file there",
    ),
    "reading_by": Patch(
        "torch.load torch.distributed.checkpoint.filesystem.FileSystemReader.read_metadata "
        "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader"
        ".CachedMetadataFileSystemReader.read_metadata",
        _ALL,
        "while a checkpoint is read",
        "torch unpickles the index, common.pt and what is in shards, and calls what they name",
    ),
    "keep_compiled_helpers": Patch(
        "megatron.core.datasets.utils.compile_helpers",
        _ALL,
        "before Megatron-LM's training, installed from a wheel",
        "it runs `make` and exits where that fails; a wheel has the helpers compiled and no Makefile",
    ),
}
"""The patches of this table, by the function that makes each."""
