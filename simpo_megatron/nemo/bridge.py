"""Megatron-Bridge: a ConfigContainer written to YAML, whole or only the overrides of a recipe."""

from __future__ import annotations

from typing import Any

from simpo_megatron.nemo import translations as to
from simpo_megatron.nemo.adapters import megatron_lora
from simpo_megatron.nemo.megatron_keys import (
    fp8,
    fp8_format,
    megatron_ddp,
    megatron_optimizer,
    megatron_scheduler,
    transformer,
)
from simpo_megatron.nemo.nemo2 import dataset_folder
from simpo_megatron.nemo.rules import Asked, Dialect, Different, Differs, Obstacle, Only, Rule, Translated, With

_LENGTHS = ("dataset.seq_length", "dataset.sequence_length", "model.seq_length")
_RECIPES = {
    "bf16_mixed": None,
    "bf16_with_fp8_delayed_scaling_mixed": "delayed",
    "bf16_with_fp8_current_scaling_mixed": "tensorwise",
    "bf16_with_fp8_subchannel_scaling_mixed": "blockwise",
    "bf16_with_mxfp8_mixed": "mxfp8",
}
_OTHER_PARTS = "a part of Megatron-Bridge that does not run here"


# Recipes that keep weights in FP8 as well: training/mixed_precision.py of Megatron-Bridge.
_GATHERED = ("delayed", "tensorwise", "mxfp8")


def _named_precision(value: Any, asked: Asked) -> dict[str, Any] | Different:
    name = str(value).replace("-", "_")
    if name not in _RECIPES:
        raise Obstacle(f"found {value!r}, expected one of {', '.join(_RECIPES)}", "mixed_precision=bf16_mixed")
    recipe = _RECIPES[name]
    settings = {"bf16": True} | ({"fp8_recipe": recipe} if recipe else {})
    if recipe not in _GATHERED:
        return settings
    return Different("weights are kept in FP8 there; here if fp8_param_gather is given as a SimPO key", settings)


def _unless_mixed_precision(rule: str | Translated) -> Translated:
    """A precision key of the model, which mixed_precision overrides."""

    def of_the_model(value: Any, asked: Asked) -> dict[str, Any] | Different | str:
        if asked.has("mixed_precision") or asked.has("mixed_precision.*"):
            return "mixed_precision decides"
        return {rule: value} if isinstance(rule, str) else rule.function(value, asked)

    options, reads = ((rule,), ()) if isinstance(rule, str) else (rule.options, rule.reads)
    return Translated(of_the_model, options, reads)


def _length_of_the_model(value: Any, asked: Asked) -> dict[str, Any] | Different | str:
    of_the_data = asked.get(*_LENGTHS[:2])
    if of_the_data is None:
        return to.sequence_length(value, asked)
    same = of_the_data == value
    return "that of the data" if same else Different(f"sequences are as long as those of the data, {of_the_data}", {})


def _resume(value: Any, asked: Asked) -> dict[str, Any]:
    save = asked.simpo.get("save") or asked.get("checkpoint.save")
    if value != save:
        raise Obstacle(
            f"found {value!r}, expected the folder of checkpoint.save, {save!r}, or null", "checkpoint.load=null"
        )
    return {"resume": "required" if asked.get("checkpoint.exit_on_missing_checkpoint") else "latest"}


_MODEL: dict[str, Rule] = {
    **transformer("model.", "model."),
    **to.taken(
        "model.",
        """tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
        context_parallel_size expert_model_parallel_size""",
    ),
    "model.sequence_parallel": to.sequence_parallel_of("model.tensor_model_parallel_size"),
    "model.seq_length": Translated(_length_of_the_model, ("max_length",), _LENGTHS[:2]),
    "model.hf_model_id": "model",
    "model.hf_model_revision": Only(
        (None, "main"), "write it behind the model's name: OWNER/NAME@REVISION", ("model",)
    ),
    "model.logit_dtype": Differs("logits have the model's dtype, or that of the SimPO key logit_dtype"),
    **to.of_the_model("model.", "builder builder.* transformer transformer.*"),
    **to.ignored(_OTHER_PARTS, "model.", "extra_checkpoint_metadata pre_wrap_hooks post_wrap_hooks _pg_collection"),
    **fp8("model."),
    "model.fp8": _unless_mixed_precision(fp8_format("model.")),
    "model.bf16": _unless_mixed_precision("bf16"),
    "model.fp16": Only((False,), "loss scaling is not here; bf16 or fp32"),
}

_PRECISION: dict[str, Rule] = {
    "mixed_precision": Translated(_named_precision, ("bf16", "fp8_recipe")),
    "mixed_precision.bf16": Translated(lambda value, asked: {"bf16": value}, ("bf16",), ("mixed_precision.fp32",)),
    "mixed_precision.fp32": With((False,)),
    "mixed_precision.fp16": Only((False,), "loss scaling is not here; bf16 or fp32"),
    **fp8("mixed_precision."),
    **to.ignored(
        to.OF_KERNELS,
        "mixed_precision.",
        """params_dtype params_dtype.* pipeline_dtype pipeline_dtype.* autocast_dtype autocast_dtype.*
        autocast_enabled grad_reduce_in_fp32 loss_scale initial_loss_scale min_loss_scale loss_scale_window
        hysteresis""",
    ),
}

_TRAIN: dict[str, Rule] = {
    "train.train_iters": "train_iters",
    "train.num_epochs": to.EPOCHS,
    "train.global_batch_size": to.SEQUENCES_AS_PAIRS,
    "train.micro_batch_size": to.micro_batch_of(*_LENGTHS),
    "train.rampup_batch_size": Only((None,), "the batch size is constant here"),
    "train.train_samples": Only((None,), "a run counts steps here: train.train_iters"),
    "train.decrease_batch_size_if_needed": Only((False,), "the batch size is constant here"),
    "train.skip_train": Only((False,), "there is nothing to run without training"),
    "train.eval_interval": to.EVAL_INTERVAL,
    "validation.eval_interval": to.EVAL_INTERVAL,
    **to.ignored(
        to.OF_EVALUATION, "", "train.eval_iters validation.eval_* validation.skip_* validation.start_eval_at_iter"
    ),
    **to.ignored(
        to.OF_EVALUATION,
        "validation.",
        "test_mode full_validation multiple_validation_sets validation_set_names",
    ),
    **to.ignored(
        _OTHER_PARTS,
        "train.",
        """empty_unused_memory_level check_weight_hash_across_dp_replicas_interval train_sync_interval exit_signal
        exit_signal.* exit_signal_handler exit_signal_handler_for_dataloader exit_signal_handler_for_training manual_gc
        manual_gc_interval manual_gc_eval check_optimizer_step_success skip_sync_grad_norm_across_mp
        _train_iters_from_num_epochs gpu_sniff_test_interval""",
    ),
    **to.each("train.", "exit_interval exit_duration_in_mins", Only((None,), "a run ends after its last step here")),
    "train.iterations_to_skip": Only((None, []), "no step is skipped here"),
    "train.step_batch_size_schedule": Only((None,), "the batch size is constant here"),
    "rng.seed": "seed",
    **to.ignored(to.OF_THE_MACHINE, "rng.", "te_rng_tracker inference_rng_tracker data_parallel_random_init"),
}

_CHECKPOINT: dict[str, Rule] = {
    **to.taken("checkpoint.", "save save_interval async_save"),
    "checkpoint.load": Translated(
        _resume, ("resume",), ("checkpoint.save", "checkpoint.exit_on_missing_checkpoint"), "CHECKPOINT.SAVE"
    ),
    "checkpoint.exit_on_missing_checkpoint": With((False,)),
    "checkpoint.finetune": Differs("a run that is continued goes on with its optimizer, from its step", (False,)),
    **to.each("checkpoint.", "save_optim load_optim", Differs("checkpoints hold the optimizer's state", (True,))),
    "checkpoint.most_recent_k": "keep_checkpoints",
    "checkpoint.pretrained_checkpoint": to.checkpoint_elsewhere("a Megatron checkpoint"),
    "checkpoint.ckpt_step": Only((None,), "give the step as the SimPO key resume", ("resume",)),
    **to.ignored(
        to.OF_FILES,
        "checkpoint.",
        """save_rng load_rng load_main_params_from_ckpt
        non_persistent_* use_checkpoint_args use_mp_args_from_checkpoint_args
        use_tokenizer_model_from_checkpoint_args ckpt_* fully_parallel_save fully_parallel_load async_*
        use_persistent_ckpt_worker strict_fsdp_dtensor_load dist_ckpt_* distrib_optim_* save_tokenizer_assets
        replication replication_* auto_detect_ckpt_format custom_manager_class save_dgrads_interval
        save_wgrads_interval save_retain_interval storage_writers_per_rank also_save_hf_checkpoint hf_*
        stream_ckpt_dequant save_params_interval save_activations_interval save_tokens_per_expert_interval
        verify_integrity""",
    ),
}

_LOGGER: dict[str, Rule] = {
    **to.taken("logger.", "log_interval tensorboard_dir wandb_project"),
    **to.ignored(
        to.OF_LOGS,
        "logger.",
        """log_params_norm log_throughput* throughput_window_size log_progress timing_log_*
        tensorboard_log_interval tensorboard_queue_size log_*_to_tensorboard log_energy log_memory_interval
        log_device_memory_used log_max_attention_logit log_num_zeros_in_grad memory_keys memory_keys.*
        runtime_time_unit wandb_exp_name wandb_save_dir wandb_entity mlflow_* comet_* logging_level
        filter_warnings modules_to_filter set_level_for_all_loggers save_config_filepath skip_train_metrics_log
        barrier_with_L1_time moe_routing_trace_*""",
    ),
}

_DATASET: dict[str, Rule] = {
    "dataset.seq_length": to.LENGTH,
    "dataset.sequence_length": to.LENGTH,
    "dataset.dataset_root": dataset_folder("dataset.do_validation"),
    "dataset.do_validation": With((True, False)),
    **to.each(
        "dataset.",
        "hf_dataset hf_dataset.* hf_validation_dataset hf_validation_dataset.* source source.* validation_source "
        "validation_source.*",
        to.data_elsewhere("a data set of supervised fine-tuning"),
    ),
    **to.ignored(
        "there is no test part here", "dataset.", "hf_test_dataset hf_test_dataset.* test_source test_source.*"
    ),
    "dataset.max_train_samples": Differs("all pairs of the files are trained on"),
    **to.each(
        "dataset.", "blend blend_per_split data_path blend.* blend_per_split.*", to.data_elsewhere("tokenised text")
    ),
    **to.ignored(
        to.OF_DATA,
        "dataset.",
        """seed random_seed num_workers memmap_workers dataloader_type data_sharding pin_memory
        persistent_workers trust_remote_code do_test packed_sequence_specs
        packed_sequence_specs.* dataset_kwargs dataset_kwargs.* split split_matrix path_to_cache
        reset_position_ids reset_attention_mask eod_mask_loss create_attention_mask drop_last
        drop_last_partial_validation_sequence add_extra_token_to_sequence
        skip_getting_attention_mask_from_dataset enable_offline_packing offline_packing_specs
        offline_packing_specs.* allow_ambiguous_pad_tokens context_parallel_size data_parallel_size
        defer_npy_index_mmap fast_cache_load full_validation hybrid_context_parallel mid_level_dataset_surplus
        mmap_bin_files mock multiple_validation_sets num_dataset_builder_threads num_samples
        object_storage_cache_path object_storage_cache_path.* sequence_parallel_size sequences_per_dataset
        token_dtype_code tokenizer tokenizer.* per_dataset_sequences_path inter_document_masking
        sft_mock_dataset_config_json varlen_* hf_output_root hf_validation_proportion hf_rewrite hf_processor_path
        preprocessing preprocessing.* dataloader_load dataloader_save defer_in_batch_packing_to_step
        enable_in_batch_packing in_batch_packing_pad_to_multiple_of pad_to_max_length pad_to_multiple_of
        blend_seed hf_processor_kwargs hf_processor_kwargs.* source_weights""",
    ),
}


def _of_a_recipe(asked: Asked) -> dict[str, str]:
    """A remark that the file only overrides a recipe, so other settings are unknown."""
    if "_target_" in asked.values:
        return {}
    here = "options that the file does not name are this program's, not those of the recipe it is laid over"
    return {"the recipe": here}


BRIDGE = Dialect(
    name="Megatron-Bridge",
    marks=(("train.", "model."), ("train.", "optimizer."), ("train.", "checkpoint.")),
    table={
        **_MODEL,
        **_PRECISION,
        **_TRAIN,
        **megatron_optimizer("optimizer."),
        **megatron_scheduler("scheduler.", "optimizer."),
        **megatron_ddp("ddp.", "optimizer.use_distributed_optimizer"),
        **_CHECKPOINT,
        **_LOGGER,
        **_DATASET,
        **megatron_lora("peft._target_", "peft.", "megatron.bridge.peft.lora.LoRA"),
        "peft.params_to_save": Only((None, []), "adapters alone are saved"),
        "peft.canonical_mapping": Only((None,), "name the layers that get adapters in target_modules"),
        **to.ignored("of a LoRA at work", "peft.", "_alias_matches _alias_to_pattern _pattern_to_alias"),
        "peft": Only((None,), "write the section of a LoRA"),
        **to.ignored(to.OF_THE_MACHINE, "", "dist dist.*"),
        "tokenizer.tokenizer_model": Differs(to.OF_THE_TOKENIZER),
        **to.ignored(to.OF_THE_TOKENIZER, "", "tokenizer tokenizer.*"),
        **to.tp_comm_overlap_of("comm_overlap.", "tp_comm_overlap", "model.", "tp_comm_*"),
        **to.ignored(to.OF_KERNELS, "", "comm_overlap comm_overlap.*"),
        **to.ignored(
            _OTHER_PARTS,
            "",
            """ft ft.* straggler straggler.* nvrx_straggler nvrx_straggler.* profiling profiling.* tensor_inspect
            tensor_inspect.* inprocess_restart inprocess_restart.* rerun_state_machine rerun_state_machine.*
            optimizer_config_override_provider optimizer_config_override_provider.* env_vars env_vars.*
            _checkpoint_load_required __version__""",
        ),
    },
    remarks=_of_a_recipe,
)
