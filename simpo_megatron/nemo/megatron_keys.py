"""The keys of megatron-core's own configurations, which NeMo 2, NeMo-RL and Megatron-Bridge have under own prefixes."""

from __future__ import annotations

from typing import Any

from simpo_megatron.nemo.rules import Asked, Different, Differs, Obstacle, Only, Rule, Translated, With
from simpo_megatron.nemo.translations import (
    OF_KERNELS,
    OF_ROUTERS,
    OF_SCHEDULE,
    each,
    ignored,
    of_the_model,
    taken,
    tp_comm_overlap_of,
)


def recompute(prefix: str, granularity: str = "recompute_granularity") -> dict[str, Rule]:
    """The keys of activation recomputation; method and number of layers belong to `full` alone."""
    stem = granularity.removesuffix("granularity")

    def of_full(option: str) -> Translated:
        def detail(value: Any, asked: Asked) -> dict[str, Any] | str:
            asked_for = asked.simpo.get("recompute_granularity") or asked.get(prefix + granularity)
            return {option: value} if asked_for == "full" else "only full recomputation has it"

        return Translated(detail, (option,), (prefix + granularity,))

    return {
        prefix + granularity: "recompute_granularity",
        f"{prefix}{stem}method": of_full("recompute_method"),
        f"{prefix}{stem}num_layers": of_full("recompute_num_layers"),
    }


# The fixed settings of each recipe; `simpo_megatron.mcore.precision` passes them to megatron-core.
_OF_A_RECIPE: dict[str, dict[str, Any]] = {
    "delayed": {"fp8": "hybrid", "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"},
    "tensorwise": {"fp8": "hybrid", "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1},
    "blockwise": {"fp8": "e4m3"},
    "mxfp8": {"fp8": "e4m3"},
}
_IN_BF16 = "first_last_layers_bf16"


def fp8_format(prefix: str, switch: str = "fp8") -> Translated:
    """The rule of megatron-core's key `fp8`, a format (null for none) beside a recipe; `switch` stands before it."""
    details = {name for details in _OF_A_RECIPE.values() for name in details}
    details |= {"fp8", "fp8_recipe", "fp8_param", "fp8_param_gather", _IN_BF16}
    reads = tuple(prefix + name for name in sorted(details))

    def recipe(value: Any, asked: Asked) -> dict[str, Any] | Different | str:
        if not value:
            return "no FP8"
        name = asked.get(f"{prefix}fp8_recipe") or "delayed"
        gather = asked.get(f"{prefix}fp8_param_gather", f"{prefix}fp8_param") is True
        settings = {"fp8_recipe": name} | ({"fp8_param_gather": True} if gather else {})
        others = [
            f"{detail} {asked.get(prefix + detail)} ({fixed} here)"
            for detail, fixed in _OF_A_RECIPE.get(name, {}).items()
            if asked.get(prefix + detail) not in (None, fixed)
        ]
        if asked.get(prefix + _IN_BF16) not in (None, name == "tensorwise"):
            others.append(f"{_IN_BF16} {str(asked.get(prefix + _IN_BF16)).lower()}")
        return Different(f"the recipe {name} has its own {', '.join(others)}", settings) if others else settings

    return Translated(recipe, ("fp8_recipe",), reads, "hybrid" if switch == "fp8" else "true")


def fp8(prefix: str) -> dict[str, Rule]:
    """The rules of the FP8 keys of megatron-core's configurations: a format and a recipe."""
    return {
        f"{prefix}fp8": fp8_format(prefix),
        # Values that megatron-core's and Bridge's dataclasses write for models without FP8.
        f"{prefix}fp8_param": With((False,)),
        f"{prefix}fp8_param_gather": With((False,)),
        f"{prefix}{_IN_BF16}": With((False,)),
        **ignored(
            "a recipe brings its own margin and interval",
            prefix,
            """fp8_margin fp8_interval fp8_wgrad fp8_params fp8_dot_product_attention fp8_multi_head_attention
            reuse_grad_buf_for_mxfp8_param_ag fp8_quantizer_factory fp8_output_proj tp_only_amax_red""",
        ),
        f"{prefix}fp4": Only((None,), "there is no FP4 here"),
        **ignored("there is no FP4 here", prefix, "fp4_recipe fp4_param fp4_param_gather fp4_quantizer_factory"),
    }


def megatron_optimizer(prefix: str) -> dict[str, Rule]:
    """The keys of megatron-core's OptimizerConfig."""
    adam = "AdamW in megatron-core's form is what trains here"
    return {
        **taken(prefix, "lr weight_decay adam_beta1 adam_beta2 adam_eps clip_grad use_distributed_optimizer"),
        f"{prefix}min_lr": "min_lr",
        f"{prefix}optimizer": Only(("adam",), adam),
        f"{prefix}decoupled_weight_decay": Only((True,), adam),
        f"{prefix}fp16": Only((False,), "loss scaling is not here; bf16 or fp32"),
        **ignored(
            "weights, gradients and moments have the dtypes of bf16 or fp32 training here",
            prefix,
            """bf16 params_dtype use_precision_aware_optimizer store_param_remainders main_grads_dtype
            main_params_dtype exp_avg_dtype exp_avg_sq_dtype loss_scale initial_loss_scale min_loss_scale
            loss_scale_window hysteresis fp8_recipe reuse_grad_buf_for_mxfp8_param_ag""",
        ),
        **ignored(
            adam,
            prefix,
            """sgd_momentum muon_* adaptive_muon_* lion_* soap_* log_num_zeros_in_grad timers config_logger_dir
            barrier_with_L1_time overlap_param_gather_with_optimizer_step use_layer_wise_distributed_optimizer
            optimizer_cuda_graph""",
        ),
        **each(prefix, "decoupled_lr decoupled_min_lr", Only((None,), "all layers have one learning rate here")),
        f"{prefix}apply_wd_to_qk_layernorm": Only((False,), "weight decay is never on norms here"),
        f"{prefix}grad_norm_skip_threshold": Differs("no step is skipped for a large gradient", (float("inf"),)),
        f"{prefix}optimizer_cpu_offload": Only((False,), "the optimizer's state stays on the GPU here"),
        **ignored(
            "the optimizer's state stays on the GPU here",
            prefix,
            """optimizer_offload_fraction use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d
            pin_cpu_grads pin_cpu_params""",
        ),
    }


def megatron_ddp(prefix: str, optimizers: str) -> dict[str, Rule]:
    """The keys of megatron-core's DistributedDataParallelConfig beside an optimizer's key of the same meaning."""
    own = f"{prefix}use_distributed_optimizer"

    def distributed_optimizer(value: Any, asked: Asked) -> dict[str, Any] | str:
        return {"use_distributed_optimizer": value} if asked.get(optimizers) is None else f"{optimizers} decides"

    def param_gather(value: Any, asked: Asked) -> dict[str, Any] | str:
        divided = asked.simpo.get("use_distributed_optimizer", asked.get(optimizers, own))
        return {"overlap_param_gather": value} if divided else "nothing to gather without the distributed optimizer"

    readable = (optimizers, own)
    of_optimizer = optimizers.replace("use_distributed_optimizer", "overlap_param_gather")

    return {
        f"{prefix}overlap_grad_reduce": "overlap_grad_reduce",
        f"{prefix}overlap_param_gather": Translated(param_gather, ("overlap_param_gather",), (*readable, of_optimizer)),
        of_optimizer: With((False,)),
        own: Translated(distributed_optimizer, ("use_distributed_optimizer",), readable),
        **each(prefix, "use_megatron_fsdp use_custom_fsdp", Only((False,), "weights are not sharded by FSDP here")),
        **ignored(
            OF_KERNELS,
            prefix,
            """grad_reduce_in_fp32 align_param_gather average_in_collective bucket_size check_for_large_grads
            check_for_nan_in_grad data_parallel_sharding_strategy delay_wgrad_compute
            disable_symmetric_registration fp8_param_gather fsdp_* gradient_reduce_div_fusion
            keep_fp8_transpose_cache megatron_fsdp_* nccl_ub num_distributed_optimizer_instances
            outer_dp_sharding_strategy pad_buckets_for_high_nccl_busbw
            param_name_patterns_for_fp32_local_accumulation preserve_fp32_weights
            reduce_scatter_with_fp32_accumulation reuse_grad_buf_for_mxfp8_param_ag
            suggested_communication_unit_size finalize_model_grads_func num_buckets fp4_param_gather""",
        ),
    }


def megatron_scheduler(prefix: str, optimizer: str) -> dict[str, Rule]:
    """The keys of Megatron's schedule beside the optimizer under `optimizer`.

    Source: Megatron-Bridge training/config.py (_calculate_scheduler_steps), megatron-core optimizer_param_scheduler.py.
    """
    fraction, longest = f"{prefix}lr_warmup_fraction", f"{prefix}max_steps"
    start, end = f"{prefix}start_weight_decay", f"{prefix}end_weight_decay"

    def warmup(value: Any, asked: Asked) -> dict[str, Any] | str:
        return f"{fraction} decides" if asked.get(fraction) is not None else {"lr_warmup_iters": value}

    def decay(value: Any, asked: Asked) -> dict[str, Any] | str:
        return f"{longest} decides" if asked.get(longest) is not None else {"lr_decay_iters": value}

    def begins(value: Any, asked: Asked) -> str:
        held = asked.get(end, f"{optimizer}weight_decay")
        if value != held:
            raise Obstacle(f"found {value} and later {held}, expected the same", f"{start}={held}")
        return "weight decay is constant here"

    return {
        f"{prefix}lr_decay_style": "lr_decay_style",
        f"{prefix}lr_warmup_iters": Translated(warmup, ("lr_warmup_iters",), (fraction,)),
        fraction: "lr_warmup_fraction",
        f"{prefix}lr_warmup_init": "lr_warmup_init",
        f"{prefix}lr_decay_iters": Translated(decay, ("lr_decay_iters",), (longest,)),
        longest: "lr_decay_iters",
        f"{prefix}weight_decay_incr_style": Only(("constant",), "weight decay is constant here"),
        start: Translated(begins, (), (end, f"{optimizer}weight_decay")),
        end: "weight_decay",
        f"{optimizer}weight_decay": weight_decay_unless(end),
        f"{prefix}no_weight_decay_cond_type": Only((None,), "weight decay is never on biases and norms here"),
        **ignored(
            OF_SCHEDULE,
            prefix,
            """override_opt_param_scheduler use_checkpoint_opt_param_scheduler lr_wsd_decay_style lr_wsd_decay_iters
            lr_warmup_steps lr_decay_steps wd_incr_steps wsd_decay_steps""",
        ),
        **each(
            prefix,
            "lr_decay_samples lr_warmup_samples lr_wsd_decay_samples",
            Only((0,), "a schedule counts steps here, not samples"),
        ),
    }


def weight_decay_unless(scheduler: str) -> Translated:
    """An optimizer's weight decay, over which that of the schedule is written in every step."""

    def weight_decay(value: Any, asked: Asked) -> dict[str, Any] | str:
        return {"weight_decay": value} if asked.get(scheduler) is None else f"{scheduler} decides"

    return Translated(weight_decay, ("weight_decay",), (scheduler,))


def transformer(prefix: str, parallel: str) -> dict[str, Rule]:
    """The keys of megatron-core's TransformerConfig and of the GPT models built on it, layout and precision apart.

    The sizes of the layout are under `parallel`.
    """
    return {
        **tp_comm_overlap_of(prefix, "tp_comm_overlap", parallel, "tp_comm_*"),
        **taken(prefix, "hidden_dropout attention_dropout recompute_modules moe_aux_loss_coeff"),
        **recompute(prefix),
        **of_the_model(prefix, _ARCHITECTURE),
        **ignored(OF_KERNELS, prefix, _KERNELS),
        f"{prefix}mtp_num_layers": Only((None, 0), "multi-token prediction is not trained here"),
        f"{prefix}cpu_offloading": Only((False,), "activations stay on the GPU here"),
        f"{prefix}freeze_moe_router": Differs(OF_ROUTERS, (False,)),
    }


_ARCHITECTURE = """
num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization
layernorm_epsilon layernorm_zero_centered_gamma add_bias_linear add_qkv_bias gated_linear_unit glu_linear_offset
activation_func activation_func.* activation_func_clamp_value init_method init_method.* init_method_std
output_layer_init_method output_layer_init_method.* embedding_init_method embedding_init_method.*
embedding_init_method_std
apply_residual_connection_post_layernorm apply_query_key_layer_scaling attention_softmax_in_fp32 softmax_scale
softmax_type attention_output_gate window_size window_attn_skip_freq no_rope_freq mrope_section
position_embedding_type rotary_* rope_* yarn_* mscale mscale_all_dim beta_fast beta_slow
original_max_position_embeddings seq_len_interpolation_factor multi_latent_attention q_lora_rank kv_lora_rank qk_*
v_head_dim cache_mla_latents cross_attention_* num_moe_experts moe_* mtp_* mup_* use_mup is_hybrid_model hybrid_*
mamba_* linear_* dsa_* experimental_attention_variant* heterogeneous_block_specs hetereogenous_dist_checkpoint
share_embeddings_and_output_weights make_vocab_size_divisible_by vocab_size should_pad_vocab max_position_embeddings
scale_factor old_context_len low_freq_factor high_freq_factor parallel_output transformer_layer_spec
transformer_layer_spec.* scatter_embedding_sequence_parallel pre_process post_process restore_modelopt_state
generation_config.* generation_config fp16_lm_cross_entropy fp32_residual_connection calculate_per_token_loss
perform_initialization init_model_with_meta_device num_layers_in_first_pipeline_stage
num_layers_in_last_pipeline_stage account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
pipeline_model_parallel_layout expert_tensor_parallel_size quant_recipe enable_mhc_connections mhc_*
gtp_remat_opt_in_modules gdp_*
"""

_KERNELS = """
transformer_impl attention_backend apply_rope_fusion fused_* bias_activation_fusion bias_dropout_fusion
masked_softmax_fusion persist_layer_norm memory_efficient_layer_norm gradient_accumulation_fusion cross_entropy_*
activation_func_fp8_input_store distribute_saved_activations overlap_* batch_p2p_* batch_invariant_mode
use_ring_exchange_p2p deallocate_pipeline_outputs defer_embedding_wgrad_compute wgrad_deferral_limit
delay_wgrad_compute variable_seq_lengths microbatch_group_size_per_vp_stage
num_microbatches_with_partial_activation_checkpoints pipeline_model_parallel_comm_backend
async_tensor_model_parallel_allreduce hierarchical_context_parallel_sizes cp_comm_type max_seqlen_per_dp_cp_rank
cuda_graph_* enable_cuda_graph external_cuda_graph use_te_rng_tracker use_te_* inference_* flash_decode
mlp_chunks_for_* nccl_all_reduce_for_prefill symmetric_ar_type use_kitchen use_kitchen_attention kitchen_*
use_fused_* use_inference_optimized_layers use_mamba_mem_eff_path use_transformer_engine_*
use_arbitrary_attention_mask cpu_offloading_* offload_modules fine_grained_* min_offloaded_tensor_size
ep_overlap_early_attn_memory_release clone_scatter_output_in_embedding disable_parameter_transpose_cache
disable_bf16_reduced_precision_matmul deterministic_mode log_max_attention_logit test_mode timers config_logger_dir
barrier_with_L1_time use_cpu_initialization autocast_dtype autocast_dtype.* enable_autocast params_dtype
params_dtype.* pipeline_dtype pipeline_dtype.* grad_scale_func no_sync_func grad_sync_func param_sync_func
finalize_model_grads_func gradient_reduce_div_fusion _cpu_offloading_context flash_attention_version
tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards gtp_weight_remat_size
expert_gtp_weight_remat_size high_priority_a2a_comm_stream use_grouped_gemm_* delay_offload_until_cuda_graph
delta_offload_bytes_across_pp_ranks activation_offload_fraction dense_grouped_gemm batch_invariant_backend
mla_down_proj_fusion
"""
