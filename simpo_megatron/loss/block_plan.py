"""Blocks of a vocabulary slice on a GPU: the fewest whose logits fit into a byte budget."""

from __future__ import annotations

from dataclasses import dataclass

# Starts and strides of blocks: whole tiles of cuBLAS, and rows whose first byte is aligned for its fastest kernels.
COLUMN_MULTIPLE = 256
# With more than one block, each costs a read and a write of the rows' gradient in fp32.
_MAX_BLOCKS_OF_A_SLICE = 8


@dataclass(frozen=True)
class BlockPlan:
    """Blocks `[start, stop)` of the slice, and the number of leading blocks that keep their logits."""

    blocks: tuple[tuple[int, int], ...]
    num_kept: int

    @classmethod
    def of(cls, num_rows: int, width: int, *, logit_bytes: int, slope_bytes: int, budget_bytes: int) -> BlockPlan:
        """Returns the fewest blocks whose logits fit into the budget, beside the slopes of the one in work.

        Args:
            num_rows: N.
            width: real columns of the slice.
            logit_bytes: bytes of a logit.
            slope_bytes: bytes of a logit's gradient.
            budget_bytes: the most bytes to hold.
        """
        if num_rows == 0 or width == 0:
            return cls((), 0)
        num_columns = budget_bytes // (num_rows * logit_bytes)
        for num_blocks in range(1, _MAX_BLOCKS_OF_A_SLICE + 1):
            size = min(round_up(-(-width // num_blocks)), width)
            if width + size * slope_bytes / logit_bytes <= num_columns:
                blocks = _cut(width, size)
                return cls(blocks, len(blocks))
        # Not all can stay: work on an eighth of the slice, or on half of the budget where that is less. Slopes take the
        # place of logits of their own dtype.
        scratch = slope_bytes / logit_bytes + (slope_bytes != logit_bytes)
        size = min(size, max(int(num_columns / 2 / scratch) // COLUMN_MULTIPLE, 1) * COLUMN_MULTIPLE)
        blocks = _cut(width, size)
        return cls(blocks, min(max(int(num_columns / size - scratch), 0), len(blocks)))


def round_up(width: int) -> int:
    """Returns the next multiple of `COLUMN_MULTIPLE`."""
    return -(-width // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def _cut(width: int, size: int) -> tuple[tuple[int, int], ...]:
    return tuple((start, min(start + size, width)) for start in range(0, width, size))
