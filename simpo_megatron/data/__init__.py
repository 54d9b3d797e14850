"""Preference files in, packed batches out; needs numpy, torch and a transformers tokenizer, no Megatron.

```python
from simpo_megatron.data import BatchOptions, PairOptions, build_preference_dataset, iterate_steps, load_tokenizer

dataset = build_preference_dataset(["pairs.jsonl"], load_tokenizer("model/"), PairOptions(max_length=2048), "cache/")
for microbatches in iterate_steps(dataset, BatchOptions(global_batch_size=8)):
    for batch in microbatches:
        ...  # a PreferenceBatch: batch.tokens_BS, batch.rows_N, batch.targets_N, ...
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simpo_megatron.lazy import lazy_names

if TYPE_CHECKING:
    from simpo_megatron.data.batch_options import BatchConfig, BatchOptions, check_global_batch_size
    from simpo_megatron.data.batching import (
        PreferenceBatch,
        Shape,
        StepPlan,
        check_batches,
        check_budget,
        collate,
        heaviest_step,
        iterate_steps,
        padding_share,
        pair_tokens,
        plan_evaluation,
        plan_step,
        plan_tokens,
        step_shape,
    )
    from simpo_megatron.data.dataset import PreferenceDataset, build_preference_dataset, check_vocabulary, split
    from simpo_megatron.data.pair_options import PairOptions
    from simpo_megatron.data.rendering import chosen_template
    from simpo_megatron.data.sources import METRIC_GROUPS, parse_named_sources
    from simpo_megatron.data.tokenization import TokenizedPair, load_tokenizer

__all__ = [
    "METRIC_GROUPS",
    "BatchConfig",
    "BatchOptions",
    "PairOptions",
    "PreferenceBatch",
    "PreferenceDataset",
    "Shape",
    "StepPlan",
    "TokenizedPair",
    "build_preference_dataset",
    "check_batches",
    "check_budget",
    "check_global_batch_size",
    "check_vocabulary",
    "chosen_template",
    "collate",
    "heaviest_step",
    "iterate_steps",
    "load_tokenizer",
    "padding_share",
    "pair_tokens",
    "parse_named_sources",
    "plan_evaluation",
    "plan_step",
    "plan_tokens",
    "split",
    "step_shape",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "batch_options": "BatchConfig BatchOptions check_global_batch_size",
        "batching": "PreferenceBatch Shape StepPlan check_batches check_budget collate heaviest_step iterate_steps "
        "padding_share pair_tokens plan_evaluation plan_step plan_tokens step_shape",
        "dataset": "PreferenceDataset build_preference_dataset check_vocabulary split",
        "pair_options": "PairOptions",
        "sources": "METRIC_GROUPS parse_named_sources",
        "rendering": "chosen_template",
        "tokenization": "TokenizedPair load_tokenizer",
    },
)
