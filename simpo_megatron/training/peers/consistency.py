"""Checks that all ranks run the same job, and that replicas hold bit-identical weights."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.distributed import ProcessGroup

import simpo_megatron
from simpo_megatron.config import Config
from simpo_megatron.convert.samples import files_of_model, sampled_digests
from simpo_megatron.errors import CheckpointError, NumericsError, ParallelError, listed
from simpo_megatron.mcore.fp8_weights import plain
from simpo_megatron.mcore.optimizer import gather_parameters
from simpo_megatron.parallel import ParallelGroups
from simpo_megatron.ranks import are_equal, gather_or_raise, raise_on_all_ranks, sync_status
from simpo_megatron.training.start.setup import Job

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_MAX_SHOWN = 6


def startup_facts(config: Config) -> dict[str, Any]:
    """Facts that every rank is started with: each option, the seed, and the versions of the code."""
    versions = {name: version(name) for name in ("torch", "megatron-core")}
    return {**config.flat(), "simpo_megatron": code_hash(), **versions}


def job_facts(job: Job) -> dict[str, Any]:
    """Facts that must be equal on every rank: the pairs, the model's shape, the number of steps."""
    validation = {f"validation {name}": dataset.fingerprint for name, dataset in job.valid_data.items()}
    description = job.plan.description
    return {
        "data": job.train_data.fingerprint,
        **validation,
        "num_pairs": len(job.train_data),
        "train_iters": job.train_iters,
        "family": description.family,
        "vocab_size": description.vocab_size,
        **description.transformer,
        **description.gpt,
        "rope_parameters": description.rope,
    }


def check_same(facts: Mapping[str, Any]) -> None:
    """Return if `facts` are the same on every rank.

    Collectives: one all-reduce of 16 bytes, world; when a fact differs, one object gather.

    Raises:
        ParallelError: on every rank alike, with each fact that differs and the ranks on which it does.
    """
    own = {name: _text(value) for name, value in facts.items()}
    if are_equal(repr(sorted(own.items()))):
        return
    every = gather_or_raise(lambda: own)
    # The value that most ranks share is taken as the right one.
    problems = [
        f"{name} is {_ranks_by_value([stated.get(name, 'not there') for stated in every])}"
        for name in sorted(set().union(*every))
        if len({stated.get(name) for stated in every}) > 1
    ]
    if problems:
        raise ParallelError(
            f"ranks: found different starts, expected the same on each: {listed(problems, _MAX_SHOWN, '; ')}; start "
            "all ranks with the same command, code and files"
        )


def _text(value: object) -> str:
    """The text of a fact; a function, such as an activation, by its name, as its address differs by process."""
    return str(getattr(value, "__qualname__", value))


def check_same_model(folders: Sequence[Path]) -> None:
    """Return if samples of the model's files in `folders`, its base first, are the same on every rank.

    Each rank reads its own slices: ranks that see different models would together train parts of each.

    Collectives: that of `raise_on_all_ranks` and one all-reduce of 16 bytes, world; when files differ, one object
    gather.

    Raises:
        CheckpointError: on every rank alike, a file cannot be read.
        ParallelError: on every rank alike, with the files that differ, and the ranks and folders in which they do.
    """
    own = raise_on_all_ranks(lambda: _digests(folders), wrap=CheckpointError)
    if are_equal(repr(sorted(own.items()))):
        return
    here = f"{socket.gethostname()}:{' + '.join(str(folder.resolve()) for folder in folders)}"
    every = gather_or_raise(lambda: (here, own))
    names = sorted(set().union(*(digests for _, digests in every)))
    differing = [name for name in names if len({digests.get(name) for _, digests in every}) > 1]
    shown = [
        f"{name} is {_ranks_by_value([digests.get(name, 'not there') for _, digests in every])}" for name in differing
    ]
    raise ParallelError(
        "model: found different files under one name, expected the same on each rank: "
        f"{listed(shown, _MAX_SHOWN, '; ')}; the folder is {_ranks_by_value([where for where, _ in every])}; give "
        "every rank the same model"
    )


def _digests(folders: Sequence[Path]) -> dict[str, str]:
    """The digests of all files, those of adapters under the number of their folder too."""
    return {
        _numbered(name, number): digest
        for number, folder in enumerate(folders)
        for name, digest in sampled_digests(folder).items()
    }


def _numbered(name: str, number: int) -> str:
    return f"{name} of adapters {number}" if number else name


@contextmanager
def unchanged_model(folders: Sequence[Path]) -> Iterator[None]:
    """While the context lasts, in which ranks read the model in `folders`, its files do not change.

    Ranks that read a file before and after a change would together train parts of two models.

    Collectives: those of two `raise_on_all_ranks`, world.

    Raises:
        CheckpointError: on every rank alike, with the files that did.
    """
    before = raise_on_all_ranks(lambda: _file_states(folders), wrap=CheckpointError)
    yield

    def compare() -> None:
        after = _file_states(folders)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        if changed:
            raise CheckpointError(
                f"model: found {listed(changed, _MAX_SHOWN)} of {folders[0]} changed while it was read, expected a "
                "whole model; start again once it is"
            )

    raise_on_all_ranks(compare, wrap=CheckpointError)


def _file_states(folders: Sequence[Path]) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of change of each file of the model in `folders`, links followed, by its name."""
    found: dict[str, tuple[int, int, int]] = {}
    for number, folder in enumerate(folders):
        weights, small = files_of_model(folder)
        for path in (*weights, *small):
            stat = path.stat()
            found[_numbered(path.name, number)] = stat.st_ino, stat.st_size, stat.st_mtime_ns
    return found


def check_replicas(chunks: Sequence[DistributedDataParallel], groups: ParallelGroups) -> None:
    """Return if every weight is finite and equals its replicas on other ranks, bit for bit.

    Data-parallel and context-parallel ranks hold replicas of every weight; tensor-parallel ranks of the weights that
    are not sharded. The experts of an MoE have their own groups. Replicas are compared by the sum of their bits;
    differences that cancel out exactly are missed.

    A tied embedding on the last pipeline stage is not compared with the one on the first.

    Collectives: one all-reduce of 16 bytes a weight over dp and cp, or over expert_dp, one over tp, and those of
    `sync_status`; under `overlap_param_gather` one all-gather of the weights before.

    Raises:
        NumericsError, ParallelError: on every rank alike, with a weight and its rank.
    """
    gather_parameters(chunks)
    weights = {name: weight for chunk in chunks for name, weight in _named_weights(chunk)}
    experts = {name: w for name, w in weights.items() if not getattr(w, "allreduce", True)}
    dense = {name: w for name, w in weights.items() if name not in experts}
    undivided = {name: w for name, w in dense.items() if not getattr(w, "tensor_model_parallel", False)}
    problems = [
        _not_finite(weights),
        _differing("data-parallel", groups.dp_cp, dense),
        _differing("expert-data-parallel", groups.expert_dp, experts),
        _differing("tensor-parallel", groups.tp, undivided),
    ]
    sync_status(next((problem for problem in problems if problem is not None), None))


def _named_weights(chunk: DistributedDataParallel) -> Iterable[tuple[str, Tensor]]:
    """The parameters, each under a name that no other chunk of this rank has."""
    stage = getattr(chunk.module, "vp_stage", None)
    prefix = "" if stage is None else f"chunk {stage} "
    return ((prefix + name, weight) for name, weight in chunk.module.named_parameters())


def _not_finite(weights: Mapping[str, Tensor]) -> NumericsError | None:
    # Much faster than isfinite() of every value: aminmax returns NaN if any value is NaN.
    extremes = [torch.stack(torch.aminmax(plain(weight))) for weight in weights.values()]
    are_finite = torch.stack([pair.isfinite().all() for pair in extremes]).tolist()
    bad = [name for name, is_finite in zip(weights, are_finite, strict=True) if not is_finite]
    if not bad:
        return None
    return NumericsError(
        f"weights: found {len(bad)} that are not finite, {bad[0]} first, expected finite ones; nothing was saved"
    )


def _differing(kind: str, group: ProcessGroup, weights: Mapping[str, Tensor]) -> ParallelError | None:
    """The error for replicas in `group` that differ, the same on each of its ranks."""
    if group.size() == 1 or not weights:
        return None
    names = list(weights)
    sums = torch.stack([_sum_of_bits(plain(weight).flatten()) for weight in weights.values()])
    extremes = torch.cat([sums, -sums])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = extremes[: len(names)], -extremes[len(names) :]
    differing = (largest != smallest).nonzero().flatten().tolist()
    if not differing:
        return None
    first = differing[0]
    every = gather_or_raise(lambda: int(sums[first]), group)
    ranks = [dist.get_global_rank(group, member) for member in range(group.size())]
    return ParallelError(
        f"weights: found {kind} replicas of {len(differing)} that differ, {names[first]} first; its checksum is "
        f"{_ranks_by_value([f'{value % 2**64:016x}' for value in every], ranks)}; start again from a sound one"
    )


def _sum_of_bits(weight: Tensor) -> Tensor:
    """The sum modulo 2**64 of a flat tensor's bits, read as 8-byte integers where its length allows."""
    size = weight.element_size()
    if weight.numel() * size % 8:
        return weight.view(_INTEGERS[size]).sum(dtype=torch.int64)
    is_aligned = weight.storage_offset() * size % 8 == 0
    return (weight if is_aligned else weight.clone()).view(torch.int64).sum()


def _ranks_by_value(values: Sequence[str], ranks: Sequence[int] | None = None) -> str:
    """`43 on rank 1, 42 on ranks 0, 2, 3`: the rarest value first, a value in full up to 60 characters."""
    holders: dict[str, list[int]] = {}
    for rank, value in zip(ranks or range(len(values)), values, strict=True):
        holders.setdefault(value, []).append(rank)
    parts = []
    for value, where in sorted(holders.items(), key=lambda entry: (len(entry[1]), -entry[1][0])):
        # The end of a path tells more than its middle.
        shown = value if len(value) <= 60 else f"{value[:20]}...{value[-37:]}"
        parts.append(f"{shown} on rank{'s' if len(where) > 1 else ''} {listed(where, _MAX_SHOWN)}")
    return listed(parts, _MAX_SHOWN)


def code_hash() -> str:
    """16 hex digits of the package's own source, as this rank sees it."""
    package, sha256 = Path(simpo_megatron.__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        sha256.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return sha256.hexdigest()[:16]
