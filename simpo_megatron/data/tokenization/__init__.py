"""The token ids of a pair: its rendered text encoded, cut where the responses begin, and truncated by one rule."""

from simpo_megatron.data.tokenization.pair_tokenizer import (
    EncodedPair,
    PairTokenizer,
    TokenizedPair,
    load_tokenizer,
    tokenizer_identity,
    use_one_thread,
)

__all__ = [
    "EncodedPair",
    "PairTokenizer",
    "TokenizedPair",
    "load_tokenizer",
    "tokenizer_identity",
    "use_one_thread",
]
