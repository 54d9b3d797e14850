"""Tokenised pairs on disk.

A source is read and tokenised once, by several processes, into a folder that is named after what it was made from.
Later runs, and all ranks, open that folder. A killed build continues, and a damaged folder is noticed.
"""

from simpo_megatron.data.store.build_report import BuildReport
from simpo_megatron.data.store.chunks import encode_chunk
from simpo_megatron.data.store.pair_store import PairStore, check_first_records, digest_of_tokenizer, open_store

__all__ = [
    "BuildReport",
    "PairStore",
    "check_first_records",
    "digest_of_tokenizer",
    "encode_chunk",
    "open_store",
]
