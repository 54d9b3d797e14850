"""Refusals of the loss: ids, rows, shapes and labels that do not fit, by name."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from seven_tokens import PADDED, ROWS, SEQUENCE, TARGETS, TOKENS, VOCAB, B, H, S, V
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from simpo_megatron.errors import ConfigError, DataError
from simpo_megatron.loss import (
    ResponseTokens,
    VocabShard,
    fused_linear_log_probs,
    fused_linear_simpo,
)

HIDDEN, WEIGHT = torch.zeros(S, B, H, dtype=torch.float64), torch.zeros(PADDED, H, dtype=torch.float64)


@pytest.mark.parametrize("bad", [-1, V, PADDED, 2**40], ids=str)
def test_an_id_outside_the_vocabulary_raises(bad):
    targets = TARGETS.clone()
    targets[4] = bad
    tokens = ResponseTokens(ROWS, targets, SEQUENCE, 2)
    with pytest.raises(DataError, match=f"response token 4: found id {bad}, expected one of a vocabulary of 300"):
        fused_linear_log_probs(HIDDEN, WEIGHT, tokens, vocab=VOCAB, tp_group=None)


@pytest.mark.parametrize("rows", [[3, 1], [-1, 2], [0, S * B]], ids=str)
def test_unsorted_rows_and_rows_outside_the_sequence_raise(rows):
    tokens = ResponseTokens(torch.tensor(rows), torch.tensor([1, 2]), torch.tensor([0, 1]), 1)
    with pytest.raises(DataError, match="expected ascending rows below 14"):
        fused_linear_log_probs(HIDDEN, WEIGHT, tokens, vocab=VOCAB, tp_group=None)


def test_tensors_that_do_not_fit_are_refused():
    for arguments, vocab, match in [
        ((HIDDEN, WEIGHT.float()), VOCAB, "expected one dtype; cast one"),
        ((HIDDEN, WEIGHT[:, :5]), VOCAB, "same H"),
        ((HIDDEN[0], WEIGHT), VOCAB, "same H"),
        ((HIDDEN, WEIGHT), VocabShard(start=0, size=PADDED + 1), "whole vocabulary"),
        ((HIDDEN, WEIGHT), VocabShard(start=4, size=V), "whole vocabulary"),
    ]:
        with pytest.raises(ConfigError, match=match):
            fused_linear_log_probs(*arguments, TOKENS, vocab=vocab, tp_group=None)


@pytest.mark.parametrize(
    ("labels", "hidden", "said"),
    [
        ((4, 9), (4, 10), r"found shape \(4, 9\), expected \(4, 10\).*labels\[:, 1:\] belong to hidden\[:, :-1\]"),
        ((2, 10), (4, 10), "expected .* one label for each position"),
        ((4, 10), (10, 4), "transpose the hidden states"),
    ],
)
def test_labels_of_another_shape_than_the_hidden_states_are_refused(labels, hidden, said):
    with pytest.raises(ConfigError, match=said):
        fused_linear_simpo(torch.randn(*hidden, H), torch.randn(V, H), torch.ones(labels, dtype=torch.long))


def test_rows_in_one_and_labels_that_are_no_ids_are_refused():
    labels = torch.ones(40, dtype=torch.long)
    with pytest.raises(ConfigError, match=r"hidden_RSH: found shape \(40, 6\), expected \[rows, sequence, hidden\]"):
        fused_linear_simpo(torch.randn(40, 6), torch.randn(V, 6), labels)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(ConfigError, match=f"labels_RS: found {dtype}, expected token ids"):
            fused_linear_simpo(torch.randn(4, 10, H), torch.randn(V, H), labels.view(4, 10).to(dtype))


def test_a_row_without_a_response_is_refused_by_its_number():
    labels = torch.ones(4, 6, dtype=torch.long)
    labels[2] = -100
    with pytest.raises(DataError, match="no response token in row 2"):
        fused_linear_simpo(torch.randn(4, 6, H), torch.randn(V, H), labels)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_what_fsdp_has_divided_is_refused_in_one_sentence(mesh):
    for found in (distribute_tensor(WEIGHT, mesh), WEIGHT.flatten()):
        with pytest.raises(ConfigError, match="found a part of what other ranks share .* inside the forward"):
            fused_linear_log_probs(HIDDEN, found, TOKENS, vocab=VOCAB, tp_group=None)


def test_labels_need_two_rows_a_pair():
    with pytest.raises(ConfigError, match="3 rows"):
        ResponseTokens.from_labels(torch.zeros(3, 4, dtype=torch.long))
