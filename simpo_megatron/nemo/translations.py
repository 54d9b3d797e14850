"""Translations that several dialects share, into our options; the makers take the names a dialect gives the keys."""

from __future__ import annotations

import math
from typing import Any

from simpo_megatron.data import PairOptions
from simpo_megatron.errors import ConfigError
from simpo_megatron.nemo.rules import Asked, Ignored, Only, Rule, Translated

OF_THE_MODEL = "the architecture and its numbers are those of the model's own config.json"
OF_THE_TOKENIZER = "the model's own tokenizer is used"
OF_THE_MACHINE = "ranks, processes and their groups come from torchrun and the layout"
OF_KERNELS = "kernels and communication are chosen by what is installed"
OF_FILES = "checkpoints have one form and one place here"
OF_LOGS = "the run's folder holds metrics.jsonl and a report; TensorBoard and W&B are options"
OF_EVALUATION = "every validation pair is evaluated, before, during and after training"
OF_DATA = "tokenised pairs are kept in data_cache, in an order that only seed, epoch and position decide"
OF_SCHEDULE = "the learning rate rises from 0 and decays until the last step; weight decay is constant"
OF_DPO = "SimPO has no reference policy and always averages; its own settings are the SimPO keys"
OF_ROUTERS = "routers, where a model has them, are trained with the rest"
READ_WITH_ANOTHER = "read together with the key it belongs to"

_BF16 = ("bf16", "bf16-mixed", "bf16-true", "bfloat16")
_FP32 = ("32", "32-true", "fp32", "float32")
_SCHEDULES = {"CosineAnnealing": "cosine", "WarmupAnnealing": "linear"}


def each(prefix: str, names: str, rule: Rule) -> dict[str, Rule]:
    """`rule` for each of the names, which blanks separate, under `prefix`."""
    return {prefix + name: rule for name in names.split()}


def ignored(reason: str, prefix: str, names: str) -> dict[str, Rule]:
    """Those names under `prefix` as ignored keys."""
    return each(prefix, names, Ignored(reason))


def taken(prefix: str, names: str) -> dict[str, Rule]:
    """Keys under `prefix` that are called as our options are."""
    return {prefix + name: name for name in names.split()}


def number_format(value: Any, asked: Asked) -> dict[str, Any]:
    """Lightning's and NeMo-RL's names of dtypes."""
    if str(value) in _BF16 + _FP32:
        return {"bf16": str(value) in _BF16}
    raise ConfigError(f"found {value!r}, expected one of {', '.join(_BF16 + _FP32)}")


PRECISION = Translated(number_format, ("bf16",))


def train_iters(value: Any, asked: Asked) -> dict[str, Any] | str:
    """Steps; NeMo writes -1 for no limit."""
    return {"train_iters": value} if _is_count(value) else "no limit of steps"


TRAIN_ITERS = Translated(train_iters, ("train_iters",))


def epochs_unless(*steps: str) -> Translated:
    """Passes over the data, when no key of `steps` limits the run; both together would end it at the earlier."""

    def epochs(value: Any, asked: Asked) -> dict[str, Any] | str:
        if _is_count(asked.get(*steps)):
            return f"{steps[0]} decides how long the run is"
        return {"epochs": value} if _is_count(value) else "no limit of epochs"

    return Translated(epochs, ("epochs",))


def warmup_of(*steps: str) -> Translated:
    """Warm-up steps as the share of all steps, which is what lr_warmup_fraction states."""

    def warmup(value: Any, asked: Asked) -> dict[str, Any]:
        if value == 0:
            return {"lr_warmup_fraction": 0.0}
        total = asked.simpo.get("train_iters") or (None if "epochs" in asked.simpo else asked.get(*steps))
        if not _is_count(total):
            raise ConfigError(
                f"found {value} steps of a run whose number of steps is not stated, expected {steps[0]} above 0 "
                "with it, or lr_warmup_fraction as a SimPO key"
            )
        if not _is_count(value) or value >= total:
            raise ConfigError(f"found {value!r}, expected whole steps, fewer than the {total} of the run")
        fraction = value / total
        while math.ceil(fraction * total) > value:  # the product may round up past a whole number
            fraction = math.nextafter(fraction, 0)
        return {"lr_warmup_fraction": fraction}

    return Translated(warmup, ("lr_warmup_fraction",))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def sequence_length(value: Any, asked: Asked) -> dict[str, Any]:
    """The whole length, and for the prompt the share of it that it has by default; NeMo has no limit of its own."""
    if not _is_count(value):
        raise ConfigError(f"found {value!r}, expected a number of tokens")
    return {
        "max_length": value,
        "max_prompt_length": value * PairOptions.max_prompt_length // PairOptions.max_length,
    }


LENGTH = Translated(sequence_length, ("max_length",))


def micro_batch_of(*lengths: str) -> Translated:
    """Pairs per microbatch, and packs of as many tokens as those pairs' sequences hold when padded."""

    def micro_batch(value: Any, asked: Asked) -> dict[str, Any]:
        length = asked.simpo.get("max_length") or asked.get(*lengths)
        packs = {"tokens_per_microbatch": 2 * value * length} if _is_count(value) and _is_count(length) else {}
        return {"micro_batch_size": value} | packs

    return Translated(micro_batch, ("micro_batch_size", "tokens_per_microbatch"))


def sequence_parallel_of(tensor_parallel: str) -> Translated:
    """Sequence parallelism, which one tensor-parallel rank has no use for; NeMo switches it off then, too."""

    def sequence_parallel(value: Any, asked: Asked) -> dict[str, Any] | str:
        tp = asked.simpo.get("tensor_model_parallel_size") or asked.get(tensor_parallel) or 1
        return f"nothing to divide at {tensor_parallel} 1" if tp == 1 else {"sequence_parallel": value}

    return Translated(sequence_parallel, ("sequence_parallel",))


def checkpoint_elsewhere(what: str) -> Only:
    """A key that names weights in a form that is not read here."""
    instead = f"{what} is not read; export it to a Hugging Face folder and give that as the SimPO key model"
    return Only((None,), instead, ("model",))


def data_elsewhere(what: str) -> Only:
    """A key that names data in a form that is not read here."""
    return Only((None,), f"{what} is not preference data; give files of pairs as the SimPO key data", ("data",))


def eval_interval(value: Any, asked: Asked) -> dict[str, Any] | str:
    """Lightning counts steps with a whole number and parts of an epoch with a fraction; 0 and -1 are never."""
    if isinstance(value, float):
        return "a share of an epoch; an interval counts steps here"
    return "evaluated before and after training only" if value in (0, -1) else {"eval_interval": value}


EVAL_INTERVAL = Translated(eval_interval, ("eval_interval",))


def keep_checkpoints(value: Any, asked: Asked) -> dict[str, Any] | str:
    """The number of checkpoints that stay; -1 keeps all elsewhere, which there is no word for here."""
    return "keep_checkpoints holds here" if value in (0, -1) else {"keep_checkpoints": value}


KEEP_CHECKPOINTS = Translated(keep_checkpoints, ("keep_checkpoints",))


def resume_of(ignore_no_checkpoint: str) -> Translated:
    """NeMo's resume_if_exists, with the key that says whether a missing checkpoint is an error."""

    def resume(value: Any, asked: Asked) -> dict[str, Any]:
        must_be_there = asked.get(ignore_no_checkpoint) is False
        return {"resume": ("required" if must_be_there else "latest") if value else "none"}

    return Translated(resume, ("resume",))


def schedule(value: Any, asked: Asked) -> dict[str, Any]:
    """A schedule by the name NeMo gives it, or by the class called after it."""
    name = str(value).rsplit(".", 1)[-1].removesuffix("Scheduler")
    if name not in _SCHEDULES:
        raise ConfigError(f"found {value!r}, expected {' or '.join(_SCHEDULES)}, or lr_decay_style as a SimPO key")
    return {"lr_decay_style": _SCHEDULES[name]}


SCHEDULE = Translated(schedule, ("lr_decay_style",))
