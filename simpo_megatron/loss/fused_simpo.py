"""The whole loss in one call, for your own training loop.

Shapes: R rows (two per pair), S sequence, H hidden, v this rank's vocabulary slice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from simpo_megatron.errors import ConfigError, DataError
from simpo_megatron.loss.fused_linear import fused_linear_log_probs
from simpo_megatron.loss.objective import PreferenceResult, preference_loss
from simpo_megatron.loss.reduce import average_log_probs
from simpo_megatron.loss.simpo import SimPOObjective
from simpo_megatron.loss.tokens import IGNORE_INDEX, ResponseTokens, VocabShard


def fused_linear_simpo(
    hidden_RSH: Tensor,
    weight_vH: Tensor,
    labels_RS: Tensor,
    *,
    objective: SimPOObjective | None = None,
    vocab: VocabShard | None = None,
    tp_group: ProcessGroup | None = None,
    logit_softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> PreferenceResult:
    """Returns the SimPO loss of padded rows, summed over pairs, and the sums of its metrics.

    Args:
        hidden_RSH: the model's last hidden states, rows chosen, rejected, chosen, ...; replicated over tp.
        weight_vH: the output layer's weight, or this rank's slice of it; the dtype of `hidden_RSH`.
        labels_RS: int64; the label at t is the token predicted at t, `ignore_index` at prompt and padding.
        objective: the objective and its constants; None: the paper's, `SimPOObjective()`.
        vocab: which token ids the weight's rows are; None: all of them.
        tp_group: the ranks that share the vocabulary; None without process group.
        logit_softcap: as in `fused_linear_log_probs`.
        ignore_index: the label that marks a position without a token.

    Collectives: those of `fused_linear_log_probs`.

    Raises:
        ConfigError: shapes or dtypes that do not fit together, or a tensor that other ranks hold parts of.
        DataError: a label outside the vocabulary, or a row without any.
    """
    _check_labels(labels_RS, hidden_RSH, ignore_index)
    tokens = ResponseTokens.from_labels(labels_RS, ignore_index)
    vocab = vocab or VocabShard(start=0, size=weight_vH.shape[0])
    logp_N = fused_linear_log_probs(
        hidden_RSH, weight_vH, tokens, vocab=vocab, tp_group=tp_group, logit_softcap=logit_softcap
    )
    avg_R, counts_R = average_log_probs(logp_N, tokens.sequence_N, 2 * tokens.num_pairs)
    return preference_loss(avg_R, counts_R, objective=objective or SimPOObjective())


def _check_labels(labels_RS: Tensor, hidden_RSH: Tensor, ignore_index: int) -> None:
    """Raises ConfigError unless there is one label for each position, DataError unless every row has a response."""
    if hidden_RSH.dim() != 3:
        raise ConfigError(f"hidden_RSH: found shape {tuple(hidden_RSH.shape)}, expected [rows, sequence, hidden]")
    if labels_RS.is_floating_point() or labels_RS.dtype == torch.bool:
        raise ConfigError(f"labels_RS: found {labels_RS.dtype}, expected token ids in int64")
    if labels_RS.shape != hidden_RSH.shape[:2]:
        shape, expected = tuple(labels_RS.shape), tuple(hidden_RSH.shape[:2])
        what_to_do = "give one label for each position, the token that is predicted there"
        if shape == expected[::-1]:
            what_to_do = "transpose the hidden states to [rows, sequence, hidden]"
        elif shape == (expected[0], expected[1] - 1):
            what_to_do = "labels[:, 1:] belong to hidden[:, :-1], so cut off the last position"
        raise ConfigError(f"labels_RS: found shape {shape}, expected {expected} as of hidden_RSH; {what_to_do}")
    empty_rows = (labels_RS == ignore_index).all(1).nonzero().flatten().tolist()
    if empty_rows:
        raise DataError(
            f"labels_RS: found no response token in row {empty_rows[0]}, expected one at least; leave that pair out, "
            "or cut its prompt shorter"
        )
