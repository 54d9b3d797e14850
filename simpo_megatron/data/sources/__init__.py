"""Preference files, read row by row.

A source is a file, a folder of shards, a pattern or a data set of the hub, in any accepted kind of file. Rows come
out with their line numbers and are not yet parsed as pairs. Which sources a run reads, and with which weights, is
`blend`.
"""

from simpo_megatron.data.sources.blend import METRIC_GROUPS, Source, parse_named_sources, parse_sources, source_identity
from simpo_megatron.data.sources.readers import RawRecord, check_kind, first_records, read_raw
from simpo_megatron.data.sources.shards import COMPRESSIONS, check_readable, files_of, is_on_hub

__all__ = [
    "COMPRESSIONS",
    "METRIC_GROUPS",
    "RawRecord",
    "Source",
    "check_kind",
    "check_readable",
    "files_of",
    "first_records",
    "is_on_hub",
    "parse_named_sources",
    "parse_sources",
    "read_raw",
    "source_identity",
]
