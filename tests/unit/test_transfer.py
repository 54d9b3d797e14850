"""One copy takes all tensors of a microbatch to the device, whatever their dtypes and shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simpo_megatron.data import BatchOptions, TokenizedPair, collate
from simpo_megatron.mcore.microbatch import copied_together, to_microbatch, transfer

CPU = torch.device("cpu")
TENSORS = (
    torch.arange(7).view(1, 7),
    torch.tensor([3], dtype=torch.int32),
    None,
    torch.tensor([], dtype=torch.int64),
    torch.tensor(5, dtype=torch.int),
    torch.tensor([True, False, True]),
    torch.randn(3, 5).t(),
    torch.tensor([2.5, -1.0], dtype=torch.bfloat16),
    torch.tensor([1e-300], dtype=torch.float64),
)


def test_tensors_come_out_as_they_went_in():
    found = copied_together(TENSORS, CPU)
    for tensor, copy in zip(TENSORS, found, strict=True):
        if tensor is None:
            assert copy is None
        else:
            assert copy.dtype == tensor.dtype and copy.shape == tensor.shape and torch.equal(copy, tensor)
            assert copy.is_contiguous() and copy.data_ptr() % 16 == 0


def test_they_are_views_of_one_buffer():
    found = [copy for copy in copied_together(TENSORS, CPU) if copy is not None]
    assert len({copy.untyped_storage().data_ptr() for copy in found}) == 1
    given = {tensor.data_ptr() for tensor in TENSORS if tensor is not None and tensor.numel()}
    assert not given & {copy.data_ptr() for copy in found}
    assert copied_together((), CPU) == [] and copied_together((None,), CPU) == [None]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_gpu_is_sent_pinned_memory_and_nobody_waits(kind, monkeypatch):
    asked, sent = [], []
    empty, to = torch.empty, torch.Tensor.to

    def allocate(*size, pin_memory=False, **options):
        asked.append(pin_memory)
        return empty(*size, **options)

    def send(tensor, device, **options):
        sent.append((device, options))
        return to(tensor, "meta")

    monkeypatch.setattr(transfer.torch, "empty", allocate)
    monkeypatch.setattr(torch.Tensor, "to", send)
    device = torch.device(kind)
    found = copied_together(TENSORS, device)
    assert asked == [kind == "cuda"] and sent == [(device, {"non_blocking": True})]
    assert all(copy.device.type == "meta" for copy in found if copy is not None)


@pytest.mark.parametrize("packing", [True, False])
def test_a_microbatch_is_one_buffer(packing):
    ids = np.arange(1, 9, dtype=np.int32)
    pairs = [TokenizedPair(ids[:3], ids, ids[2:]), TokenizedPair(ids[:1], ids[:1], ids)]
    options = BatchOptions(global_batch_size=2, packing=packing, prefix_sharing=packing)
    microbatch = to_microbatch(collate(pairs, [1, 0], options), CPU, np.ones((2, 2), np.float32))
    copy = microbatch.labels.copy
    tensors = (
        microbatch.tokens_BS,
        microbatch.position_ids_BS,
        microbatch.reference_avg_R,
        copy.rows_N,
        copy.targets_N,
        copy.sequence_N,
        *microbatch.layout.tensors(),
    )
    given = [tensor for tensor in tensors if tensor is not None]
    # Packs have positions, and keys that do not lie in order; padded rows have padding.
    assert len(given) == (10 if packing else 9)
    assert len({tensor.untyped_storage().data_ptr() for tensor in given}) == 1
