"""MoE layers: megatron's router with a load-balancing loss that suits a loss summed over pairs."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    save_to_aux_losses_tracker,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.distributed import ProcessGroup

from simpo_megatron.mcore.architecture import ArchitectureConfig
from simpo_megatron.mcore.expert_choice import ExpertChoice
from simpo_megatron.mcore.families import ModelDescription

LOAD_BALANCING_LOSS = "load_balancing_loss"
"""The metric's name, which is megatron's."""


ROUTER_BIAS = "mlp.router.expert_bias"
"""The end of the name of a router's bias."""


def weights_of(chunk: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, values) of everything in `chunk` that a Hugging Face folder holds: parameters, and biases of routers.

    A router's bias, which takes part in choosing experts but not in weighing them, is a buffer that is not trained.
    """
    yield from chunk.named_parameters()
    yield from ((name, buffer) for name, buffer in chunk.named_buffers() if name.endswith(ROUTER_BIAS))


def has_router_bias(transformer: Mapping[str, Any]) -> bool:
    """True where routers of a model with these arguments choose by scores with a bias added."""
    choice = transformer.get("expert_choice")
    return bool(transformer.get("moe_router_enable_expert_bias")) or (choice is not None and choice.has_bias)


def num_moe_layers(description: ModelDescription) -> int:
    """The number of layers that have experts."""
    return sum(map(description.is_moe_layer, range(description.transformer["num_layers"])))


def times_transformers(description: ModelDescription) -> float:
    """The ratio of our load-balancing loss to transformers' with the same coefficient.

    Ours is summed over layers and is 1 in each layer when experts are balanced. transformers' is one loss over the
    tokens of all layers, which counts every choice of a token. The ratio is exact when all layers route alike.

    Source: transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func.
    """
    return num_moe_layers(description) / description.transformer["moe_router_topk"]


def load_balancing_coefficient(description: ModelDescription, asked: float | None) -> float:
    """The weight of each layer's load-balancing loss: `asked`, or the one that trainers on transformers use.

    They add the loss if config.json sets `output_router_logits`, else none.
    """
    if asked is not None:
        return asked
    if not description.hf_config.get("output_router_logits"):
        return 0.0
    return description.transformer["moe_aux_loss_coeff"] / times_transformers(description)


class LoadBalancedRouter(TopKRouter):
    """megatron's top-k router with rules of choice that it lacks, its auxiliary loss weighted and logged by us.

    The trainer divides gradients by the pairs of the global batch, where megatron expects tokens. And megatron's log
    averages over data-parallel ranks by an operation that gloo does not have.
    """

    expert_bias: Tensor | None

    def __init__(self, config: ArchitectureConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.router_in_fp32:
            self.weight.data = self.weight.data.float()
        self.logged_loss: Tensor | None = None
        """Sum over microbatches since it was last taken, of this rank's tokens."""
        if config.expert_choice is not None and config.expert_choice.has_bias:
            # megatron has the place and, with its own rules alone, the buffer.
            del self.expert_bias
            bias_E = torch.zeros(config.num_moe_experts, dtype=torch.float32, device=self.weight.device)
            self.register_buffer("expert_bias", bias_E)

    def gating(self, input: Tensor) -> Tensor:
        """The logits [..., experts], in fp32 at least unless all is bf16 and megatron is told so."""
        # Transformer Engine multiplies two matrices of one dtype only.
        return super().gating(input.to(torch.promote_types(input.dtype, self.weight.dtype)))

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(weights, True for the chosen experts), both [tokens, experts], by the model's rule or else by megatron's.

        Padding, for which the mask [S, B] is True, counts in no loss and no statistic. It goes to all experts in turn
        with weight zero: its tokens are alike, and their own choice would load a few experts alone.
        """
        choice = self.config.expert_choice
        if choice is None:
            weights_NE, chosen_NE = super().routing(logits, padding_mask)
        else:
            weights_NE, chosen_NE = self._routing_by(choice, logits.flatten(0, -2), padding_mask)
        if padding_mask is None:
            return weights_NE, chosen_NE
        padding_N1 = padding_mask.reshape(-1, 1)
        in_turn_NE = experts_in_turn(*padding_mask.shape, self.topk, chosen_NE.size(1), padding_mask.device)
        return weights_NE.masked_fill(padding_N1, 0.0), torch.where(padding_N1, in_turn_NE, chosen_NE)

    def _routing_by(
        self, choice: ExpertChoice, logits_NE: Tensor, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weights_NE, chosen_NE = choice.weigh(logits_NE, self.expert_bias)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            padding_N = None if padding_mask is None else padding_mask.reshape(-1)
            most_likely_NE, scores_NE = compute_routing_scores_for_aux_loss(
                logits_NE, self.topk, choice.scores, padding_mask=padding_N
            )
            weights_NE = self._apply_aux_loss(
                weights_NE, scores_NE, most_likely_NE, with_padding_mask=padding_N is not None
            )
        return weights_NE, chosen_NE

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the tokens of each expert, without padding, where a bias is moved by them."""
        if self.enable_expert_bias and padding_mask is not None:
            # megatron (0.16 to 0.19) broadcasts the mask of tokens over experts.
            routing_map = routing_map & ~padding_mask[:, None]
        super()._apply_expert_bias(routing_map)

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: ProcessGroup,
        **_: Any,
    ) -> Tensor:
        """`activation`, in whose backward pass the auxiliary loss gets the gradient of its share."""
        unweighted = aux_loss.detach() / aux_loss_coeff
        if self.config.logs_balance_to_megatron:
            save_to_aux_losses_tracker(
                aux_loss_name, unweighted, self.layer_number, self.config.num_layers, reduce_group=reduce_group
            )
        self.logged_loss = unweighted if self.logged_loss is None else self.logged_loss + unweighted
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * self.config.moe_aux_loss_scale)


# Made once for all layers and microbatches of a shape; a step has one.
@functools.lru_cache(maxsize=4)
def experts_in_turn(length: int, num_rows: int, num_chosen: int, num_experts: int, device: torch.device) -> Tensor:
    """bool [S * B, experts]: for each token the next `num_chosen` experts, so that the end of a row loads all alike."""
    places_SB = torch.arange(length * num_rows, device=device).view(num_rows, length).T
    next_NK = places_SB.reshape(-1, 1) * num_chosen + torch.arange(num_chosen, device=device)
    chosen_NE = torch.zeros(length * num_rows, num_experts, dtype=torch.bool, device=device)
    return chosen_NE.scatter_(1, next_NK % num_experts, True)


def weigh_load_balancing(config: ArchitectureConfig, *, num_pairs: int, num_microbatches: int) -> None:
    """Make the auxiliary loss of a step the mean over its microbatches, whatever their tokens and pairs.

    Args:
        config: the one that all model chunks of this rank share.
        num_pairs: pairs of the step, by which its gradients are divided.
        num_microbatches: microbatches of the step, over all data-parallel ranks.
    """
    config.moe_aux_loss_scale = num_pairs / num_microbatches


def take_load_balancing_loss(chunks: Sequence[torch.nn.Module], *, num_microbatches: int) -> float | None:
    """Mean over layers and microbatches of num_experts * sum over experts of (share of tokens * mean probability).

    1 is perfect balance, num_experts everything on one expert. None where no router has logged any.

    Collectives: one all-reduce of 8 bytes, world; none where no chunk has a router.
    """
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, LoadBalancedRouter)]
    logged = [router.logged_loss for router in routers if router.logged_loss is not None]
    if not logged:
        return None
    # Each tensor-parallel rank holds its tokens' part of a layer's loss, each pipeline stage its own layers.
    sums = torch.stack(logged).double().sum()[None]
    for router in routers:
        router.logged_loss = None
    dist.all_reduce(sums)
    return float(sums) / (routers[0].config.num_layers * num_microbatches)
