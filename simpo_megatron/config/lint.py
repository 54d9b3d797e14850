"""Warnings about settings that run but that the published experience speaks against."""

from __future__ import annotations

from simpo_megatron.config.sections import DEMO, Config


def lint(config: Config) -> list[str]:
    """One line per doubtful setting: what was found, what was published. Empty for the demo, a toy on purpose.

    Source: the tuning advice of the reference implementation (princeton-nlp/SimPO), and reports of its users on
    batch size and repetition.
    """
    if config.run.preset == DEMO:
        return []
    objective, optimizer = config.objective, config.optimizer
    doubts = [
        (
            objective.beta < 1,
            f"beta {objective.beta:g} is far below the published 2 to 10; 0.1 is DPO's scale, not SimPO's",
        ),
        (
            objective.gamma_beta_ratio > 1,
            f"gamma_beta_ratio {objective.gamma_beta_ratio:g} (gamma {objective.gamma:g}) is above the published "
            f"0.1 to 0.8; if the margin itself was meant, write gamma",
        ),
        (
            objective.sft_weight > 0,
            f"sft_weight {objective.sft_weight:g}: the six published runs use 0; it helped on GSM8K and hurt in chat",
        ),
        (
            objective.sft_weight == 0 and objective.sft_normalization == "sequence",
            "sft_normalization sequence has no effect while sft_weight is 0",
        ),
        (
            optimizer.lr >= 1e-5,
            f"lr {optimizer.lr:g} is ten times the published 3e-7 to 1e-6 or more; at 1e-5 models fell into repetition",
        ),
        (
            config.batch.global_batch_size != 128,
            f"global_batch_size {config.batch.global_batch_size} is not the published 128; results move with it "
            f"(AlpacaEval 2 LC 50.3 at 128, 34.8 at 1024)",
        ),
        (
            config.model.hidden_dropout > 0 or config.model.attention_dropout > 0,
            "dropout is on: the published runs switch it off, for it changes both responses of a pair at random",
        ),
    ]
    return [warning for holds, warning in doubts if holds]
