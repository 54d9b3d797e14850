"""Log-probabilities of every pair by the model that training starts from, computed once and kept.

An objective with a reference needs two numbers of it per pair. They are computed with the weights that are loaded
anyway, so no second model is ever in memory.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from simpo_megatron.atomic import new_file
from simpo_megatron.checkpoint.fingerprint import model_fingerprint
from simpo_megatron.config import Config
from simpo_megatron.data import PreferenceDataset
from simpo_megatron.data.batching import StepPlan
from simpo_megatron.errors import DataError, NumericsError
from simpo_megatron.logs import LOGGER
from simpo_megatron.mcore import device
from simpo_megatron.mcore.attention.rotary import scaled_frequencies
from simpo_megatron.ranks import on_first_rank, raise_on_all_ranks, sync_status
from simpo_megatron.training.peers.consistency import code_hash
from simpo_megatron.training.start.inputs import cache_folder, hashes_file
from simpo_megatron.training.start.setup import Job, fill_initial_weights
from simpo_megatron.training.step import Trainer, gather_averages, log_probs_of

FORMAT_VERSION = 1
_SECONDS_BETWEEN_LINES = 30.0


def with_reference(config: Config, job: Job, *, has_initial_weights: bool) -> tuple[Job, tuple[str, ...]]:
    """(`job`, with reference log-probs in its pairs if the objective needs them; a line on what was computed or read).

    Log-probs are read from the cache beside the tokenised data. Missing ones are computed and stored there.

    Args:
        has_initial_weights: whether the model holds them; they are loaded otherwise, if anything is to be computed.

    Collectives: those of `on_first_rank`, and for each set of pairs of `raise_on_all_ranks` and one broadcast, world;
    those of one forward pass over the pairs that were not in the cache, and one all-reduce of 8 bytes a pair over dp.

    Raises:
        DataError: on every rank alike, when the cache cannot be read or written.
        NumericsError: on every rank alike, when a log-prob is not finite.
    """
    if not job.trainer.objective.needs_reference:
        return job, ()
    is_first = dist.get_rank() == 0
    memory = hashes_file(config)
    model = on_first_rank(lambda: "+".join(_fingerprints(job, memory)))
    computation = _computation(config, job, model)
    notes: list[str] = []

    def with_cached_logps(dataset: PreferenceDataset) -> PreferenceDataset:
        nonlocal has_initial_weights
        path = _cache_path(config, {**computation, "data": dataset.fingerprint})
        avg = _broadcast(raise_on_all_ranks(lambda: _read(path, len(dataset)) if is_first else None), len(dataset))
        if avg is not None:
            notes.append(f"reference {len(dataset)} pairs, from {path}")
            return dataset.with_reference(avg)
        if not has_initial_weights:
            _load_initial_weights(job)
            has_initial_weights = True
        started = time.perf_counter()
        avg = reference_log_probs(job.trainer, dataset)
        raise_on_all_ranks(lambda: _write(path, avg) if is_first else None)
        seconds = time.perf_counter() - started
        notes.append(f"reference {len(dataset)} pairs in {seconds:.1f} s with the initial weights, kept in {path}")
        return dataset.with_reference(avg)

    train_data = with_cached_logps(job.train_data)
    valid_data = {name: with_cached_logps(dataset) for name, dataset in job.valid_data.items()}
    return replace(job, train_data=train_data, valid_data=valid_data, reference_model=model), tuple(notes)


def reference_log_probs(trainer: Trainer, dataset: PreferenceDataset) -> np.ndarray:
    """float32 [num_pairs, 2]: average log-probs, nats per token, of each pair's responses under the present weights.

    Each data-parallel rank computes its share; the result is the same on every rank.

    Collectives: those of one forward pass for each global batch, and of `gather_averages`.

    Raises:
        NumericsError: a log-prob is not finite.
    """
    plans = _with_progress(trainer.plan_evaluation(dataset), len(dataset))
    found = gather_averages(trainer, log_probs_of(trainer, dataset, plans), len(dataset))
    bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if len(bad):
        raise NumericsError(
            f"reference: found log-probs {found[bad[0]].tolist()} of pair {bad[0]} by the initial model, expected "
            "finite numbers; check its weights and the precision"
        )
    return found


def _with_progress(plans: Sequence[StepPlan], num_pairs: int) -> Iterator[StepPlan]:
    """The plans, with a progress line from time to time: a large model takes minutes."""
    done, last = 0, time.monotonic()
    for plan in plans:
        if dist.get_rank() == 0 and time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            LOGGER.info("reference: %d of %d pairs", done, num_pairs)
            last = time.monotonic()
        yield plan
        done += sum(len(microbatch) for rank in plan for microbatch in rank)


def _cache(config: Config) -> Path:
    return cache_folder(config) / "reference"


def _load_initial_weights(job: Job) -> None:
    fill_initial_weights(job.model, job.plan, job.trainer.groups)


def _fingerprints(job: Job, memory: Path) -> list[str]:
    return [model_fingerprint(folder, memory) for folder in job.plan.sources.folders]


def _computation(config: Config, job: Job, model: str) -> dict[str, Any]:
    """Everything but the pairs that a log-prob depends on; layouts round differently and are left out."""
    description = job.plan.description
    # Those of a longrope model depend on the longest sequence.
    rotary = scaled_frequencies(description.hf_config, config.pairs.max_length)
    return {
        "format": FORMAT_VERSION,
        "code": code_hash(),
        "megatron-core": version("megatron-core"),
        "model": model,
        # Beside the weights of Megatron-LM there is none that the fingerprint could have.
        "hf_config": description.hf_config,
        "rotary": None if rotary is None else [rotary.attention_factor, *rotary.inverse.tolist()],
        "precision": asdict(config.precision),
    }


def _cache_path(config: Config, identity: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return _cache(config) / f"{digest[:24]}.npy"


def _read(path: Path, num_pairs: int) -> np.ndarray | None:
    """The averages that the cache holds, if any."""
    if not path.exists():
        return None
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}), expected reference log-probs; delete it to compute it again"
        ) from None
    if found.shape != (num_pairs, 2) or found.dtype != np.float32 or not np.isfinite(found).all():
        raise DataError(
            f"{path}: found {found.dtype} {list(found.shape)}, expected finite float32 [{num_pairs}, 2]; delete it to "
            "compute it again"
        )
    return found


def _broadcast(found: np.ndarray | None, num_pairs: int) -> np.ndarray | None:
    """Rank 0's averages, on every rank: float32 [num_pairs, 2], or None.

    Collectives: one all-reduce of 32 bytes and, unless None, one broadcast, world.
    """
    if not sync_status(None, int(found is not None)):
        return None
    averages = torch.zeros(num_pairs, 2) if found is None else torch.from_numpy(found)
    averages = averages.to(device.current_device())
    dist.broadcast(averages, src=0)
    return averages.cpu().numpy()


def _write(path: Path, averages: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as draft, draft.open("wb") as file:
            np.save(file, averages)
    except OSError as error:
        raise DataError(
            f"data_cache: found {path}, which cannot be written ({error.strerror}); name another folder"
        ) from None
