"""The token ids of a pair: its rendered text encoded, cut where the responses begin, and truncated by one rule."""

from simpo_megatron.data.tokenization.pair_tokenizer import (
    PARTS,
    EncodedPair,
    PairTokenizer,
    TokenizedPair,
    load_tokenizer,
    tokenizer_identity,
    use_one_thread,
)
from simpo_megatron.data.tokenization.without_torch import leave_out_torch, torch_left_out

__all__ = [
    "PARTS",
    "EncodedPair",
    "PairTokenizer",
    "TokenizedPair",
    "leave_out_torch",
    "load_tokenizer",
    "tokenizer_identity",
    "torch_left_out",
    "use_one_thread",
]
