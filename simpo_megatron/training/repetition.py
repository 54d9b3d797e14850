"""The repetition probe: greedy continuations of a few validation prompts, and how far they repeat themselves.

Every token is one forward pass over whole rows through megatron's schedule, as in an evaluation. That is slow, but
exact under every layout and good enough for a few dozen tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from simpo_megatron.data import PreferenceDataset
from simpo_megatron.data.batching import round_up
from simpo_megatron.mcore import device
from simpo_megatron.mcore.forward_step import MicrobatchStep
from simpo_megatron.mcore.microbatch import Microbatch, MicrobatchLayout, read_pairs
from simpo_megatron.parallel import ParallelGroups
from simpo_megatron.ranks import raise_on_all_ranks
from simpo_megatron.training.step import Trainer, run_schedule

_MAX_PROMPT_TOKENS = 256


@dataclass(frozen=True)
class Prompts:
    """The prompts that are continued, on every rank alike."""

    ids: list[list[int]]
    end_ids: frozenset[int]
    """The ids that end a response: the last tokens of these prompts' chosen responses."""


def first_prompts(dataset: PreferenceDataset, num_prompts: int, groups: ParallelGroups) -> Prompts:
    """The first prompts of `dataset` that differ and have at most 256 tokens; fewer where it holds no more.

    Collectives: those of `read_pairs` and `raise_on_all_ranks`, world.
    """
    first_of_each: dict[int, int] = {}
    for index, (key, length) in enumerate(zip(dataset.prompt_keys.tolist(), dataset.lengths[:, 0], strict=True)):
        if length <= _MAX_PROMPT_TOKENS and len(first_of_each) < num_prompts:
            first_of_each.setdefault(key, index)
    indices = list(first_of_each.values())
    here = device.current_device()
    pairs = raise_on_all_ranks(lambda: read_pairs(dataset, indices, tp_group=groups.tp, device=here))
    return Prompts(
        ids=[pair.prompt_ids.tolist() for pair in pairs],
        end_ids=frozenset(int(pair.chosen_ids[-1]) for pair in pairs),
    )


def greedy_samples(
    trainer: Trainer,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    end_ids: Collection[int],
    vocab_size: int,
) -> list[list[int]]:
    """The most probable continuation of each prompt, token by token, up to `num_tokens` or an id of `end_ids`, which is
    left out; the same on every rank.

    Args:
        vocab_size: ids of the vocabulary, the padding of the output layer apart.

    Collectives: for each token those of one forward pass, one all-gather of 16 bytes a prompt over tp on the last
    pipeline stage, and one broadcast of 8 bytes a prompt over pp.
    """
    for chunk in trainer.chunks:
        chunk.eval()
    samples: list[list[int]] = [[] for _ in prompts]
    going_on = list(range(len(prompts)))
    for _ in range(num_tokens):
        if not going_on:
            break
        rows = [[*prompts[number], *samples[number]] for number in going_on]
        next_ids = _next_ids(trainer, rows, vocab_size)
        for number, next_id in zip(list(going_on), next_ids, strict=True):
            if next_id in end_ids:
                going_on.remove(number)
            else:
                samples[number].append(next_id)
    return samples


@dataclass(frozen=True)
class _NextToken(MicrobatchStep):
    """A pass without gradients that keeps the most probable id after the last token of each row."""

    tp_group: dist.ProcessGroup
    vocab_size: int

    def loss(self, logits_BSv: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor, Tensor]:
        """(0, 1, the id, int64)."""
        last = int(microbatch.position_ids_BS.argmax())
        logits_v = logits_BSv[0, last].double()
        first_id = self.tp_group.rank() * len(logits_v)
        # The columns that pad the vocabulary are no tokens.
        logits_v[max(0, self.vocab_size - first_id) :] = -torch.inf
        best = torch.stack((logits_v.max(), logits_v.argmax() + first_id))
        of_ranks = [torch.empty_like(best) for _ in range(self.tp_group.size())]
        dist.all_gather(of_ranks, best, group=self.tp_group)
        largest = max(of_ranks, key=lambda value_and_id: float(value_and_id[0]))
        return logits_v.new_zeros(()), torch.ones((), dtype=torch.int, device=logits_v.device), largest[1].long()


def _next_ids(trainer: Trainer, rows: Sequence[Sequence[int]], vocab_size: int) -> list[int]:
    # All of one width, so that pipeline stages need no shape exchange.
    width = round_up(max(map(len, rows)), trainer.batch_options.sequence_multiple)
    microbatches = [_one_row(ids, width, trainer.batch_options.pad_id) for ids in rows]
    # Interleaved pipelines take whole rounds of microbatches; copies of the last row fill the last round.
    microbatches += [microbatches[-1]] * (-len(rows) % trainer.layout.microbatch_multiple)
    next_token = _NextToken(trainer.groups.tp, vocab_size)
    found = run_schedule(trainer, microbatches, next_token, forward_only=True)
    next_ids = torch.zeros(len(rows), dtype=torch.int64, device=device.current_device())
    if trainer.groups.is_last_stage:
        next_ids = torch.stack(found[: len(rows)])
    return trainer.groups.broadcast_from_last_stage(next_ids).tolist()


def _one_row(ids: Sequence[int], width: int, pad_id: int) -> Microbatch:
    here = device.current_device()
    tokens_BS = torch.full((1, width), pad_id, dtype=torch.int64, device=here)
    tokens_BS[0, : len(ids)] = torch.tensor(ids, device=here)
    position_ids_BS = torch.zeros_like(tokens_BS)
    position_ids_BS[0, : len(ids)] = torch.arange(len(ids), device=here)
    # Without labels the model yields logits.
    layout = MicrobatchLayout.of_padded_rows(width).on(here)
    return Microbatch(tokens_BS=tokens_BS, position_ids_BS=position_ids_BS, layout=layout)
