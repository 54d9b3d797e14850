"""Warnings about settings that run but that the published experience speaks against."""

from __future__ import annotations

from simpo_megatron.config.sections import DEMO, Config
from simpo_megatron.loss import SimPOObjective


def lint(config: Config) -> list[str]:
    """One line per doubtful setting: what was found, what was published. None for the demo, a toy on purpose.

    Source: the tuning advice of the reference implementation (princeton-nlp/SimPO), and its users' reports on
    batch size and repetition.
    """
    if config.run.preset == DEMO:
        return []
    lr, pairs = config.optimizer.lr, config.batch.global_batch_size
    warnings = _simpo_warnings(config.objective) if isinstance(config.objective, SimPOObjective) else []
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
            f"global_batch_size {pairs}: published runs use 128; one user saw AlpacaEval 2 fall from 50.3 at "
            "128 to 34.8 at 1024"
        )
    if max(config.model.hidden_dropout, config.model.attention_dropout, config.lora.lora_dropout) > 0:
        warnings.append("dropout: published runs switch it off; it makes a pair's responses incomparable")
    return warnings


def _simpo_warnings(objective: SimPOObjective) -> list[str]:
    """Of the constants of SimPO itself."""
    warnings = []
    if objective.beta < 1:
        warnings.append(
            f"beta {objective.beta:g}: published runs use 2 to 10; 0.1 is DPO's scale, not SimPO's"
        )
    if objective.gamma_beta_ratio > 1:
        warnings.append(
            f"gamma_beta_ratio {objective.gamma_beta_ratio:g}: published runs use 0.1 to 0.8. It counts in "
            f"units of beta: the margin here is {objective.gamma:g}; to state the margin itself, write gamma"
        )
    if objective.sft_weight > 0:
        warnings.append(
            f"sft_weight {objective.sft_weight:g}: published runs use 0; it helped on GSM8K and hurt in chat"
        )
    elif objective.sft_normalization != "token":
        warnings.append(
            f"sft_normalization {objective.sft_normalization}: without effect while sft_weight is 0"
        )
    return warnings
