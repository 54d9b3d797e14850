"""Reading a step's pairs on one rank of a tensor-parallel group, and sending them to the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from simpo_megatron import faults
from simpo_megatron.data import PreferenceBatch, PreferenceDataset, TokenizedPair
from simpo_megatron.errors import DataError, SimPOError
from simpo_megatron.loss import ResponseTokens
from simpo_megatron.mcore.microbatch.context import ContextShare
from simpo_megatron.mcore.microbatch.layout import MicrobatchLayout, Segment
from simpo_megatron.mcore.microbatch.transfer import copied_together


def read_pairs(
    dataset: PreferenceDataset, indices: Sequence[int], *, tp_group: ProcessGroup, device: torch.device
) -> list[TokenizedPair]:
    """The pairs `indices` of `dataset`, in that order, the same on every tensor-parallel rank.

    Only the group's first rank reads the token file. The others know every length from the index and receive only the
    ids; those of a response that do not count in the loss are sent as their bitwise complement.

    Collectives: one broadcast of 8 bytes a token over tp.

    Raises:
        DataError: on the group's first rank only, which could not read. The others then have zeros for ids; callers
            must make ranks agree before they use them.
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
            f"batch: found one that rank {dist.get_rank()} could not read ({type(failure).__name__}: {failure}), "
            "expected pairs of the token store"
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
    """The tokens that the last pipeline stage predicts, on the CPU, with a copy here; None: it yields logits."""
    reference_avg_R: Tensor | None = None
    """fp32 [2 * pairs], the responses' average log-probs under the reference model, where the objective needs them."""

    @property
    def response_tokens(self) -> ResponseTokens:
        """The labels of a microbatch that has some."""
        assert self.labels is not None, "a microbatch without labels has no log-probs"
        return self.labels


def output_of(model: torch.nn.Module, microbatch: Microbatch) -> Tensor:
    """The output of a model chunk: fp32 [N] log-probs of the labels on the last pipeline stage, else hidden states."""
    output: Tensor = model(
        microbatch.tokens_BS,
        microbatch.position_ids_BS,
        None,
        labels=microbatch.labels,
        packed_seq_params=microbatch.layout,
    )
    return output


def to_microbatch(
    batch: PreferenceBatch,
    device: torch.device,
    reference_avg: np.ndarray | None = None,
    cp_group: ProcessGroup | None = None,
) -> Microbatch:
    """`batch` on `device`, its segments as the layout that attention reads, its response tokens as labels.

    All index tensors of layers and loss are made here and go to the device in one asynchronous copy.

    `reference_avg`, [num_pairs, 2] for the whole dataset, is for objectives with a reference. Each rank of `cp_group`
    gets its share of the tokens.
    """
    labels = ResponseTokens(batch.rows_N, batch.targets_N, batch.sequence_N, num_pairs=batch.num_pairs)
    tokens_BS, position_ids_BS, padding_BS = batch.tokens_BS, batch.position_ids_BS, batch.padding_BS
    num_rows, length = tokens_BS.shape
    context = None if cp_group is None or cp_group.size() == 1 else ContextShare(cp_group, length)
    if batch.segments_G4 is None:
        layout = MicrobatchLayout.of_padded_rows(length, num_rows, context)
    else:
        segments = tuple(Segment(*row) for row in batch.segments_G4.tolist())
        layout = MicrobatchLayout.of_pack(position_ids_BS[0], segments, context)
    if context is not None:
        rows = context.rows()
        labels = labels.of_rows(rows, length, num_rows)
        tokens_BS, position_ids_BS = tokens_BS[:, rows], position_ids_BS[:, rows]
        padding_BS = None if padding_BS is None else padding_BS[:, rows]
    layout = replace(layout, padding_BS=padding_BS)
    reference_avg_R = None
    if reference_avg is not None:
        reference_avg_R = torch.from_numpy(reference_avg[batch.pair_ids_P.numpy()]).flatten()
    of_batch = (tokens_BS, position_ids_BS, reference_avg_R)
    of_labels = (labels.rows_N, labels.targets_N, labels.sequence_N)
    here: list[Any] = copied_together((*of_batch, *of_labels, *layout.tensors()), device)
    return Microbatch(
        tokens_BS=here[0],
        position_ids_BS=here[1],
        reference_avg_R=here[2],
        labels=labels.with_copy(*here[3:6]),
        layout=layout.with_tensors(*here[6:]),
    )
