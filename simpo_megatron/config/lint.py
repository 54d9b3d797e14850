"""Warnings about settings that work but that published experience advises against."""

from __future__ import annotations

from simpo_megatron.config.sections import DEMO, Config
from simpo_megatron.loss import SimPOObjective


def lint(config: Config) -> list[str]:
    """One line per setting without effect, and per doubtful setting: the value found and the published advice.

    The demo's settings are for a toy and are not checked.

    Source: the tuning advice of the reference implementation (princeton-nlp/SimPO), and its users' reports on
    batch size and repetition.
    """
    warnings = _without_effect(config)
    if config.run.preset == DEMO:
        return warnings
    lr, pairs = config.optimizer.lr, config.batch.global_batch_size
    if isinstance(config.objective, SimPOObjective):
        warnings += _simpo_warnings(config.objective)
    if config.lora.lora_rank is not None:
        if lr < 1e-6:
            warnings.append(
                f"lr {lr:g} with adapters: they take about ten times a full model's; alignment-handbook's "
                "zephyr-7b-dpo-qlora (DPO, no SimPO run is published) uses 5e-6"
            )
    elif lr >= 1e-5:
        warnings.append(f"lr {lr:g}: published runs use 3e-7 to 1e-6; at 1e-5 models fell into repetition")
    if pairs != 128:
        warnings.append(
            f"global_batch_size {pairs}: published runs use 128"
            + ("; one user saw AlpacaEval 2 fall from 50.3 at 128 to 34.8 at 1024" if pairs > 128 else "")
        )
    if max(config.model.hidden_dropout, config.model.attention_dropout, config.lora.lora_dropout) > 0:
        warnings.append("dropout: published runs switch it off; it makes a pair's responses incomparable")
    return warnings


def _simpo_warnings(objective: SimPOObjective) -> list[str]:
    """The findings on the constants of SimPO itself."""
    warnings = []
    if objective.length_normalization == "none":
        warnings.append("length_normalization none: published runs use mean; rewards that are sums depend on length")
    elif objective.beta < 1:
        warnings.append(f"beta {objective.beta:g}: published runs use 2 to 10; 0.1 is DPO's scale, not SimPO's")
    if objective.gamma_beta_ratio > 1 and objective.length_normalization == "mean":
        warnings.append(
            f"gamma_beta_ratio {objective.gamma_beta_ratio:g}: published runs use 0.1 to 0.8. It counts in "
            f"units of beta: the margin here is {objective.gamma:g}; to state the margin itself, write gamma"
        )
    if objective.sft_weight > 0:
        warnings.append(
            f"sft_weight {objective.sft_weight:g}: published runs use 0; it helped on GSM8K and hurt in chat"
        )
    return warnings


def idle_options(config: Config) -> dict[str, str]:
    """The options that this run does not use, and why."""
    batch, run, monitors = config.batch, config.run, config.monitors
    has_validation = config.data.valid_data or config.data.valid_fraction or DEMO in config.data.data
    groups = (
        (getattr(config.objective, "sft_weight", 0) == 0, "sft_weight is 0", ("sft_normalization",)),
        (
            config.lora.lora_rank is None,
            "there are no adapters",
            ("lora_alpha", "use_rslora", "lora_dropout", "lora_targets"),
        ),
        (config.pairs.bad_record == "error", "bad_record is error", ("max_bad_fraction",)),
        (batch.packing, "packing is on", ("micro_batch_size",)),
        (not batch.packing, "packing is off", ("tokens_per_microbatch",)),
        (config.optimizer.lr_decay_style == "constant", "lr_decay_style is constant", ("min_lr",)),
        (config.optimizer.lr_warmup_iters is not None, "lr_warmup_iters is given", ("lr_warmup_fraction",)),
        (
            config.recompute.recompute_granularity != "selective",
            "recompute_granularity is not selective",
            ("recompute_modules",),
        ),
        (not config.precision.bf16, "bf16 is off", ("logit_dtype",)),
        (config.model.export_hf is None, "export_hf is not given", ("export_dtype",)),
        (run.save is None, "save is not given", ("keep_checkpoints", "async_save", "on_save_failure")),
        (monitors.repetition_prompts == 0, "repetition_prompts is 0", ("max_repetition", "repetition_tokens")),
        (
            not has_validation,
            "no validation pairs are there",
            ("eval_interval", "eval_epochs", "max_displacement", "repetition_prompts"),
        ),
    )
    return {name: why for holds, why, names in groups if holds for name in names}


def _without_effect(config: Config) -> list[str]:
    values, defaults = config.flat(), Config(objective=type(config.objective)()).flat()
    idle = idle_options(config)
    given = [name for name in idle if values.get(name) != defaults.get(name)]
    shown = {name: " ".join(values[name]) if isinstance(values[name], tuple) else values[name] for name in given}
    warnings = [f"{name} {shown[name]}: without effect while {idle[name]}" for name in given]
    if "displacement" in config.monitors.stop_on and "max_displacement" in idle:
        warnings.append("stop_on displacement: without effect while no validation pairs are there")
    return warnings
