"""One step's pairs on every rank that needs them, read by one rank of a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from simpo_megatron import faults
from simpo_megatron.data import PreferenceBatch, PreferenceDataset, TokenizedPair
from simpo_megatron.errors import DataError, SimPOError
from simpo_megatron.loss import ResponseTokens
from simpo_megatron.mcore.attention import MicrobatchLayout, Segment
from simpo_megatron.mcore.context import ContextShare


def read_pairs(
    dataset: PreferenceDataset, indices: Sequence[int], *, tp_group: ProcessGroup, device: torch.device
) -> list[TokenizedPair]:
    """The pairs `indices` of `dataset`, in that order, the same on every tensor-parallel rank.

    Only the group's first rank touches the token file; the others know every length from the index and receive the
    ids alone, those of context as their complement.

    Collectives: one broadcast of 8 bytes a token over tp.

    Raises:
        DataError: on the group's first rank alone, it could not read. The others then have zeros for ids, and callers
            make ranks agree before they use them.
    """
    lengths = np.asarray(dataset.lengths)[list(indices)].astype(np.int64)
    ids = torch.zeros(int(lengths.sum()), dtype=torch.int64)
    failure: Exception | None = None
    if tp_group.rank() == 0:
        try:
            faults.at("data")
            _fill(ids, dataset, indices, lengths)
        except Exception as error:
            failure = error
    if tp_group.size() > 1:
        on_device = ids.to(device)
        dist.broadcast(on_device, dist.get_global_rank(tp_group, 0), group=tp_group)
        ids = on_device.cpu()
    if failure is not None and not isinstance(failure, SimPOError):
        raise DataError(
            f"rank {dist.get_rank()} could not read a batch: {type(failure).__name__}: {failure}"
        ) from failure
    if failure is not None:
        raise failure
    return _split(ids.numpy().astype(np.int32), lengths)


def _fill(ids: Tensor, dataset: PreferenceDataset, indices: Sequence[int], lengths: np.ndarray) -> None:
    parts: list[np.ndarray] = []
    for index, expected in zip(indices, lengths, strict=True):
        pair = dataset[index]
        found = (len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids))
        if found != tuple(expected):
            raise DataError(
                f"pair {index}: found {found} tokens of prompt, chosen, rejected, expected "
                f"{tuple(int(n) for n in expected)}; the token file changed during the run, rebuild it"
            )
        parts += pair.marked()
    if parts:
        ids[:] = torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _split(ids: np.ndarray, lengths: np.ndarray) -> list[TokenizedPair]:
    pieces = np.split(ids, np.cumsum(lengths.reshape(-1))[:-1]) if len(lengths) else []
    return [TokenizedPair.from_marked(*pieces[i : i + 3]) for i in range(0, len(pieces), 3)]


@dataclass(frozen=True)
class Microbatch:
    """The arguments of the model call and of the loss for one microbatch, on this rank's device."""

    tokens_BS: Tensor
    position_ids_BS: Tensor
    layout: MicrobatchLayout
    labels: ResponseTokens | None = None
    """The tokens that the last pipeline stage predicts, on the CPU; None: it yields logits."""
    reference_avg_R: Tensor | None = None
    """fp32 [2 * pairs], the responses' average log-probs under the reference model, where the objective needs them."""

    @property
    def response_tokens(self) -> ResponseTokens:
        """The labels, of a microbatch that has some."""
        assert self.labels is not None, "a microbatch without labels has no log-probs"
        return self.labels


def to_microbatch(
    batch: PreferenceBatch,
    device: torch.device,
    reference_avg: np.ndarray | None = None,
    cp_group: ProcessGroup | None = None,
) -> Microbatch:
    """`batch` on `device`, its segments as the layout that attention reads, its response tokens as labels.

    `reference_avg`, [num_pairs, 2] of the dataset that `batch` comes from, is what an objective with a reference needs.
    Of the ranks of `cp_group` each gets its share of the tokens.
    """
    # These stay on the CPU, where checking and counting them costs no synchronisation; the head moves what it needs.
    labels = ResponseTokens(batch.rows_N, batch.targets_N, batch.sequence_N, num_pairs=batch.num_pairs)
    position_ids_BS = batch.position_ids_BS.to(device)
    if batch.segments_G4 is None:
        layout = MicrobatchLayout.of_padded_rows(batch.tokens_BS.size(1))
    else:
        segments = tuple(Segment(*row) for row in batch.segments_G4.tolist())
        layout = MicrobatchLayout.of_pack(position_ids_BS[0], segments)
    reference_avg_R = None
    if reference_avg is not None:
        reference_avg_R = torch.from_numpy(reference_avg[batch.pair_ids_P.numpy()]).flatten().to(device)
    tokens_BS = batch.tokens_BS
    if cp_group is not None and cp_group.size() > 1:
        batch_size, length = tokens_BS.shape
        context = ContextShare(cp_group, length)
        rows = context.rows()
        layout = layout.divided(context)
        labels = labels.of_rows(rows, length, batch_size)
        tokens_BS, position_ids_BS = (x[:, rows.to(x.device)] for x in (tokens_BS, position_ids_BS))
    return Microbatch(
        tokens_BS=tokens_BS.to(device),
        position_ids_BS=position_ids_BS,
        layout=layout,
        labels=labels,
        reference_avg_R=reference_avg_R,
    )
