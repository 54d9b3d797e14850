"""Examples of a dataset: pairs as the model sees them, decoded from their ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from simpo_megatron.data.dataset import PreferenceDataset
from simpo_megatron.data.tokenization import PARTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ShownPair:
    """A pair as the model sees it: its place, and its text in pieces."""

    where: str
    pieces: tuple[tuple[str, str], ...]
    """(name, text) of each, in order: prompt, chosen, rejected; `context` between the turns of a response; `cut`."""


def show_pairs(dataset: PreferenceDataset, tokenizer: PreTrainedTokenizerBase, count: int) -> list[ShownPair]:
    """Returns `count` pairs, spread evenly over the dataset, decoded from the ids that are trained on."""
    shown = []
    for index in np.unique(np.linspace(0, len(dataset) - 1, count).astype(int)).tolist():
        pair, (name, line) = dataset[index], dataset.where(index)
        lost = [("cut", f"{count:,} tokens of {part}") if count else None
                for part, count in zip(PARTS, dataset.lost[index].tolist(), strict=True)]  # fmt: skip
        pieces = [lost[0], ("prompt", _text(tokenizer, pair.prompt_ids))]
        for part, (ids, mask), cut in zip(PARTS[1:], pair.responses, lost[1:], strict=True):
            counts = np.ones(len(ids), bool) if mask is None else mask
            edges = np.flatnonzero(np.diff(counts)) + 1
            pieces += [(part if counts[run[0]] else "context", _text(tokenizer, ids[run]))
                       for run in np.split(np.arange(len(ids)), edges)]  # fmt: skip
            pieces.append(cut)
        shown.append(ShownPair(f"{name}:{line}", tuple(piece for piece in pieces if piece)))
    return shown


def _text(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
