"""Inspection of a dataset: counts, oddities, leaks and examples, for `simpo inspect` and the first lines of a run."""

from simpo_megatron.data.inspection.dataset_inspection import (
    DatasetInspection,
    InspectedRow,
    histogram,
    inspect_dataset,
    num_leaked,
    print_inspection,
)
from simpo_megatron.data.inspection.pair_counts import read_as, summary
from simpo_megatron.data.inspection.shown_pairs import ShownPair, show_pairs

__all__ = [
    "DatasetInspection",
    "InspectedRow",
    "ShownPair",
    "histogram",
    "inspect_dataset",
    "num_leaked",
    "print_inspection",
    "read_as",
    "show_pairs",
    "summary",
]
