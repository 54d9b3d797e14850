"""NeMo 2: recipes as NeMo-Run writes them to YAML (`run.Partial(llm.finetune, ...)`); its objects are never made."""

from __future__ import annotations

from typing import Any

from simpo_megatron.errors import ConfigError
from simpo_megatron.nemo import translations as to
from simpo_megatron.nemo.adapters import megatron_lora
from simpo_megatron.nemo.megatron_keys import fp8, megatron_ddp, megatron_optimizer, transformer
from simpo_megatron.nemo.rules import Asked, Dialect, Differs, Ignored, Only, Rule, Translated, With

_FOLDERS = ("log.explicit_log_dir", "log.log_dir", "log.name")


def _save(value: Any, asked: Asked) -> dict[str, Any]:
    """NeMoLogger's folder: the explicit one, or one named after the run."""
    explicit = asked.get("log.explicit_log_dir")
    return {"save": explicit or f"{asked.get('log.log_dir')}/{asked.get('log.name') or 'default'}"}


def _save_interval(value: Any, asked: Asked) -> dict[str, Any] | str:
    has_folder = asked.simpo.get("save") or asked.get(*_FOLDERS[:2])
    return {"save_interval": value} if has_folder else f"nothing is saved without {_FOLDERS[1]}"


def dataset_folder(validation: str) -> Translated:
    """NeMo's folder of training.jsonl and validation.jsonl; `validation` false leaves the second alone."""

    def files(value: Any, asked: Asked) -> dict[str, Any]:
        if not isinstance(value, str):
            raise ConfigError(f"found {value!r}, expected one folder")
        validation_files = {} if asked.get(validation) is False else {"valid_data": f"{value}/validation.jsonl"}
        return {"data": f"{value}/training.jsonl"} | validation_files

    return Translated(files, ("data",), (validation,))


_TRAINER: dict[str, Rule] = {
    "trainer.max_steps": to.TRAIN_ITERS,
    "trainer.max_epochs": to.EPOCHS,
    "trainer.log_every_n_steps": "log_interval",
    "trainer.val_check_interval": to.VAL_CHECK_INTERVAL,
    "trainer.accumulate_grad_batches": Only((1,), "the batch sizes decide how gradients accumulate"),
    **to.every_batch("trainer.limit_train_batches"),
    "trainer.gradient_clip_val": to.clip_of(),
    **to.ignored(to.OF_THE_MACHINE, "trainer.", "devices num_nodes accelerator"),
    **to.ignored(to.OF_EVALUATION, "trainer.", "limit_val_batches limit_test_batches num_sanity_val_steps"),
    **to.ignored(
        "a part of Lightning's trainer, which does not run here",
        "trainer.",
        "callbacks logger enable_checkpointing use_distributed_sampler enable_progress_bar max_time benchmark",
    ),
    "trainer.plugins.precision": Translated(
        to.number_format, ("bf16",), ("model.config.bf16", "model.config.fp16"), "bf16-mixed"
    ),
    **fp8("trainer.plugins."),
    **to.ignored(
        to.OF_KERNELS,
        "trainer.plugins.",
        """params_dtype.* pipeline_dtype.* autocast_dtype autocast_dtype.* autocast_enabled grad_reduce_in_fp32
        params_dtype pipeline_dtype fp16_*""",
    ),
}

_STRATEGY: dict[str, Rule] = {
    **to.taken(
        "trainer.strategy.",
        """tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
        context_parallel_size expert_model_parallel_size""",
    ),
    "trainer.strategy.sequence_parallel": to.sequence_parallel_of("trainer.strategy.tensor_model_parallel_size"),
    "trainer.strategy.ddp": Ignored("how state is divided says the optimizer"),
    **megatron_ddp("trainer.strategy.ddp.", "optim.config.use_distributed_optimizer"),
    "trainer.strategy.fsdp": Only((None,), "weights are not sharded by FSDP here"),
    **to.ignored(
        to.OF_THE_MACHINE,
        "trainer.strategy.",
        """pipeline_model_parallel_comm_backend microbatch_group_size_per_vp_stage expert_tensor_parallel_size
        moe_extended_tp encoder_tensor_model_parallel_size encoder_pipeline_model_parallel_size
        num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
        account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split pipeline_dtype
        pipeline_dtype.* gradient_as_bucket_view gradient_accumulation_fusion use_te_rng_tracker use_sharp
        use_gloo_process_groups use_tp_pp_dp_mapping nccl_communicator_config_path lazy_init
        find_unused_parameters parallel_devices cluster_environment data_sampler progress_interval
        restore_config setup_optimizers replace_progress_bar megatron_log_level""",
    ),
    "trainer.strategy.ckpt_async_save": "async_save",
    **to.ignored(to.OF_FILES, "trainer.strategy.", "ckpt_* save_ckpt_format checkpoint_io"),
}

_OPTIM: dict[str, Rule] = {
    **megatron_optimizer("optim.config."),
    "optim.lr_scheduler._target_": to.SCHEDULE,
    "optim.lr_scheduler.warmup_steps": "lr_warmup_iters",
    "optim.lr_scheduler.max_steps": to.max_steps_unless("optim.lr_scheduler.constant_steps"),
    "optim.lr_scheduler.constant_steps": to.constant_steps_of("optim.lr_scheduler.max_steps", "trainer.max_steps"),
    "optim.lr_scheduler.warmup_ratio": "lr_warmup_fraction",
    "optim.lr_scheduler.min_lr": "min_lr",
    **to.ignored(to.OF_SCHEDULE, "optim.lr_scheduler.", "interval frequency monitor"),
    "optim.lr_mult": Only((1, 1.0), "all layers have one learning rate here"),
    **to.each("optim.", "scale_lr_cond scale_lr_cond.*", Only((None, False), "all layers have one learning rate here")),
    **to.each(
        "optim.",
        "no_weight_decay_cond no_weight_decay_cond.*",
        Differs("weight decay is on all weights but biases and norms here", (False,)),
    ),
}

_DATA: dict[str, Rule] = {
    "data.global_batch_size": to.SEQUENCES_AS_PAIRS,
    "data.micro_batch_size": to.micro_batch_of("data.seq_length"),
    "data.rampup_batch_size": Only((None,), "the batch size is constant here"),
    "data.seq_length": to.LENGTH,
    "data.seed": "seed",
    "data.dataset_root": dataset_folder("data.do_validation"),
    "data.do_validation": With((True, False)),
    "data.paths": to.data_elsewhere("tokenised text"),
    **to.ignored(
        to.OF_DATA,
        "data.",
        """num_workers memmap_workers pin_memory persistent_workers split index_mapping_dir num_train_samples
        num_val_samples num_test_samples reset_position_ids reset_attention_mask eod_mask_loss
        init_consumed_samples init_global_step packed_sequence_specs packed_sequence_specs.* dataset_kwargs
        dataset_kwargs.* dataset_cls force_redownload delete_raw do_test create_attention_mask
        vocab_file merges_file""",
    ),
    **to.ignored(to.OF_THE_TOKENIZER, "data.", "tokenizer tokenizer.*"),
}

_RUN: dict[str, Rule] = {
    **to.each("log.", "explicit_log_dir log_dir", Translated(_save, ("save",), _FOLDERS, "DIR")),
    "log.name": With(("default",)),
    "log.ckpt.every_n_train_steps": Translated(_save_interval, ("save_interval",), _FOLDERS[:2]),
    "log.ckpt.save_top_k": to.KEEP_CHECKPOINTS,
    "log.tensorboard.save_dir": "tensorboard_dir",
    "log.wandb.project": "wandb_project",
    **to.ignored(to.OF_FILES, "log.", "ckpt ckpt.*"),
    **to.ignored(
        to.OF_LOGS,
        "log.",
        """version use_datetime_version files_to_copy update_logger_directory tensorboard tensorboard.* wandb
        wandb.* extra_loggers log_local_rank_0_only log_global_rank_0_only""",
    ),
    "resume.resume_if_exists": to.resume_of("resume.resume_ignore_no_checkpoint"),
    "resume.resume_ignore_no_checkpoint": With((True, False)),
    **to.each(
        "resume.",
        "restore_config restore_config.path resume_from_directory resume_from_path",
        to.checkpoint_elsewhere("a NeMo checkpoint"),
    ),
    **to.ignored(to.OF_FILES, "resume.", "resume_past_end restore_config.load_* restore_config.adapter_path"),
}

NEMO_2 = Dialect(
    name="NeMo 2",
    marks=(("trainer.", "data."), ("trainer.", "optim."), ("trainer.strategy.",), ("trainer.", "log.")),
    table={
        **_TRAINER,
        **_STRATEGY,
        **_OPTIM,
        **_DATA,
        **_RUN,
        **transformer("model.config.", "trainer.strategy."),
        **to.each("model.config.", "bf16 fp16", With((False,))),
        "model.config.fp8": Only((None, False), "give it as trainer.plugins.fp8"),
        **to.ignored("of FP8 that trainer.plugins asks for", "model.config.", "fp8_*"),
        "model.config.fp4": Only((None, False), "there is no FP4 here"),
        **to.ignored("there is no FP4 here", "model.config.", "fp4_*"),
        "model.config.seq_length": Ignored("the longest sequence that the model takes"),
        **to.ignored(to.OF_THE_MODEL, "model.", "config optim model_transform"),
        **megatron_lora("peft._target_", "peft.", "nemo.collections.llm.peft.lora.LoRA"),
        "peft": Only((None,), "write the section of a LoRA"),
        **to.ignored(to.OF_THE_TOKENIZER, "", "tokenizer tokenizer.* model.tokenizer model.tokenizer.*"),
    },
    remarks=to.unsaved("log.log_dir", "log.explicit_log_dir"),
)
