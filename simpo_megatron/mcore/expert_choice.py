"""The choice of a token's experts, where megatron-core's router has no rule like the model's.

Shapes: N tokens, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertChoice:
    """A rule by which the experts of a token are chosen and weighed."""

    num_chosen: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """The function of the router's logits."""
    has_bias: bool = False
    """True when experts are chosen by scores plus a bias; they are weighed without it."""
    num_groups: int = 1
    """Groups of neighbouring experts."""
    num_chosen_groups: int = 1
    """Groups that the experts of a token come from."""
    num_best: int = 1
    """Experts of a group whose scores, added up, rank it."""
    divides_by_sum: bool = False
    """True when the weights of a token's experts are divided by their sum."""
    least_sum: float = 1e-20
    """The smallest number that they are divided by."""
    scale: float = 1.0
    """Factor of the weights."""

    def weigh(self, logits_NE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """(weights, zero for experts that are not chosen; True for those that are), both [N, E].

        The weights are in fp32 at least.
        """
        import torch  # not above, for a family's rule is read before torch is loaded

        wide_NE = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
        scores_NE = wide_NE.softmax(dim=-1) if self.scores == "softmax" else wide_NE.sigmoid()
        with torch.no_grad():
            chosen_NE = self._chosen(scores_NE if bias_E is None else scores_NE + bias_E)
        weights_NE = scores_NE.masked_fill(~chosen_NE, 0.0)
        if self.divides_by_sum:
            weights_NE = weights_NE / weights_NE.sum(dim=-1, keepdim=True).clamp_min(self.least_sum)
        return weights_NE * self.scale, chosen_NE

    def _chosen(self, ranked_NE: Tensor) -> Tensor:
        """bool [N, E], by the scores to rank experts by."""
        if self.num_chosen_groups < self.num_groups:
            groups_NGe = ranked_NE.unflatten(-1, (self.num_groups, -1))
            best_NG = groups_NGe.topk(self.num_best, dim=-1).values.sum(dim=-1)
            is_open_NG = _largest(best_NG, self.num_chosen_groups)
            ranked_NE = groups_NGe.masked_fill(~is_open_NG[..., None], -math.inf).flatten(-2)
        return _largest(ranked_NE, self.num_chosen)


def _largest(values: Tensor, number: int) -> Tensor:
    """True for the `number` largest of the last dimension."""
    import torch

    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, values.topk(number, dim=-1).indices, True)
