"""The model, the forward step and the loss that Megatron-LM's `pretrain()` calls.

Shapes: N response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from simpo_megatron.loss import ResponseTokens, average_log_probs, preference_loss
from simpo_megatron.mcore import device
from simpo_megatron.mcore.architecture import ArchitectureConfig
from simpo_megatron.mcore.layers import weigh_load_balancing
from simpo_megatron.mcore.microbatch import output_of, to_microbatch
from simpo_megatron.mcore.model import PreferenceGPTModel, mark_experts
from simpo_megatron.mcore.specs import block_spec
from simpo_megatron.megatron_lm.arguments import (
    check_experts,
    check_pipeline,
    check_precision,
    num_microbatches,
    objective_of,
    true_vocab_size,
)
from simpo_megatron.megatron_lm.datasets import Sample


class StageModel(PreferenceGPTModel):
    """A model chunk whose messages to other pipeline stages have the shape that Megatron-LM's schedules announce.

    That is [S, B, H] with B samples of a microbatch. Ours is one row of all their tokens, [S * B, 1, H].
    """

    def __init__(self, *args: Any, micro_batch_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._micro_batch_size = micro_batch_size

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the hidden states of the stage before; None on the first."""
        (received,) = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        super().set_input_tensor(None if received is None else received.view(-1, 1, received.size(-1)))

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = super()._postprocess(hidden_states, *args, **kwargs)
        if self.post_process:
            return output
        # Schedules free what was sent, which they refuse for a view.
        message = output.view(-1, self._micro_batch_size, output.size(-1))
        return make_viewless_tensor(message, requires_grad=message.requires_grad, keep_graph=True)


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: Any = None,
) -> StageModel:
    """Megatron-LM's GPT model of its arguments; its last stage returns log-probs, never logits.

    `config` is always built here, because our layers read more of its fields than Megatron-LM's do.
    """
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    config = core_transformer_config_from_args(args, ArchitectureConfig)
    check_pipeline(config)
    check_experts(config)
    # Synchronises the device after every message, for a bug in versions of torch older than ours.
    config.batch_p2p_sync = False
    weigh_load_balancing(
        config,
        num_pairs=args.global_batch_size,
        num_microbatches=num_microbatches(args) * args.data_parallel_size,
    )
    config.logs_balance_to_megatron = True
    uses_transformer_engine = args.transformer_impl == "transformer_engine"
    check_precision(config, transformer_engine=uses_transformer_engine)
    model = StageModel(
        config,
        block_spec(config, vp_stage, transformer_engine=uses_transformer_engine),
        args.padded_vocab_size,
        args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
        true_vocab_size=true_vocab_size(args),
        micro_batch_size=args.micro_batch_size,
    )
    mark_experts(model)
    return model


def forward_step(data_iterator: Iterator[Sample], model: torch.nn.Module) -> tuple[Tensor, Callable]:
    """(the model's output for the next microbatch, `loss_func` of it)."""
    sample = next(data_iterator)
    microbatch = to_microbatch(sample.batch, device.current_device())
    return output_of(model, microbatch), partial(loss_func, microbatch.response_tokens, sample.pairs_per_chosen_token)


def loss_func(
    tokens: ResponseTokens, pairs_per_chosen_token: float, log_probs_N: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of the loss over pairs, pairs, {metric: [sum over pairs, pairs]}), as Megatron-LM divides and logs them.

    Args:
        tokens: the microbatch's response tokens.
        pairs_per_chosen_token: pairs over chosen response tokens of the whole global batch.
        log_probs_N: fp32 [N], natural log, of these tokens; replicated over tp.

    Collectives: none; Megatron-LM adds up over data-parallel ranks and microbatches.
    """
    from megatron.training import get_args

    sequence_N = tokens.on(log_probs_N.device).sequence_N
    result = preference_loss(
        *average_log_probs(log_probs_N, sequence_N, 2 * tokens.num_pairs),
        objective=objective_of(get_args()),
        pairs_per_chosen_token=pairs_per_chosen_token,
    )
    num_pairs = torch.full((), result.num_pairs, dtype=torch.int, device=log_probs_N.device)
    metrics = {name: torch.stack((total.float(), num_pairs.float())) for name, total in result.sums.items()}
    return result.loss, num_pairs, metrics
