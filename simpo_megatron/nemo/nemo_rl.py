"""NeMo-RL: files such as dpo.yaml, whose `defaults` name the file they change."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from simpo_megatron.nemo import translations as to
from simpo_megatron.nemo.adapters import megatron_lora
from simpo_megatron.nemo.megatron_keys import fp8_format, megatron_ddp, megatron_optimizer, megatron_scheduler
from simpo_megatron.nemo.preference_keys import preference_keys
from simpo_megatron.nemo.rules import (
    Asked,
    Dialect,
    Different,
    Differs,
    Ignored,
    Obstacle,
    Only,
    Rule,
    Translated,
    With,
)

_MEGATRON = "policy.megatron_cfg."
_OF_DTENSOR = "of the DTensor worker, which does not run here"
_DTENSOR_LORA = "policy.dtensor_cfg.lora_cfg."
_TEMPLATE_ARGUMENTS = "policy.tokenizer.chat_template_kwargs."
_OF_FILES = ("BinaryPreferenceDataset", "PreferenceDataset")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILES = (".json", ".jsonl", ".parquet", ".gz")


def _files(option: str) -> Translated:
    """A local file, or a data set of the hub by its name; `split` names a part of the latter."""
    section = "train" if option == "data" else "validation"
    splits = (f"data.{section}.split", "data.default.split")

    def named(value: Any, asked: Asked) -> dict[str, Any]:
        if not isinstance(value, str):
            raise Obstacle(f"found {value!r}, expected a file, or a name on the hub")
        if not _HUB_NAME.fullmatch(value) or Path(value).suffix in _FILES or Path(value).exists():
            return {option: value}
        split = asked.get(*splits)
        return {option: f"hub:{value}" + (f":{split}" if split else "")}

    return Translated(named, (option,), splits, "FILE")


def _length(value: Any, asked: Asked) -> Different:
    """Source: NeMo-RL data/processors.py (preference_preprocessor)."""
    here = f"pairs of more than {value} tokens are not learned from there; here their prompts are cut, or responses"
    return Different(here, to.sequence_length(value, asked))


def _dataset(option: str) -> Translated:
    """The kind of a data set, which has to be one of files of pairs, in either of NeMo-RL's two forms."""

    section = "train" if option == "data" else "validation"
    files = ("data.validation.data_path", "data.val_data_path")

    def dataset(value: Any, asked: Asked) -> str:
        if value not in _OF_FILES and option not in asked.simpo:
            raise Obstacle(
                f"found {value!r}, which NeMo-RL makes pairs of in its own way, expected {' or '.join(_OF_FILES)} with "
                f"data_path; or give files of pairs as the SimPO key {option}",
                f"simpo.{option}=FILE",
            )
        # A missing training file is told for any dialect.
        if option == "valid_data" and option not in asked.simpo and asked.get(*files) is None:
            raise Obstacle(f"found {value!r} without {files[0]}, expected both or none", f"{files[0]}=FILE")
        return "pairs are read as they are"

    return Translated(dataset, (), (f"data.{section}.split", *files), "BinaryPreferenceDataset")


def _tokenizer(value: Any, asked: Asked) -> str:
    model = asked.get("policy.model_name")
    if value != model:
        remedy = f"policy.tokenizer.name={model}"
        raise Obstacle(f"found {value!r}, expected policy.model_name, {model!r}: {to.OF_THE_TOKENIZER}", remedy)
    return to.OF_THE_TOKENIZER


def _chat_template(value: Any, asked: Asked) -> dict[str, Any] | Different | str:
    """Source: NeMo-RL algorithms/utils.py (get_tokenizer)."""
    if value is None:
        here = "texts are joined as they are; turns of a conversation have Human: and Assistant: in front of them here"
        return Different(here, {"chat_template": "none"})
    if str(value).lower() == "default":
        return "the tokenizer's own, as it is by default"
    return {"chat_template": value}


def _template_arguments(value: Any, asked: Asked) -> dict[str, Any]:
    """All of them, for they are one option here."""
    given = asked.below(_TEMPLATE_ARGUMENTS)
    return {"chat_template_args": [f"{name}={json.dumps(one)}" for name, one in given.items()]}


def _recompute_all(value: Any, asked: Asked) -> dict[str, Any] | str:
    if not value:
        return "no recomputation"
    granularity, modules = (asked.get(f"{_MEGATRON}recompute_{name}") for name in ("granularity", "modules"))
    settings = {"recompute_granularity": granularity or "full"}
    return settings | ({"recompute_modules": modules} if modules and granularity == "selective" else {})


def _if_checkpointing(rule: str | Translated) -> Translated:
    """A key of checkpointing, which `enabled` switches off as a whole."""

    def value_if(value: Any, asked: Asked) -> dict[str, Any] | Different | str:
        if asked.get("checkpointing.enabled") is False:
            return "checkpointing.enabled is false"
        return {rule: value} if isinstance(rule, str) else rule.function(value, asked)

    options = (rule,) if isinstance(rule, str) else rule.options
    takes_null = isinstance(rule, Translated) and rule.takes_null
    return Translated(value_if, options, ("checkpointing.enabled",), "DIR", takes_null=takes_null)


def _if_logged(option: str, switch: str) -> Translated:
    def value_if(value: Any, asked: Asked) -> dict[str, Any] | str:
        return {option: value} if asked.get(switch) else f"{switch} is not true"

    return Translated(value_if, (option,), (switch,), "DIR" if option.endswith("_dir") else "NAME")


def _adapters_of_dtensor(value: Any, asked: Asked) -> str:
    """Adapters that the other worker would train must not become a training of all weights."""
    if not value or asked.get(f"{_MEGATRON}peft.enabled"):
        return _OF_DTENSOR
    own = {name: asked.get(f"{_DTENSOR_LORA}{name}") for name in ("dim", "alpha")}
    given = [f"{_MEGATRON}peft.{name}={one}" for name, one in own.items() if one is not None]
    raise Obstacle(
        f"found true, and {_MEGATRON}peft.enabled is not, expected adapters in that section, which is read here",
        f"{_MEGATRON}peft.enabled=true",
        *given,
    )


def _run_length(prefix: str) -> dict[str, Rule]:
    """The keys that `dpo`, `rm` and `sft` share: how long a run is, and what it measures."""
    return {
        f"{prefix}max_num_steps": to.TRAIN_ITERS,
        f"{prefix}max_num_epochs": to.EPOCHS,
        f"{prefix}val_period": to.EVAL_INTERVAL,
        f"{prefix}seed": "seed",
        **to.ignored(
            to.OF_EVALUATION, prefix, "val_batches val_global_batch_size val_micro_batch_size val_at_start val_at_end"
        ),
    }


def _global_batch_size(value: Any, asked: Asked) -> dict[str, Any] | Different:
    """Pairs in `dpo` and `rm`, sequences in the others."""
    settings = {"global_batch_size": value}
    return settings if asked.has("dpo.*") or asked.has("rm.*") else to.sequences_as_pairs(value, asked)


def _of_what_it_trains(asked: Asked) -> dict[str, str]:
    """A remark on the algorithm that a file was written for, where it is not the one that is trained here."""
    if asked.simpo.get("objective") not in (None, "simpo"):
        return {}
    of = next((name for name in ("grpo", "sft", "rm", "dpo") if asked.has(f"{name}.*")), "dpo")
    return {of: f"a file of {of.upper()}; SimPO is trained here, with beta and gamma_beta_ratio as SimPO keys"}


_OF_ALGORITHMS: dict[str, Rule] = {
    **_run_length("dpo."),
    **preference_keys("dpo.", "reference_policy_kl_penalty"),
    **_run_length("rm."),
    **_run_length("sft."),
    **to.ignored(
        "of supervised fine-tuning; here a response is the last turn, or those of simpo.responses", "sft.", "*"
    ),
    **to.ignored(
        "of reinforcement learning, whose steps generate their data; give simpo.train_iters or simpo.epochs",
        "",
        """grpo.* loss_fn.* env.* reward_model.* reward_penalties.* data_plane.* ppo.* value.* value_loss_fn.*
        distillation.* teacher.*""",
    ),
}

_CHECKPOINTING: dict[str, Rule] = {
    "checkpointing.checkpoint_dir": _if_checkpointing("save"),
    "checkpointing.save_period": _if_checkpointing("save_interval"),
    "checkpointing.keep_top_k": _if_checkpointing(to.KEEP_CHECKPOINTS),
    "checkpointing.enabled": With((False,)),
    "checkpointing.pretrained_checkpoint.path": to.checkpoint_elsewhere("a Megatron checkpoint"),
    "checkpointing.checkpoint_must_save_by": Differs("a run stops when it is signalled, after saving"),
    "checkpointing.ft_save_period": Differs("save_period alone says when checkpoints are written"),
    "checkpointing.save_optimizer": Differs("checkpoints hold the optimizer's state", (True,)),
    **to.ignored(
        to.OF_FILES,
        "checkpointing.",
        """metric_name higher_is_better model_save_format save_consolidated pretrained_checkpoint
        pretrained_checkpoint.format model_cache_dir model_repo_id is_peft peft_config is_async ft_keep_latest_k""",
    ),
}

_POLICY: dict[str, Rule] = {
    "policy.model_name": "model",
    "policy.tokenizer.name": Translated(_tokenizer, ("model",), ("policy.model_name",)),
    "policy.tokenizer.chat_template": Translated(_chat_template, ("chat_template",), takes_null=True),
    f"{_TEMPLATE_ARGUMENTS}*": Translated(_template_arguments, ("chat_template_args",)),
    _TEMPLATE_ARGUMENTS.removesuffix("."): Only((None,), "write variables of the template below it"),
    "policy.tokenizer.use_fastokens": Ignored(to.OF_THE_TOKENIZER),
    "policy.train_global_batch_size": Translated(_global_batch_size, ("global_batch_size",)),
    "policy.train_micro_batch_size": to.micro_batch_of("policy.max_total_sequence_length"),
    "policy.max_total_sequence_length": Translated(_length, ("max_length",)),
    "policy.precision": to.PRECISION,
    "policy.dtensor_cfg.enabled": Only((False,), "this is Megatron; write policy.megatron_cfg.enabled=true instead"),
    f"{_DTENSOR_LORA}enabled": Translated(
        _adapters_of_dtensor, (), (f"{_DTENSOR_LORA}dim", f"{_DTENSOR_LORA}alpha", f"{_MEGATRON}peft.enabled"), "true"
    ),
    **to.ignored(_OF_DTENSOR, "policy.", "dtensor_cfg.* optimizer optimizer.* scheduler scheduler.* max_grad_norm"),
    **to.ignored(
        "packs hold as many pairs as fit, in alignment with layout and precision",
        "policy.",
        "make_sequence_length_divisible_by sequence_packing.* dynamic_batching.*",
    ),
    **to.ignored(
        "of generation and reference log-probabilities, which SimPO does without",
        "policy.",
        """generation generation.* generation_batch_size logprob_batch_size logprob_chunk_size
        refit_buffer_size_gb offload_optimizer_for_logprob reward_model_cfg.* draft.* router_replay.*""",
    ),
    "policy.activation_checkpointing_enabled": Ignored(_OF_DTENSOR),
    **to.each(
        "policy.", "hf_config_overrides hf_config_overrides.*", Only((None,), "write it into the model's config.json")
    ),
    "policy.quant_*": Only((None, False), "weights are not quantised for a later use here"),
}

_MEGATRON_CFG: dict[str, Rule] = {
    f"{_MEGATRON}enabled": Only((True,), "this is Megatron; write policy.megatron_cfg.enabled=true"),
    **to.taken(
        _MEGATRON,
        """tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
        expert_model_parallel_size virtual_pipeline_model_parallel_size""",
    ),
    f"{_MEGATRON}sequence_parallel": to.sequence_parallel_of(f"{_MEGATRON}tensor_model_parallel_size"),
    f"{_MEGATRON}activation_checkpointing": Translated(
        _recompute_all,
        ("recompute_granularity",),
        (f"{_MEGATRON}recompute_granularity", f"{_MEGATRON}recompute_modules"),
        "true",
    ),
    f"{_MEGATRON}fp8_cfg.enabled": fp8_format(f"{_MEGATRON}fp8_cfg.", "enabled"),
    f"{_MEGATRON}fp8_cfg.force_clear_fp8_caches": Ignored(to.OF_KERNELS),
    **megatron_lora(f"{_MEGATRON}peft.enabled", f"{_MEGATRON}peft.", "true"),
    f"{_MEGATRON}freeze_moe_router": Differs(to.OF_ROUTERS, (False,)),
    **megatron_optimizer(f"{_MEGATRON}optimizer."),
    **megatron_scheduler(f"{_MEGATRON}scheduler.", f"{_MEGATRON}optimizer."),
    **megatron_ddp(f"{_MEGATRON}distributed_data_parallel_config.", f"{_MEGATRON}optimizer.use_distributed_optimizer"),
    f"{_MEGATRON}checkpoint.async_save": "async_save",
    **to.ignored(to.OF_FILES, _MEGATRON, "checkpoint.* force_reconvert_from_hf converter_type"),
    **to.of_the_model(
        _MEGATRON,
        "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage layernorm_epsilon mtp_*",
    ),
    **to.ignored(
        "of experts or of generation; experts are as config.json has them, with the option moe_aux_loss_coeff",
        _MEGATRON,
        "expert_tensor_parallel_size moe_* inference_* radio_force_cpe_eval_mode",
    ),
    f"{_MEGATRON}model_overrides.*": Only((None,), "write it into the model's config.json"),
    **to.ignored(
        to.OF_KERNELS,
        _MEGATRON,
        """env_vars env_vars.* empty_unused_memory_level pipeline_dtype apply_rope_fusion bias_activation_fusion
        gradient_accumulation_fusion attention_backend transformer_impl use_fused_* use_linear_ce_* linear_ce_*
        fused_linear_logprobs_chunk_size defer_fp32_logits cuda_graph_* fine_grained_activation_offloading
        offload_modules use_gloo_process_groups hybridep_* clear_memory_caches_before_refit""",
    ),
}

_DATA: dict[str, Rule] = {
    "data.train.data_path": _files("data"),
    "data.validation.data_path": _files("valid_data"),
    "data.train_data_path": _files("data"),
    "data.val_data_path": _files("valid_data"),
    **to.each("data.", "val_data_paths.*", Only((None,), "one file as data.validation.data_path", ("valid_data",))),
    **to.each("data.", "dataset_name train.dataset_name default.dataset_name", _dataset("data")),
    "data.validation.dataset_name": _dataset("valid_data"),
    **to.each(
        "data.",
        "*.subset *.prompt_file *.system_prompt_file prompt_file system_prompt_file",
        Only((None,), "files of pairs are read as they are", ("data",)),
    ),
    "data.train": Only((None,), "one data set is read from such a file", ("data",)),
    "data.validation": Only((None,), "one data set is read from such a file", ("valid_data",)),
    "data.*.split_validation_size": Differs("simpo.valid_fraction sets pairs aside", (0,)),
    "data.shuffle": Differs("pairs are shuffled, in an order that seed and epoch decide", (True,)),
    "data.add_system_prompt": Only((False,), "files of pairs are read as they are", ("data",)),
    **{
        f"data.{section}{key}_key": f"{key}_column"
        for section in ("", "train.", "validation.", "default.")
        for key in ("prompt", "chosen", "rejected")
    },
    **to.ignored(
        to.OF_DATA,
        "data.",
        "max_input_seq_length num_workers *.split *.seed default use_multiple_dataloader",
    ),
    **to.ignored(
        "of supervised fine-tuning: the chat template and the form of pairs say it here",
        "data.",
        """add_bos add_eos add_generation_prompt *.processor *.input_key *.output_key *.env_name *.download_dir *.repeat
        chat_key system_key system_prompt tool_key use_preserving_dataset""",
    ),
}

NEMO_RL = Dialect(
    name="NeMo-RL",
    marks=(("policy.",),),
    table={
        **_OF_ALGORITHMS,
        **_CHECKPOINTING,
        **_POLICY,
        **_MEGATRON_CFG,
        **_DATA,
        **to.each("logger.", "wandb_enabled tensorboard_enabled", With((False,))),
        "logger.wandb.project": _if_logged("wandb_project", "logger.wandb_enabled"),
        "logger.tensorboard.log_dir": _if_logged("tensorboard_dir", "logger.tensorboard_enabled"),
        **to.ignored(to.OF_LOGS, "logger.", "*"),
        **to.ignored(to.OF_THE_MACHINE, "cluster.", "gpus_per_node num_nodes *"),
    },
    remarks=_of_what_it_trains,
)
