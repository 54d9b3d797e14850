"""The lengths of the pairs in a microbatch that the roofline counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

IGNORE = -100
META = torch.device("meta")


@dataclass(frozen=True)
class Microbatch:
    """The pairs of a microbatch, by their lengths in tokens."""

    prompts: np.ndarray
    responses: np.ndarray
    """[num_pairs, 2]."""

    @classmethod
    def of(cls, num_pairs: int, prompt_tokens: float, response_tokens: float) -> Microbatch:
        """Returns pairs with lengths like those of chats: log-normal, with a factor of 1.6."""
        random = np.random.default_rng(0)

        def spread(mean: float, size: tuple[int, ...]) -> np.ndarray:
            lengths = np.exp(random.normal(0.0, np.log(1.6), size))
            return np.maximum(1, np.round(lengths * mean / lengths.mean())).astype(int)

        return cls(spread(prompt_tokens, (num_pairs,)), spread(response_tokens, (num_pairs, 2)))

    @property
    def packed_tokens(self) -> int:
        return int(self.prompts.sum() + self.responses.sum())

    @property
    def padded_shape(self) -> tuple[int, int]:
        """(rows, positions) of a batch with a row for each response."""
        return 2 * len(self.prompts), int((self.prompts[:, None] + self.responses).max())

    def __str__(self) -> str:
        rows, length = self.padded_shape
        return (
            f"{len(self.prompts)} pairs: {self.packed_tokens:,} tokens packed, {int(self.responses.sum()):,} of them "
            f"responses; padded {rows} x {length:,}"
        )
