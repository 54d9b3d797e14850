"""How a run is continued: what a checkpoint says of its run, and which one a run may continue from.

Ranks act together: what one finds wrong, all raise.
"""

from __future__ import annotations

import functools
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from simpo_megatron.config import Config
from simpo_megatron.data.tokenization import tokenizer_identity
from simpo_megatron.errors import CheckpointError, listed
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.parallel import on_first_rank
from simpo_megatron.training import commit
from simpo_megatron.training.assembly import Job
from simpo_megatron.training.commit import Checkpoint
from simpo_megatron.training.lock import check_same_folder, holder, lock
from simpo_megatron.training.loggers import METRICS_FILE
from simpo_megatron.training.reference import model_fingerprint
from simpo_megatron.training.state import read_state
from simpo_megatron.training.together import agreed, gathered

_NEVER_CHANGES = ("model", "precision")
_CHANGES_IF_TOLD = ("inputs", "training")
_MAX_SHOWN = 12


@dataclass(frozen=True)
class Found:
    """The checkpoint a run is to continue from, if any, and what is worth saying about the search."""

    checkpoint: Checkpoint | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Start:
    """How far a run is when it starts to step."""

    iteration: int = 0
    consumed_pairs: int = 0
    notes: tuple[str, ...] = ()
    monitors: Mapping[str, Any] = field(default_factory=dict)
    """What the monitors remembered."""


@contextmanager
def held_run_folder(config: Config) -> Iterator[None]:
    """The run's folder is there, seen by every rank and this run's alone, as long as the context lasts.

    Collectives: two object gathers, world.

    Raises:
        CheckpointError: on every rank alike, when another run holds it, or a rank sees another folder.
    """
    if config.run.save is None:
        yield
        return
    save = Path(config.run.save)
    is_first = dist.get_rank() == 0
    held = agreed(lambda: lock(save) if is_first else None)
    try:
        nonce = gathered(lambda: holder(held) if is_first else None)[0]
        # The first rank stays away from the file: a process loses its lock with the first file of that name it closes.
        agreed(lambda: is_first or check_same_folder(save, nonce))
        yield
    finally:
        if held is not None:
            held.close()


def find_checkpoint(config: Config) -> Found:
    """The checkpoint that `--resume` means, verified byte by byte, each rank reading a share of its files.

    Collectives: one object gather for the search and one for each checkpoint tried, world.

    Raises:
        CheckpointError: on every rank alike, when the one asked for is missing or damaged.
    """
    if config.run.save is None:
        return Found()
    save, resume = Path(config.run.save), config.run.resume

    def search() -> tuple[list[Path], list[Path], str | None]:
        drafts, folders = commit.remove_drafts(save), commit.candidates(save, resume)
        return drafts, folders, commit.stray_pointer(save) if folders else None

    drafts, folders, said = gathered(lambda: search() if dist.get_rank() == 0 else None)[0]
    notes = [f"resume    ignored {draft.name}, which was never completed" for draft in drafts]
    if said is not None:
        notes.append(f"WARNING   resume: ignored {commit.LATEST_FILE}, which says {said!r} and not the newest step")
    checkpoint, problems = commit.first_sound(folders, resume, _verified)
    notes += [f"WARNING   resume: passed over a damaged checkpoint: {problem}" for problem in problems]
    if checkpoint is not None:
        notes.append(f"resume    from {checkpoint.folder}: step {checkpoint.iteration}")
    return Found(checkpoint, tuple(notes))


def _verified(folder: Path) -> Checkpoint:
    def check() -> Checkpoint:
        checkpoint = commit.read(folder)
        commit.check_hashes(checkpoint, sorted(checkpoint.files)[dist.get_rank() :: dist.get_world_size()])
        return checkpoint

    return agreed(check)


def start_run(config: Config, job: Job, found: Found) -> Start:
    """Where `job` starts: as assembled, or after the found checkpoint, whose state it then holds.

    The run's folder is left with this run's history alone: later checkpoints, and the metrics of another run, are
    renamed.

    Collectives: megatron's for loading, and one object gather, world.

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
        notes += _refuse_changes(checkpoint, now, override=config.run.override_on_resume)
        iteration, consumed_pairs = checkpoint.iteration, checkpoint.facts["consumed_pairs"]
        same_layout = checkpoint.facts["layout"] == now["layout"]
        read_state(job.model, job.trainer, iteration, checkpoint.folder, same_layout=same_layout)
        source = job.plan.sources.model
        if config.lora.lora_rank is None:
            notes.append(f"resume    weights are those of the checkpoint, not those in {source}")
        else:
            notes.append(f"resume    adapters are those of the checkpoint, on the weights in {source}")
        if not same_layout:
            notes.append("resume    another layout: dropout, if any, draws other numbers from here on")
    notes += gathered(lambda: _tidy(save, checkpoint) if dist.get_rank() == 0 else [])[0]
    monitors = checkpoint.facts.get("monitors", {}) if checkpoint is not None else {}
    return Start(iteration, consumed_pairs, tuple(notes), monitors)


def _tidy(save: Path, checkpoint: Checkpoint | None) -> list[str]:
    """What was renamed, so that the run's folder continues `checkpoint`, or starts anew."""
    moved = commit.set_aside_after(save, checkpoint.iteration if checkpoint else 0)
    metrics = save / METRICS_FILE
    if checkpoint is not None:
        saved = checkpoint.folder / METRICS_FILE
        commit.replace_text(metrics, saved.read_text(encoding="utf-8") if METRICS_FILE in checkpoint.files else "")
        commit.write_latest(save, checkpoint.iteration)
    elif metrics.exists() and metrics.stat().st_size > 0:
        moved.append(metrics.with_name(f"{METRICS_FILE}.aside-{uuid.uuid4().hex[:8]}"))
        os.rename(metrics, moved[-1])
    return [f"WARNING   moved aside {path.name}: it belongs to an earlier run" for path in moved]


def model_facts(description: ModelDescription) -> dict[str, Any]:
    """What a checkpoint says of its model, as JSON values."""
    shape = {**description.transformer, **description.gpt}
    return _as_json({"family": description.family, "vocab_size": description.vocab_size, **shape})


def _as_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    # Functions, such as an activation, by their names.
    return json.loads(json.dumps(facts, default=lambda value: getattr(value, "__name__", str(value))))


def describe_run(config: Config, job: Job) -> dict[str, Any]:
    """What a run is, as JSON values: what a resume compares, the layout, and all options."""
    description, options = job.plan.description, config.flat()
    identity = json.dumps(tokenizer_identity(job.tokenizer, config.pairs), sort_keys=True)
    training = ("hidden_dropout", "attention_dropout", "lora_dropout", "global_batch_size", "seed")
    schedule = {key: value for key, value in asdict(config.optimizer).items() if key != "epochs"}
    facts = {
        "model": {**model_facts(description), **_describe_adapters(config, job)},
        "precision": {key: options[key] for key in ("bf16", "use_distributed_optimizer")},
        "inputs": {
            "tokenizer": commit.hash_text(identity),
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
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
    }
    return _as_json(facts)


def _describe_adapters(config: Config, job: Job) -> dict[str, Any]:
    """What a checkpoint of adapters, which holds them alone, can be continued with.

    Collectives: one object broadcast, world, the first time.
    """
    lora = config.lora
    if lora.lora_rank is None:
        return {}
    own = {"lora_rank": lora.lora_rank, "lora_alpha": lora.lora_alpha, "lora_targets": lora.lora_targets}
    return {**own, "base_model": _fingerprint(job.plan.sources.model)}


@functools.cache
def _fingerprint(folder: Path) -> str:
    """Of a model that stays the same while the run lasts.

    Collectives: one object broadcast, world.
    """
    return on_first_rank(lambda: model_fingerprint(folder))


def _refuse_changes(checkpoint: Checkpoint, now: Mapping[str, Any], *, override: bool) -> list[str]:
    """The changes since `checkpoint` that `override` lets pass, as notes.

    Raises:
        CheckpointError: what must not change did; each field is named with both values.
    """
    fixed = _changes(checkpoint.facts, now, _NEVER_CHANGES)
    told = _changes(checkpoint.facts, now, _CHANGES_IF_TOLD)
    if fixed or (told and not override):
        shown = listed(fixed + told, _MAX_SHOWN, "; ")
        remedy = (
            "these cannot change within a run: start a new one in another folder"
            if fixed
            else "restore them, start a new run in another folder, or accept them with --override-on-resume"
        )
        raise CheckpointError(f"resume: {checkpoint.folder} is of another run: {shown}; {remedy}")
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
