"""Resuming a run: the facts that a checkpoint records of its run, and which checkpoint a run may continue from.

An error on one rank is raised on all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from simpo_megatron.atomic import move_aside, write_text
from simpo_megatron.checkpoint import manifest
from simpo_megatron.checkpoint.fingerprint import is_of_this_form, sampled_fingerprint, source_fingerprint
from simpo_megatron.checkpoint.manifest import Checkpoint
from simpo_megatron.checkpoint.model_facts import as_json, model_facts
from simpo_megatron.checkpoint.model_source import ModelSource
from simpo_megatron.checkpoint.run_lock import check_same_folder, lock
from simpo_megatron.checkpoint.sharded_state import read_state
from simpo_megatron.checkpoint.verification import read_verified
from simpo_megatron.config import Config
from simpo_megatron.config.optimizer_section import OptimizerConfig
from simpo_megatron.config.sections import OBJECTIVES
from simpo_megatron.errors import CheckpointError, listed
from simpo_megatron.mcore.hf import hub_name
from simpo_megatron.ranks import on_first_rank, raise_on_all_ranks
from simpo_megatron.reporting.loggers import METRICS_FILE
from simpo_megatron.training.saving.monitor_memory import check_remembered
from simpo_megatron.training.start.inputs import hashes_file
from simpo_megatron.training.start.setup import Job

_NEVER_CHANGES = ("model", "precision")
_CHANGES_IF_TOLD = ("inputs", "training")
_MAX_SHOWN = 12


@dataclass(frozen=True)
class Found:
    """The checkpoint to continue from, if any, and notes on the search."""

    checkpoint: Checkpoint | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Start:
    """The progress of a run at its first step."""

    iteration: int = 0
    consumed_pairs: int = 0
    notes: tuple[str, ...] = ()
    monitors: Mapping[str, Any] = field(default_factory=dict)
    """The state of the monitors."""


@contextmanager
def held_run_folder(config: Config) -> Iterator[None]:
    """While the context lasts, the run's folder exists, is the same for every rank, and is locked by this run.

    Collectives: those of two `raise_on_all_ranks` and of one `on_first_rank`, world.

    Raises:
        CheckpointError: on every rank alike, when another run holds it, or a rank sees another folder.
    """
    if config.run.save is None:
        yield
        return
    save = Path(config.run.save)
    is_first = dist.get_rank() == 0
    held = raise_on_all_ranks(lambda: lock(save) if is_first else None, wrap=CheckpointError)
    try:
        nonce = on_first_rank(lambda: held.nonce if held is not None else "")
        raise_on_all_ranks(lambda: check_same_folder(save, nonce), wrap=CheckpointError)
        yield
    finally:
        if held is not None:
            held.release()


def find_checkpoint(config: Config) -> Found:
    """The checkpoint that `--resume` means, verified byte by byte, each rank reading a share of its files.

    Collectives: those of `on_first_rank`, and of `read_verified` for each checkpoint tried, world.

    Raises:
        CheckpointError: on every rank alike, when the one asked for is missing or damaged.
    """
    if config.run.save is None:
        return Found()
    save, resume = Path(config.run.save), config.run.resume

    def search() -> tuple[list[Path], list[Path], str | None]:
        drafts, folders = manifest.remove_drafts(save), manifest.list_resumable(save, resume)
        return drafts, folders, manifest.stray_pointer(save) if folders else None

    drafts, folders, said = on_first_rank(search, wrap=CheckpointError)
    notes = [f"resume    ignored {draft.name}, which was never completed" for draft in drafts]
    if said is not None:
        notes.append(f"WARNING   resume: ignored {manifest.LATEST_FILE}, which says {said!r} and not the newest step")
    checkpoint, problems = manifest.first_valid(folders, resume, read_verified)
    notes += [f"WARNING   resume: passed over a damaged checkpoint: {problem}" for problem in problems]
    if checkpoint is not None:
        notes.append(f"resume    from {checkpoint.folder}: step {checkpoint.iteration}")
    return Found(checkpoint, tuple(notes))


def how_to_continue(config: Config) -> str:
    """A line for a stopped run: its newest checkpoint and the command that continues from it."""
    if config.run.save is None:
        return "nothing is kept: no --save"
    committed = manifest.committed(Path(config.run.save))
    if not committed:
        return f"no checkpoint is in {config.run.save} yet; the same command starts again"
    return f"the last checkpoint is {committed[-1]}; {continuing(config)}"


def continuing(config: Config) -> str:
    """A sentence with the command that continues the run."""
    again = "" if config.run.resume in ("latest", "required") else " with --resume latest"
    return f"the same command{again} continues from there"


def start_run(config: Config, job: Job, found: Found) -> Start:
    """The progress at which `job` starts; loads the state of the found checkpoint, if there is one.

    Later checkpoints and the metrics of another run are renamed, so that the folder holds this run's history only.

    Collectives: megatron's for loading, those of `read_state`, and of one `on_first_rank`, world.

    Raises:
        CheckpointError: on every rank alike, when the run is not the one that was saved.
    """
    if config.run.save is None:
        return Start()
    save, checkpoint = Path(config.run.save), found.checkpoint
    notes: list[str] = []
    iteration = consumed_pairs = 0
    now = describe_run(config, job)
    if checkpoint is not None:
        saved = replace(checkpoint, facts=_with_later_options(_with_present_fingerprints(checkpoint.facts, now, job)))
        notes += _refuse_changes(saved, now, override=config.run.override_on_resume)
        for name in ("consumed_pairs", "layout"):
            if name not in checkpoint.facts:
                raise CheckpointError(f"resume: found {checkpoint.folder} without {name}, expected a run's checkpoint")
        check_remembered(checkpoint.facts.get("monitors", {}), checkpoint.folder)
        iteration, consumed_pairs = checkpoint.iteration, checkpoint.facts["consumed_pairs"]
        same_layout = checkpoint.facts["layout"] == now["layout"]
        read_state(job.trainer.state, checkpoint, same_layout=same_layout)
        source = job.plan.sources.model
        if config.lora.lora_rank is None:
            notes.append(f"resume    weights are those of the checkpoint, not those in {source}")
        else:
            notes.append(f"resume    adapters are those of the checkpoint, on the weights in {source}")
        if not same_layout:
            notes.append("resume    another layout: dropout, if any, draws other numbers from here on")
    notes += on_first_rank(lambda: _tidy(save, checkpoint), wrap=CheckpointError)
    monitors = checkpoint.facts.get("monitors", {}) if checkpoint is not None else {}
    return Start(iteration, consumed_pairs, tuple(notes), monitors)


def _tidy(save: Path, checkpoint: Checkpoint | None) -> list[str]:
    """Renames what does not belong to the history of `checkpoint`, or everything for a new run; returns notes on it."""
    moved = manifest.move_aside_newer(save, checkpoint.iteration if checkpoint else 0)
    metrics = save / METRICS_FILE
    if checkpoint is not None:
        saved = checkpoint.folder / METRICS_FILE
        write_text(metrics, saved.read_text(encoding="utf-8") if METRICS_FILE in checkpoint.files else "")
        manifest.write_latest(save, checkpoint.iteration)
    elif metrics.exists() and metrics.stat().st_size > 0:
        moved.append(move_aside(metrics))
    return [f"WARNING   moved aside {path.name}: it belongs to an earlier run" for path in moved]


def describe_run(config: Config, job: Job) -> dict[str, Any]:
    """The facts of a run as JSON values: those that a resume compares, the layout, and all options."""
    description, options = job.plan.description, config.flat()
    training = ("hidden_dropout", "attention_dropout", "lora_dropout", "global_batch_size", "seed")
    schedule = {key: value for key, value in asdict(config.optimizer).items() if key != "epochs"}
    facts = {
        "model": {**model_facts(description), **_describe_adapters(config, job)},
        "precision": {key: options[key] for key in ("bf16", "use_distributed_optimizer")},
        "inputs": {
            "tokenizer": job.tokenizer.facts.digest,
            "data": job.train_data.fingerprint,
            "num_pairs": len(job.train_data),
            "reference_model": job.reference_model,
        },
        "training": {
            **asdict(config.objective),
            **schedule,
            **{key: options[key] for key in training},
            "train_iters": job.train_iters,
        },
        "layout": {**asdict(config.parallel.sizes), "world": dist.get_world_size()},
        "config": options,
        **_base(config, job),
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
    }
    return as_json(facts)


def _describe_adapters(config: Config, job: Job) -> dict[str, Any]:
    """The facts that a checkpoint of adapters, which holds no other weights, needs to be continued.

    Collectives: those of `on_first_rank`, world, the first time.
    """
    lora = config.lora
    if lora.lora_rank is None:
        return {}
    own = {"lora_rank": lora.lora_rank, "lora_alpha": lora.lora_alpha, "lora_targets": lora.lora_targets}
    if lora.use_rslora:
        own["use_rslora"] = True
    return {**own, "base_model": _fingerprint(job.plan.sources.model_source, hashes_file(config))}


def _base(config: Config, job: Job) -> dict[str, str]:
    """The name under which another program finds the model that a run's adapters belong to."""
    if config.lora.lora_rank is None:
        return {}
    source, named = job.plan.sources.model_source, str(config.model.model)
    base = {"base": named if hub_name(named) and not Path(named).exists() else str(source.last.absolute())}
    return base if source.hf_config is None else {**base, "base_hf_config": str(source.hf_config.absolute())}


@functools.cache
def _fingerprint(source: ModelSource, memory: Path) -> str:
    """The fingerprint of a model's files, computed once per run. Collectives: those of `on_first_rank`, world."""
    return on_first_rank(lambda: source_fingerprint(source, memory), wrap=CheckpointError)


@functools.cache
def _earlier_fingerprint(folder: Path) -> str:
    """The same as an earlier version computed it. Collectives: those of `on_first_rank`, world."""
    return on_first_rank(lambda: sampled_fingerprint(folder), wrap=CheckpointError)


def _with_present_fingerprints(saved: Mapping[str, Any], now: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """The `saved` facts, with fingerprints of an earlier version's form replaced by the present ones if they match.

    Collectives: those of `on_first_rank`, world, where there is such a model.
    """
    facts = dict(saved)
    for section, key in (("model", "base_model"), ("inputs", "reference_model")):
        before = saved.get(section, {}).get(key)
        if before is None or is_of_this_form(before):
            continue
        if before == _earlier_fingerprint(job.plan.sources.model):
            facts[section] = {**facts[section], key: now[section].get(key)}
    return facts


def _with_later_options(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The `saved` facts, with options that the version which wrote them did not have at their defaults."""
    training = saved.get("training", {})
    kind = OBJECTIVES.get(training.get("objective"))
    later = asdict(kind()) if kind else {}
    later |= {key: value for key, value in asdict(OptimizerConfig()).items() if key.startswith("lr_")}
    return {**saved, "training": as_json(later) | training}


def _refuse_changes(checkpoint: Checkpoint, now: Mapping[str, Any], *, override: bool) -> list[str]:
    """The changes since `checkpoint` that `override` allows, as notes.

    Raises:
        CheckpointError: a field that must not change did; each is named with both values.
    """
    fixed = _changes(checkpoint.facts, now, _NEVER_CHANGES)
    told = _changes(checkpoint.facts, now, _CHANGES_IF_TOLD)
    if fixed or (told and not override):
        shown = listed(fixed + told, _MAX_SHOWN, "; ")
        remedy = (
            "these cannot change within a run: start a new one in another folder, with --model of this one to keep its "
            "weights, or here with --resume none"
            if fixed
            else "restore them, start anew in another folder or here with --resume none, or accept them with "
            "--override-on-resume"
        )
        raise CheckpointError(f"resume: found {checkpoint.folder} of another run, expected this one: {shown}; {remedy}")
    return [f"WARNING   resume: {change}" for change in told]


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any], sections: Sequence[str]) -> list[str]:
    return [
        f"{section}.{key}: {_quoted(before.get(key))} when saved, {_quoted(after.get(key))} now"
        for section in sections
        for before, after in [(saved.get(section, {}), now[section])]
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _quoted(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:40] + "..."
