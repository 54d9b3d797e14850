"""Seven response tokens of a small vocabulary, for tests of the loss."""

from __future__ import annotations

import torch

from simpo_megatron.loss import ResponseTokens, VocabShard

# Row 3 predicts two tokens, as under prefix sharing; targets hold both ends of the vocabulary and repeat.
S, B, H, V, PADDED = 7, 2, 12, 300, 304
ROWS = torch.tensor([1, 3, 3, 5, 8, 9, 13])
TARGETS = torch.tensor([0, 299, 7, 7, 7, 128, 3])
SEQUENCE = torch.tensor([0, 0, 1, 1, 2, 2, 3])
TOKENS = ResponseTokens(ROWS, TARGETS, SEQUENCE, 2)
VOCAB = VocabShard(start=0, size=V)
