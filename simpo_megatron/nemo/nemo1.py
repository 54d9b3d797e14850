"""NeMo 1 and NeMo-Aligner: hydra files such as gpt_dpo.yaml and megatron_gpt_config.yaml."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from simpo_megatron.errors import ConfigError
from simpo_megatron.nemo import translations as to
from simpo_megatron.nemo.adapters import nemo1_lora
from simpo_megatron.nemo.megatron_keys import recompute
from simpo_megatron.nemo.preference_keys import preference_keys
from simpo_megatron.nemo.rules import Asked, Dialect, Different, Ignored, Obstacle, Only, Rule, Translated, With

_STEPS = ("model.optim.sched.max_steps", "trainer.dpo.max_steps", "trainer.max_steps")
_LENGTHS = ("model.encoder_seq_length", "model.data.seq_length")
_OPTIMIZERS = {
    "adamw": False,
    "fused_adam": False,
    "megatron_fused_adam": False,
    "distributed_fused_adam": True,
    "mcore_distributed_optim": True,
}


_FOLDERS = tuple(f"exp_manager.{name}" for name in ("explicit_log_dir", "exp_dir", "name")) + ("name",)
_OF_FP8: tuple[str, ...] = (
    "fp8_e4m3",
    "fp8_hybrid",
    "fp8_params",
    "fp8_margin",
    "fp8_interval",
    "fp8_amax_history_len",
)
_OF_FP8 += ("fp8_amax_compute_algo", "reduce_amax")
# Values that are those of the recipe here: `simpo_megatron.mcore.precision` passes them to megatron-core.
_DELAYED = {
    "fp8_margin": (None, 0),
    "fp8_interval": (None, 1),
    "fp8_amax_history_len": (None, 1024),
    "fp8_amax_compute_algo": (None, "max"),
}
_IDLE = (0, 1, 1024, True, False, "most_recent", "max")


def _folder(asked: Asked) -> str | None:
    """The folder where the experiment manager puts the run."""
    experiments, name = asked.get("exp_manager.exp_dir"), asked.get("exp_manager.name", "name")
    own = f"{experiments}/{name}" if experiments and name else experiments
    return asked.get("exp_manager.explicit_log_dir") or own


def _save(value: Any, asked: Asked) -> dict[str, Any]:
    return {"save": _folder(asked)}


def _tensorboard(value: Any, asked: Asked) -> dict[str, Any] | Different | str:
    folder = asked.simpo.get("save") or _folder(asked)
    if value and not folder:
        return Different("there is no folder for it", {})
    return {"tensorboard_dir": folder} if value else "no TensorBoard"


def _wandb(value: Any, asked: Asked) -> dict[str, Any] | str:
    project = asked.get("exp_manager.wandb_logger_kwargs.project")
    if value and not project:
        raise Obstacle("found true without a project, expected exp_manager.wandb_logger_kwargs.project")
    return {"wandb_project": project} if value else "no Weights & Biases"


def _optimizer(value: Any, asked: Asked) -> dict[str, Any]:
    if str(value) not in _OPTIMIZERS:
        raise ConfigError(f"found {value!r}, expected an AdamW: {', '.join(_OPTIMIZERS)}")
    return {"use_distributed_optimizer": _OPTIMIZERS[str(value)]}


def _betas(value: Any, asked: Asked) -> dict[str, Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise ConfigError(f"found {value!r}, expected two numbers such as [0.9, 0.98]")
    return {"adam_beta1": value[0], "adam_beta2": value[1]}


def _fp8(value: Any, asked: Asked) -> dict[str, Any] | Different | str:
    if not value:
        return "no FP8"
    settings = {"fp8_recipe": "delayed"} | ({"fp8_param_gather": True} if asked.get("model.fp8_params") else {})
    others = [f"{name} {found}" for name, here in _DELAYED.items() if (found := asked.get(f"model.{name}")) not in here]
    if asked.get("model.fp8_e4m3"):
        others.insert(0, "fp8_e4m3")
    if not others:
        return settings
    return Different(f"{', '.join(others)} there; the delayed recipe here is hybrid, of a history of 1024", settings)


def _columns(value: Any, asked: Asked) -> dict[str, Any] | str:
    """Aligner's JSON lines call the responses chosen_response and rejected_response."""
    if "data" in asked.simpo:
        return "data are given as a SimPO key"
    if value != "jsonl":
        raise Obstacle(
            f"found {value!r}, expected jsonl: other forms hold token ids, not pairs", "model.simpo.data=FILE"
        )
    # Their prompts are in the model's format, which Aligner tokenises as they are: its docs/user-guide/dpo.rst.
    return {"chosen_column": "chosen_response", "rejected_column": "rejected_response", "chat_template": "none"}


def _validation_share(value: Any, asked: Asked) -> dict[str, Any] | str:
    """Megatron's `train,validation,test` weights; there is no test part here, its pairs are trained on."""
    if asked.has("model.data.data_prefix.*"):
        return "files for training and validation are given"
    weights = [float(part) for part in re.findall(r"[0-9.]+", str(value))]
    if len(weights) != 3 or not sum(weights):
        raise ConfigError(f"found {value!r}, expected three shares such as 98,2,0")
    return {"valid_fraction": weights[1] / sum(weights)}


_TRAINER: Mapping[str, Rule] = {
    "trainer.precision": Translated(to.number_format, ("bf16",), ("precision", "model.precision"), "bf16"),
    "trainer.max_steps": to.TRAIN_ITERS,
    "trainer.max_epochs": to.EPOCHS,
    "trainer.dpo.max_steps": to.TRAIN_ITERS,
    "trainer.dpo.max_epochs": to.EPOCHS,
    "trainer.gradient_clip_val": to.clip_of("trainer.dpo.gradient_clip_val"),
    "trainer.dpo.gradient_clip_val": to.clip_of("trainer.gradient_clip_val"),
    "trainer.log_every_n_steps": "log_interval",
    "trainer.val_check_interval": to.VAL_CHECK_INTERVAL,
    "trainer.dpo.val_check_interval": to.VAL_CHECK_INTERVAL,
    "trainer.dpo.save_interval": "save_interval",
    "trainer.accumulate_grad_batches": Only((1,), "the batch sizes decide how gradients accumulate"),
    **to.every_batch("trainer.dpo.limit_train_batches"),
    **to.every_batch("trainer.limit_train_batches"),
    **to.ignored(to.OF_THE_MACHINE, "trainer.", "devices num_nodes accelerator strategy"),
    **to.ignored(to.OF_EVALUATION, "trainer.", "limit_val_batches limit_test_batches dpo.limit_val_batches"),
    **to.ignored(
        "a setting of Lightning's trainer, which does not run here",
        "trainer.",
        """logger enable_checkpointing use_distributed_sampler replace_sampler_ddp benchmark enable_model_summary
        enable_progress_bar num_sanity_val_steps max_time detect_anomaly check_val_every_n_epoch callbacks
        reload_dataloaders_every_n_epochs""",
    ),
}

_EXPERIMENT: Mapping[str, Rule] = {
    **to.each("exp_manager.", "explicit_log_dir exp_dir", Translated(_save, ("save",), _FOLDERS, "DIR")),
    "exp_manager.resume_if_exists": to.resume_of("exp_manager.resume_ignore_no_checkpoint"),
    "exp_manager.resume_from_checkpoint": Only((None,), "a run continues from its own folder: exp_manager.exp_dir"),
    "exp_manager.create_tensorboard_logger": Translated(_tensorboard, ("tensorboard_dir",), _FOLDERS),
    "exp_manager.create_wandb_logger": Translated(
        _wandb, ("wandb_project",), ("exp_manager.wandb_logger_kwargs.*",), "true"
    ),
    "exp_manager.checkpoint_callback_params.every_n_train_steps": "save_interval",
    "exp_manager.checkpoint_callback_params.async_save": "async_save",
    "exp_manager.checkpoint_callback_params.save_top_k": to.KEEP_CHECKPOINTS,
    "exp_manager.resume_ignore_no_checkpoint": With((True, False)),
    **to.ignored(
        to.OF_FILES, "exp_manager.", "checkpoint_callback_params.* create_checkpoint_callback resume_past_end"
    ),
    **to.ignored(
        to.OF_LOGS,
        "exp_manager.",
        """use_datetime_version version log_step_timing step_timing_kwargs.* summary_writer_kwargs.*
        create_*_logger create_*_callback *_logger_kwargs.* *_callback_params.* log_local_rank_0_only
        log_global_rank_0_only files_to_copy model_parallel_size ema.* max_time_per_run seconds_to_sleep
        log_tflops_per_sec_per_gpu disable_validation_on_resume""",
    ),
}

_MODEL: Mapping[str, Rule] = {
    **to.taken(
        "model.",
        """global_batch_size tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
        virtual_pipeline_model_parallel_size expert_model_parallel_size hidden_dropout attention_dropout seed""",
    ),
    "model.micro_batch_size": to.micro_batch_of(*_LENGTHS),
    "model.rampup_batch_size": Only((None,), "the batch size is constant here"),
    "model.sequence_parallel": to.sequence_parallel_of("model.tensor_model_parallel_size"),
    "model.encoder_seq_length": to.LENGTH,
    **recompute("model.", "activations_checkpoint_granularity"),
    "model.fp8": Translated(_fp8, ("fp8_recipe",), tuple(f"model.{name}" for name in _OF_FP8), "true"),
    **to.each("model.", "fp8_e4m3 fp8_hybrid fp8_params", With((False,))),
    # Values of NeMo 1's own configurations without FP8.
    **to.each("model.", "fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo reduce_amax", With(_IDLE)),
    "model.restore_from_path": to.checkpoint_elsewhere("a .nemo file"),
    "model.resume_from_checkpoint": Only((None,), "a run continues from its own folder: exp_manager.exp_dir"),
    **nemo1_lora("model.peft."),
    "model.freeze_updates.enabled": Only(
        (False,), "whole layers cannot be frozen here", reads=("model.freeze_updates.*",)
    ),
    **preference_keys("model.dpo.", "ref_policy_kl_penalty"),
    "model.dpo.log_prob_forward_micro_batch_size": Ignored(to.OF_THE_MACHINE),
    **to.of_the_model(
        "model.",
        """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels
        max_position_embeddings init_method_std use_scaled_init_method ffn_dropout normalization
        layernorm_epsilon do_layer_norm_weight_decay make_vocab_size_divisible_by pre_process post_process bias
        qkv_bias activation headscale transformer_block_type openai_gelu normalize_attention_scores
        position_embedding_type rotary_percentage rotary_base rotary_interleaved seq_len_interpolation_factor
        scale_positional_embedding share_embeddings_and_output_weights attention_type num_moe_experts
        moe_* apply_query_key_layer_scaling window_size add_bias_linear""",
    ),
    **to.ignored(to.OF_THE_TOKENIZER, "model.", "tokenizer.*"),
    **to.ignored("NeMo's own names for a model", "model.", "mcore_gpt name target overwrite_base_config.*"),
    **to.ignored(
        to.OF_KERNELS,
        "model.",
        """persist_layer_norm apply_rope_fusion bias_activation_fusion bias_dropout_add_fusion
        masked_softmax_fusion get_attention_mask_from_fusion cross_entropy_loss_fusion transformer_engine
        use_flash_attention gradient_accumulation_fusion gradient_as_bucket_view megatron_amp_O2
        megatron_amp_o2 grad_allreduce_chunk_size_mb grad_div_ar_fusion native_amp_* hysteresis
        fp32_residual_connection fp16_lm_cross_entropy use_cpu_initialization use_emha
        overlap_p2p_comm batch_p2p_comm sync_batch_comm activations_checkpoint_layers_per_pipeline
        dist_ckpt_* deterministic_mode
        num_micro_batches_with_partial_activation_checkpoints use_te_rng_tracker enable_cuda_graph fsdp*
        inference.* context_parallel_comm_type defer_embedding_wgrad_compute wgrad_deferral_limit""",
    ),
    **to.tp_comm_overlap_of("model.", "ub_tp_comm_overlap", "model.", "ub_tp_comm_overlap_cfg.* tp_comm_*"),
    **to.ignored(
        to.OF_LOGS, "model.", "apex_transformer_log_level onnx_safe nsys_profile.* memory_profile.* gc_interval"
    ),
    **to.ignored(
        "NeMo's names for stages and towers that a Hugging Face model does not have",
        "model.",
        "pipeline_model_parallel_split_rank encoder_tensor_model_parallel_size encoder_pipeline_model_parallel_size",
    ),
}

_OPTIMIZER: Mapping[str, Rule] = {
    "model.optim.name": Translated(_optimizer, ("use_distributed_optimizer",)),
    **to.taken("model.optim.", "lr weight_decay"),
    "model.optim.eps": "adam_eps",
    "model.optim.betas": Translated(_betas, ("adam_beta1", "adam_beta2")),
    "model.optim.overlap_grad_sync": "overlap_grad_reduce",
    "model.optim.overlap_param_sync": "overlap_param_gather",
    "model.optim.sched.name": to.SCHEDULE,
    "model.optim.sched.warmup_steps": "lr_warmup_iters",
    "model.optim.sched.max_steps": to.max_steps_unless("model.optim.sched.constant_steps"),
    "model.optim.sched.constant_steps": to.constant_steps_of(*_STEPS),
    "model.optim.sched.warmup_ratio": "lr_warmup_fraction",
    "model.optim.sched.min_lr": "min_lr",
    **to.ignored(to.OF_SCHEDULE, "model.optim.sched.", "monitor reduce_on_plateau"),
    **to.ignored(
        to.OF_KERNELS,
        "model.optim.",
        """bucket_cap_mb contiguous_grad_buffer contiguous_param_buffer grad_sync_dtype dtype param_sync_dtype
        ddp_bucket_size distribute_within_nodes average_in_collective overlap_param_gather_with_optimizer_step
        align_param_gather adam_w_mode capturable nccl_ub""",
    ),
}

_DATA: Mapping[str, Rule] = {
    "model.data.data_prefix": "data",
    "model.data.data_prefix.train": "data",
    "model.data.data_prefix.validation": "valid_data",
    "model.data.data_prefix.test": Ignored("there is no test part here"),
    "model.data.data_impl": Translated(_columns, ("chosen_column", "rejected_column", "chat_template")),
    "model.data.splits_string": Translated(_validation_share, ("valid_fraction",)),
    "model.data.seq_length": to.LENGTH,
    **to.ignored(
        to.OF_DATA,
        "model.data.",
        """skip_warmup num_workers reset_position_ids reset_attention_mask eod_mask_loss index_mapping_dir
        dataloader_type pad_length_to_multiple_of mmap_bin_files validation_drop_last
        no_seqlen_plus_one_input_tokens pad_samples_to_global_batch_size shuffle_documents
        exchange_indices_distributed delay_data_init data_parallel_size delay_data_mmap legacy_dataset
        drop_last pin_memory persistent_workers apply_chat_template""",
    ),
    **to.ignored("pairs carry no rewards in SimPO", "model.data.", "default_chosen_reward default_rejected_reward"),
}

NEMO_1 = Dialect(
    name="NeMo 1 / Aligner",
    marks=(("trainer.", "model."), ("exp_manager.", "model.")),
    simpo="model.simpo.",
    table={
        **_TRAINER,
        **_EXPERIMENT,
        **_MODEL,
        **_OPTIMIZER,
        **_DATA,
        "restore_from_path": to.checkpoint_elsewhere("a .nemo file"),
        "pretrained_checkpoint.restore_from_path": to.checkpoint_elsewhere("a .nemo file"),
        **to.ignored(to.OF_THE_MODEL, "pretrained_checkpoint.", "checkpoint_dir checkpoint_name hparams_file"),
    },
    remarks=to.unsaved("exp_manager.exp_dir", "exp_manager.explicit_log_dir"),
)
