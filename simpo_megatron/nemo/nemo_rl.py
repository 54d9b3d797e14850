"""NeMo-RL: files such as dpo.yaml, whose `defaults` name the file they change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simpo_megatron.errors import ConfigError
from simpo_megatron.nemo import translations as to
from simpo_megatron.nemo.adapters import megatron_lora
from simpo_megatron.nemo.megatron_keys import megatron_ddp, megatron_optimizer, megatron_scheduler
from simpo_megatron.nemo.rules import Asked, Dialect, Ignored, Only, Rule, Translated

_STEPS = ("dpo.max_num_steps",)
_MEGATRON = "policy.megatron_cfg."
_FILES = (".json", ".jsonl", ".parquet", ".gz")


def _files(option: str) -> Translated:
    """A local file, or a data set of the hub by its name; `split` names a part of the latter."""

    def named(value: Any, asked: Asked) -> dict[str, Any]:
        if not isinstance(value, str):
            raise ConfigError(f"found {value!r}, expected a file, or a name on the hub")
        if Path(value).suffix in _FILES or Path(value).exists():
            return {option: value}
        section = "train" if option == "data" else "validation"
        split = asked.get(f"data.{section}.split", "data.default.split")
        return {option: f"hub:{value}" + (f":{split}" if split else "")}

    return Translated(named, (option,))


def _dataset(value: Any, asked: Asked) -> str:
    if value != "BinaryPreferenceDataset" and "data" not in asked.simpo:
        raise ConfigError(
            f"found {value!r}, which NeMo-RL makes pairs of in its own way, expected BinaryPreferenceDataset with "
            "data_path; or give files of pairs as the SimPO key data"
        )
    return "pairs are read as they are"


def _tokenizer(value: Any, asked: Asked) -> str:
    model = asked.get("policy.model_name")
    if value != model:
        raise ConfigError(f"found {value!r}, expected policy.model_name, {model!r}: {to.OF_THE_TOKENIZER}")
    return to.OF_THE_TOKENIZER


def _recompute_all(value: Any, asked: Asked) -> dict[str, Any] | str:
    granularity = asked.get(f"{_MEGATRON}recompute_granularity") or "full"
    return {"recompute_granularity": granularity} if value else "no recomputation"


def _fp8(value: Any, asked: Asked) -> dict[str, Any] | str:
    return {"fp8_recipe": asked.get(f"{_MEGATRON}fp8_cfg.fp8_recipe") or "delayed"} if value else "no FP8"


def _if_checkpointing(option: str) -> Translated:
    """A key of checkpointing, which `enabled` switches off as a whole."""

    def value_if(value: Any, asked: Asked) -> dict[str, Any] | str:
        return "checkpointing.enabled is false" if asked.get("checkpointing.enabled") is False else {option: value}

    return Translated(value_if, (option,))


def _if_logged(option: str, switch: str) -> Translated:
    def value_if(value: Any, asked: Asked) -> dict[str, Any] | str:
        return {option: value} if asked.get(switch) else f"{switch} is not true"

    return Translated(value_if, (option,))


_DPO: dict[str, Rule] = {
    "dpo.max_num_steps": to.TRAIN_ITERS,
    "dpo.max_num_epochs": to.epochs_unless(*_STEPS),
    "dpo.val_period": to.EVAL_INTERVAL,
    "dpo.seed": "seed",
    **to.ignored(
        to.OF_EVALUATION, "dpo.", "val_batches val_global_batch_size val_micro_batch_size val_at_start val_at_end"
    ),
    **to.ignored(
        to.OF_DPO,
        "dpo.",
        """reference_policy_kl_penalty preference_average_log_probs preference_loss_weight sft_loss_weight
        sft_average_log_probs preference_loss gt_reward_scale""",
    ),
}

_CHECKPOINTING: dict[str, Rule] = {
    "checkpointing.checkpoint_dir": _if_checkpointing("save"),
    "checkpointing.save_period": _if_checkpointing("save_interval"),
    "checkpointing.keep_top_k": _if_checkpointing("keep_checkpoints"),
    "checkpointing.enabled": Ignored(to.READ_WITH_ANOTHER),
    "checkpointing.pretrained_checkpoint.path": to.checkpoint_elsewhere("a Megatron checkpoint"),
    **to.ignored(
        to.OF_FILES,
        "checkpointing.",
        """metric_name higher_is_better checkpoint_must_save_by model_save_format save_consolidated save_optimizer
        pretrained_checkpoint pretrained_checkpoint.format model_cache_dir model_repo_id is_peft peft_config""",
    ),
}

_POLICY: dict[str, Rule] = {
    "policy.model_name": "model",
    "policy.tokenizer.name": Translated(_tokenizer, ("model",)),
    "policy.tokenizer.chat_template": "chat_template",
    "policy.tokenizer.chat_template_kwargs": Only((None,), "a template gets no arguments here", ("chat_template",)),
    "policy.train_global_batch_size": "global_batch_size",
    "policy.train_micro_batch_size": to.micro_batch_of("policy.max_total_sequence_length"),
    "policy.max_total_sequence_length": to.LENGTH,
    "policy.precision": to.PRECISION,
    "policy.dtensor_cfg.enabled": Only((False,), "this is Megatron; write policy.megatron_cfg.enabled=true instead"),
    **to.ignored("of the DTensor worker, which does not run here", "policy.", "dtensor_cfg.* optimizer optimizer.*"),
    **to.ignored("of the DTensor worker, which does not run here", "policy.", "scheduler scheduler.* max_grad_norm"),
    **to.ignored(
        "packs hold as many pairs as fit, in alignment with layout and precision",
        "policy.",
        "make_sequence_length_divisible_by sequence_packing.* dynamic_batching.*",
    ),
    **to.ignored(
        "of generation and reference log-probabilities, which SimPO does without",
        "policy.",
        """generation generation.* generation_batch_size logprob_batch_size logprob_chunk_size
        refit_buffer_size_gb offload_optimizer_for_logprob reward_model_cfg.* draft.* router_replay.*
        hf_config_overrides.* quant_*""",
    ),
}

_MEGATRON_CFG: dict[str, Rule] = {
    f"{_MEGATRON}enabled": Only((True,), "this is Megatron; write policy.megatron_cfg.enabled=true"),
    **to.taken(
        _MEGATRON,
        """tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
        expert_model_parallel_size virtual_pipeline_model_parallel_size""",
    ),
    f"{_MEGATRON}sequence_parallel": to.sequence_parallel_of(f"{_MEGATRON}tensor_model_parallel_size"),
    f"{_MEGATRON}activation_checkpointing": Translated(_recompute_all, ("recompute_granularity",)),
    f"{_MEGATRON}recompute_granularity": Ignored(to.READ_WITH_ANOTHER),
    f"{_MEGATRON}recompute_modules": "recompute_modules",
    f"{_MEGATRON}fp8_cfg.enabled": Translated(_fp8, ("fp8_recipe",)),
    **to.ignored(to.READ_WITH_ANOTHER, f"{_MEGATRON}fp8_cfg.", "fp8 fp8_recipe fp8_param force_clear_fp8_caches"),
    **megatron_lora(f"{_MEGATRON}peft.enabled", f"{_MEGATRON}peft."),
    f"{_MEGATRON}freeze_moe_router": Ignored(to.OF_ROUTERS),
    **megatron_optimizer(f"{_MEGATRON}optimizer."),
    **megatron_scheduler(f"{_MEGATRON}scheduler.", *_STEPS),
    **megatron_ddp(f"{_MEGATRON}distributed_data_parallel_config.", f"{_MEGATRON}optimizer.use_distributed_optimizer"),
    f"{_MEGATRON}checkpoint.async_save": "async_save",
    **to.ignored(to.OF_FILES, _MEGATRON, "checkpoint.* force_reconvert_from_hf converter_type"),
    **to.ignored(
        to.OF_THE_MODEL,
        _MEGATRON,
        """num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage expert_tensor_parallel_size moe_*
        mtp_* inference_* model_overrides.* radio_force_cpe_eval_mode""",
    ),
    **to.ignored(
        to.OF_KERNELS,
        _MEGATRON,
        """env_vars env_vars.* empty_unused_memory_level pipeline_dtype apply_rope_fusion bias_activation_fusion
        gradient_accumulation_fusion attention_backend transformer_impl use_fused_*
        fused_linear_logprobs_chunk_size defer_fp32_logits cuda_graph_* fine_grained_activation_offloading
        offload_modules use_gloo_process_groups hybridep_* clear_memory_caches_before_refit layernorm_epsilon""",
    ),
}

_DATA: dict[str, Rule] = {
    "data.train.data_path": _files("data"),
    "data.validation.data_path": _files("valid_data"),
    "data.train_data_path": _files("data"),
    "data.val_data_path": _files("valid_data"),
    **to.each("data.", "val_data_paths.*", Only((None,), "one file as data.validation.data_path", ("valid_data",))),
    **to.each(
        "data.",
        "dataset_name train.dataset_name validation.dataset_name default.dataset_name",
        Translated(_dataset, ()),
    ),
    **{
        f"data.{section}{key}_key": f"{key}_column"
        for section in ("", "train.", "validation.", "default.")
        for key in ("prompt", "chosen", "rejected")
    },
    **to.ignored(
        to.OF_DATA,
        "data.",
        """max_input_seq_length shuffle num_workers *.split *.subset *.split_validation_size *.seed
        add_system_prompt *.prompt_file *.system_prompt_file prompt_file system_prompt_file default train
        validation""",
    ),
}

NEMO_RL = Dialect(
    name="NeMo-RL",
    marks=(("policy.",),),
    table={
        **_DPO,
        **_CHECKPOINTING,
        **_POLICY,
        **_MEGATRON_CFG,
        **_DATA,
        "logger.wandb.project": _if_logged("wandb_project", "logger.wandb_enabled"),
        "logger.tensorboard.log_dir": _if_logged("tensorboard_dir", "logger.tensorboard_enabled"),
        **to.ignored(to.OF_LOGS, "logger.", "*"),
        **to.ignored(to.OF_THE_MACHINE, "cluster.", "gpus_per_node num_nodes *"),
    },
)
