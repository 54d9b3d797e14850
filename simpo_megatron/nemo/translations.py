"""Translations into our options that several dialects share; functions take the dialect's names of the keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from simpo_megatron.data import PairOptions
from simpo_megatron.errors import ConfigError
from simpo_megatron.nemo.rules import Asked, Different, Differs, Ignored, Obstacle, Only, Rule, Translated

OF_THE_MODEL = "the architecture and its numbers are those of the model's own config.json, whatever the file says"
OF_THE_TOKENIZER = "the model's own tokenizer is used"
OF_THE_MACHINE = "ranks, processes and their groups come from torchrun and the layout"
OF_KERNELS = "kernels and communication are chosen by what is installed"
OF_FILES = "checkpoints have one form and one place here"
OF_LOGS = "the run's folder holds metrics.jsonl and a report; TensorBoard and W&B are options"
OF_EVALUATION = "every validation pair is evaluated, before, during and after training"
OF_DATA = "tokenised pairs are kept in data_cache, in an order that only seed, epoch and position decide"
OF_SCHEDULE = "a part of schedules that are not here"
OF_ROUTERS = "routers, where a model has them, are trained with the rest"

_BF16 = ("bf16", "bf16-mixed", "bf16-true", "bfloat16")
_FP32 = ("32", "32-true", "fp32", "float32")
_SCHEDULES = {"CosineAnnealing": "cosine", "WarmupAnnealing": "linear"}


def each(prefix: str, names: str, rule: Rule) -> dict[str, Rule]:
    """`rule` for each of the names, which blanks separate, under `prefix`."""
    return {prefix + name: rule for name in names.split()}


def ignored(reason: str, prefix: str, names: str) -> dict[str, Rule]:
    """Those names under `prefix` as ignored keys."""
    return each(prefix, names, Ignored(reason))


def of_the_model(prefix: str, names: str) -> dict[str, Rule]:
    """Those names under `prefix` as keys of the architecture, which NeMo's files may change but ours may not."""
    return each(prefix, names, Differs(OF_THE_MODEL))


def taken(prefix: str, names: str) -> dict[str, Rule]:
    """Keys under `prefix` that have the names of our options."""
    return {prefix + name: name for name in names.split()}


def number_format(value: Any, asked: Asked) -> dict[str, Any]:
    """Lightning's and NeMo-RL's names of dtypes."""
    if str(value) in _BF16 + _FP32:
        return {"bf16": str(value) in _BF16}
    raise ConfigError(f"found {value!r}, expected one of {', '.join(_BF16 + _FP32)}")


PRECISION = Translated(number_format, ("bf16",))


def train_iters(value: Any, asked: Asked) -> dict[str, Any] | str:
    """Steps; NeMo writes -1 for no limit."""
    return "no limit of steps" if _is_no_limit(value) else {"train_iters": value}


TRAIN_ITERS = Translated(train_iters, ("train_iters",))


def epochs(value: Any, asked: Asked) -> dict[str, Any] | Different | str:
    """Passes over the data; beside a limit of steps the run ends at the earlier, there as here.

    Source: NeMo-RL algorithms/dpo.py (total_train_iters), NeMo-Aligner algorithms/dpo.py (set_max_steps), Lightning.
    """
    if _is_no_limit(value):
        return "no limit of epochs"
    here = (
        "what does not fill a global batch at the end of an epoch is left out there, and comes first in the next here"
    )
    return {"epochs": value} if value == 1 else Different(here, {"epochs": value})


EPOCHS = Translated(epochs, ("epochs",))


def _is_no_limit(value: Any) -> bool:
    return isinstance(value, int) and value == -1


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
    """Packs of as many tokens as the sequences of so many pairs hold when padded; without packing, so many pairs."""

    def micro_batch(value: Any, asked: Asked) -> dict[str, Any] | str:
        if asked.simpo.get("packing") is False:
            return {"micro_batch_size": value}
        if not _is_count(value):
            raise ConfigError(f"found {value!r}, expected a number of pairs")
        length = asked.simpo.get("max_length") or asked.get(*lengths)
        if _is_count(length):
            return {"tokens_per_microbatch": 2 * value * length}
        return "packs hold as many pairs as fit into tokens_per_microbatch"

    return Translated(micro_batch, ("micro_batch_size", "tokens_per_microbatch"), lengths, "N")


def sequence_parallel_of(tensor_parallel: str) -> Translated:
    """Sequence parallelism, which one tensor-parallel rank has no use for; NeMo switches it off then, too."""

    def sequence_parallel(value: Any, asked: Asked) -> dict[str, Any] | str:
        tp = asked.simpo.get("tensor_model_parallel_size") or asked.get(tensor_parallel) or 1
        return f"nothing to divide at {tensor_parallel} 1" if tp == 1 else {"sequence_parallel": value}

    return Translated(sequence_parallel, ("sequence_parallel",), (tensor_parallel,))


def tp_comm_overlap_of(prefix: str, key: str, parallel: str, others: str) -> dict[str, Rule]:
    """The rules of overlapped tensor-parallel collectives: `key`, and `others` of its buffers, all below `prefix`.

    The sizes of the layout are under `parallel`.
    """
    sizes = tuple(parallel + name for name in ("tensor_model_parallel_size", "sequence_parallel"))

    def overlap(value: Any, asked: Asked) -> Different | str:
        if not value:
            return "nothing overlaps"
        tp = asked.simpo.get("tensor_model_parallel_size") or asked.get(sizes[0]) or 1
        if tp == 1 or not asked.simpo.get("sequence_parallel", asked.get(sizes[1])):
            return "nothing to overlap without sequence parallelism"
        here = "packs then have one length, that of its buffers; the SimPO key tp_comm_overlap=false does without"
        return Different(here, {"tp_comm_overlap": True, "fixed_pack_length": True})

    return {
        prefix + key: Translated(overlap, ("tp_comm_overlap",), sizes, "true"),
        **ignored("its buffers are set up as Transformer Engine does by default", prefix, others),
    }


def constant_steps_of(*steps: str) -> Translated:
    """Steps at the end that stay at min_lr: warm-up and decay take those before, of a run of `steps`.

    Source: NeMo core/optim/lr_scheduler.py (CosineAnnealing).
    """

    def constant_steps(value: Any, asked: Asked) -> dict[str, Any] | Different | str:
        if value == 0:
            return "the decay lasts until the end"
        total = asked.get(*steps)
        if not _is_count(total):
            return Different(f"the last {value} steps stay at min_lr there; the decay lasts until the end here", {})
        if total <= value:
            raise Obstacle(f"found {value}, expected fewer than the {total} steps of {steps[0]}")
        return {"lr_decay_iters": total - value}

    return Translated(constant_steps, ("lr_decay_iters",), steps)


def max_steps_unless(constant_steps: str) -> Translated:
    """Steps of a schedule, when none of them are constant at its end."""

    def max_steps(value: Any, asked: Asked) -> dict[str, Any] | str:
        if asked.get(constant_steps):
            return f"read together with {constant_steps}"
        return {"lr_decay_iters": value} if _is_count(value) else "as many steps as the run has"

    return Translated(max_steps, ("lr_decay_iters",), (constant_steps,))


def checkpoint_elsewhere(what: str) -> Only:
    """A key that names weights in a format that is not supported."""
    instead = f"{what} is not read; export it to a Hugging Face folder and give that as the SimPO key model"
    return Only((None,), instead, ("model",))


def data_elsewhere(what: str) -> Only:
    """A key that names data in a format that is not supported."""
    return Only((None,), f"{what} is not preference data; give files of pairs as the SimPO key data", ("data",))


def every_batch(key: str) -> dict[str, Rule]:
    """Lightning's limit of batches in an epoch under `key`: a share as a fraction, a number of batches otherwise."""

    def check(value: Any, asked: Asked) -> str:
        if isinstance(value, float) and value == 1:
            return "every pair of the data is trained on"
        raise Obstacle(f"found {value}, expected 1.0: every pair of the data is trained on", f"{key}=1.0")

    return {key: Translated(check, ())}


def sequences_as_pairs(value: Any, asked: Asked) -> Different:
    """A global batch of sequences, which becomes one of as many pairs."""
    here = f"{value} sequences there, {value} pairs here, which are twice as many sequences"
    return Different(here, {"global_batch_size": value})


SEQUENCES_AS_PAIRS = Translated(sequences_as_pairs, ("global_batch_size",))


def eval_interval(value: Any, asked: Asked) -> dict[str, Any] | str:
    """Steps; 0 and -1 are never."""
    return "evaluated before and after training only" if value in (0, -1) else {"eval_interval": value}


EVAL_INTERVAL = Translated(eval_interval, ("eval_interval",))


def val_check_interval(value: Any, asked: Asked) -> dict[str, Any] | str:
    """Lightning counts steps with a whole number, and with a fraction the share of an epoch."""
    if not isinstance(value, float) or value == 0:
        return eval_interval(value, asked)
    if not 0 < value <= 1:
        raise ConfigError(f"found {value}, expected a whole number of steps, or a share of an epoch up to 1.0")
    return {"eval_epochs": value}


VAL_CHECK_INTERVAL = Translated(val_check_interval, ("eval_interval",))


def clip_of(*others: str) -> Translated:
    """Lightning's norm to clip at; null, unless one of `others` has a number, clips nothing."""

    def clip(value: Any, asked: Asked) -> dict[str, Any] | str:
        if value is None and asked.get(*others) is not None:
            return f"{others[0]} decides"
        return {"clip_grad": 0.0 if value is None else value}

    return Translated(clip, ("clip_grad",), others, takes_null=True)


def keep_checkpoints(value: Any, asked: Asked) -> dict[str, Any] | Different:
    """The number of checkpoints that stay: the best there, the newest and the best one here; null and -1 keep all."""
    if value in (None, -1):
        return {"keep_checkpoints": -1}
    if value == 0:
        return Different("0 saves nothing there; without save nothing is saved here", {})
    here = f"the {value} best by a metric there; the {value} newest here, and the one with the best validation accuracy"
    return Different(here, {"keep_checkpoints": value})


KEEP_CHECKPOINTS = Translated(keep_checkpoints, ("keep_checkpoints",), takes_null=True)


def unsaved(*folders: str) -> Callable[[Asked], dict[str, str]]:
    """A remark on a run without one of the keys `folders`, which NeMo puts into a folder of its own choice."""

    def remark(asked: Asked) -> dict[str, str]:
        if asked.simpo.get("save") or asked.get(*folders):
            return {}
        return {folders[0]: "without it NeMo saves in nemo_experiments; here nothing is saved without save or this key"}

    return remark


def resume_of(ignore_no_checkpoint: str) -> Translated:
    """NeMo's resume_if_exists, with the key that says whether a missing checkpoint is an error."""

    def resume(value: Any, asked: Asked) -> dict[str, Any]:
        must_be_there = asked.get(ignore_no_checkpoint) is False
        return {"resume": ("required" if must_be_there else "latest") if value else "none"}

    return Translated(resume, ("resume",), (ignore_no_checkpoint,))


def schedule(value: Any, asked: Asked) -> dict[str, Any]:
    """A schedule by the name NeMo gives it, or by the class called after it."""
    name = str(value).rsplit(".", 1)[-1].removesuffix("Scheduler")
    if name not in _SCHEDULES:
        raise ConfigError(f"found {value!r}, expected {' or '.join(_SCHEDULES)}, or lr_decay_style as a SimPO key")
    return {"lr_decay_style": _SCHEDULES[name]}


SCHEDULE = Translated(schedule, ("lr_decay_style",))
