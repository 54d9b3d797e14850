"""Names of validation metrics: `eval/METRIC`, or `eval/SET/METRIC` for validation sets with names."""

from __future__ import annotations

from simpo_megatron.data import METRIC_GROUPS

EVALUATION_PREFIX = "eval/"
_EARLIER_PREFIX = "valid/"
"""Prefix of the metrics of named validation sets in a metrics.jsonl of version 0.1."""


def set_prefix(name: str) -> str:
    """The prefix of the metrics of the validation set `name`; "" is the first or only one."""
    return f"{EVALUATION_PREFIX}{name}/" if name else EVALUATION_PREFIX


def evaluation_metric(name: str) -> tuple[str, str] | None:
    """(set, metric) of a validation metric, with "" for the first or only set; None for any other metric."""
    prefix, _, rest = name.partition("/")
    first, slash, metric = rest.partition("/")
    if prefix + "/" not in (EVALUATION_PREFIX, _EARLIER_PREFIX) or not rest:
        return None
    if slash and (first not in METRIC_GROUPS or prefix + "/" == _EARLIER_PREFIX):
        return first, metric
    return "", rest
