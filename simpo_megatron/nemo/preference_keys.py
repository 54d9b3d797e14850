"""The keys of DPO's loss in NeMo-RL and Aligner, which speak of SimPO only where the objective is DPO.

Source: NeMo-RL algorithms/loss/loss_functions.py (DPOLossFn), NeMo-Aligner megatron_gpt_dpo_model.py (loss_func).
"""

from __future__ import annotations

from typing import Any

from simpo_megatron.nemo.rules import Asked, Different, Ignored, Obstacle, Rule, Translated, With

_OF_DPO = "of DPO; SimPO has no reference policy. The SimPO key objective=dpo trains DPO with it"


def preference_keys(prefix: str, penalty: str) -> dict[str, Rule]:
    """The rules of those keys under `prefix`, of which `penalty` is beta."""
    averages = f"{prefix}sft_average_log_probs"

    def beta(value: Any, asked: Asked) -> dict[str, Any] | Different:
        return {"beta": value} if _is_dpo(asked) else Different(_OF_DPO, {})

    def sft_weight(value: Any, asked: Asked) -> dict[str, Any] | Different | str:
        if value == 0:
            return "no likelihood of the chosen"
        if not _is_dpo(asked):
            return Different("of DPO's own likelihood term; the SimPO key sft_weight gives SimPO one", {})
        return {"sft_weight": value, "sft_normalization": "sequence" if asked.get(averages) else "sum"}

    return {
        prefix + penalty: Translated(beta, ("beta",)),
        f"{prefix}sft_loss_weight": Translated(sft_weight, ("sft_weight",), (averages,)),
        averages: With((True, False)),
        **_as_in_dpo(f"{prefix}preference_average_log_probs", False, "DPO takes sums of log-probabilities here"),
        **_as_in_dpo(f"{prefix}preference_loss", "dpo", "another loss is another objective here, such as ipo"),
        **_as_in_dpo(f"{prefix}preference_loss_weight", 1, "the weight of the preferences is 1 here"),
        f"{prefix}gt_reward_scale": Ignored("of RPO, and no key of DPO's loss"),
    }


def _is_dpo(asked: Asked) -> bool:
    return asked.simpo.get("objective") == "dpo"


def _as_in_dpo(key: str, only: Any, instead: str) -> dict[str, Rule]:
    """A key that has one value where the objective is DPO."""

    def check(value: Any, asked: Asked) -> str:
        if not _is_dpo(asked):
            return _OF_DPO
        if value != only:
            shown = str(only).lower()
            raise Obstacle(f"found {value}, expected {shown}: {instead}", f"{key}={shown}")
        return "agrees with DPO here"

    return {key: Translated(check, ())}
