"""Inspection of a dataset: counts, oddities, leaks and examples, for `simpo inspect` and the first lines of a run."""

from simpo_megatron.data.inspection.dataset_inspection import (
    PARTS,
    DatasetInspection,
    InspectedRow,
    ShownPair,
    histogram,
    inspect_dataset,
    num_leaked,
    print_inspection,
    read_as,
    show_pairs,
    summary,
)

__all__ = [
    "PARTS",
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
