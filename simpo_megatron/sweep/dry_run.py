"""The trials of a sweep before any is run: their number, steps, tokens, and the planner's time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from simpo_megatron.config import Config, num_train_iters
from simpo_megatron.data import PreferenceDataset, build_preference_dataset, load_tokenizer, split
from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore.families import describe_hf_model
from simpo_megatron.planning.gpus import GPUS
from simpo_megatron.planning.layouts import PlanRequest, plan_one
from simpo_megatron.planning.shapes import Pack
from simpo_megatron.sweep.points import Point
from simpo_megatron.sweep.request import Sweep
from simpo_megatron.training.start.inputs import Sources, locate_sources
from simpo_megatron.training.start.run_plan import with_adapter_settings

_MAX_SHOWN = 40


@dataclass(frozen=True)
class _Cost:
    """The size of one trial."""

    steps: int
    tokens: float
    """Real tokens, padding apart."""
    seconds: float | None
    """The planner's estimate; None if the layout does not fit these GPUs."""


def dry_run(sweep: Sweep, *, num_gpus: int, gpu: str) -> Iterator[str]:
    """The lines that describe what `sweep` would do. Tokenises the pairs, trains nothing.

    Raises:
        ConfigError, DataError, CheckpointError: as its first trial would.
    """
    sources = locate_sources(sweep.base)
    with tempfile.TemporaryDirectory() as scratch:
        dataset = _training_pairs(sweep.base, sources, sweep.base.data.data_cache or scratch)
        why = _why_not_planned(sweep.base, sources, dataset, num_gpus, gpu)
        full_steps, costs, shown = num_train_iters(sweep.base, len(dataset)), [], []
        # The number of a round's trials does not depend on which won before, so the first are taken as the winners.
        for number, one in enumerate(sweep.rounds(_in_order)):
            depends = "" if number == 0 else " (which ones the round before decides)"
            shown.append(f"round {number + 1}: {len(one.points)} trials{depends}")
            for point in one.points:
                config = sweep.config_of(point, sweep.steps_of(point, full_steps))
                cost = _cost(config, sources, dataset, num_gpus, gpu, planned=why is None)
                costs.append(cost)
                if number == 0 and len(shown) < _MAX_SHOWN:
                    shown.append(
                        f"  {point.folder}: {cost.steps:,} steps, {cost.tokens / 1e6:,.2f}M tokens{_time(cost)}"
                    )
        yield from shown
    total = f"in all    {len(costs)} trials, {sum(cost.steps for cost in costs):,} steps, "
    total += f"{sum(cost.tokens for cost in costs) / 1e6:,.2f}M tokens"
    yield total if why is not None else total + _time(_Cost(0, 0, sum(cost.seconds or 0 for cost in costs)))
    told = f"planned for {num_gpus} {gpu}, not measured" if why is None else f"none planned for {num_gpus} {gpu}: {why}"
    yield f"time      {told}; --gpus N --gpu KIND say others"


def _in_order(points: Sequence[Point]) -> list[Point]:
    return list(dict.fromkeys(point.setting for point in points))


def _training_pairs(config: Config, sources: Sources, cache: str) -> PreferenceDataset:
    dataset = build_preference_dataset(sources.train, load_tokenizer(sources.tokenizer), config.pairs, cache)
    if sources.valid or not config.data.valid_fraction:
        return dataset
    return split(dataset, config.data.valid_fraction, config.run.seed)[0]


def _request(config: Config, sources: Sources, dataset: PreferenceDataset, num_gpus: int, gpu: str) -> PlanRequest:
    prompt, chosen, rejected = dataset.lengths.mean(0)
    description = describe_hf_model(sources.model)
    return PlanRequest(
        description=description,
        config=with_adapter_settings(config, sources, description),
        num_gpus=num_gpus,
        gpu=GPUS[gpu],
        pack=Pack.of(config.batch, prompt=float(prompt), response=float(chosen + rejected) / 2),
    )


def _why_not_planned(
    config: Config, sources: Sources, dataset: PreferenceDataset, num_gpus: int, gpu: str
) -> str | None:
    try:
        plan_one(_request(config, sources, dataset, num_gpus, gpu))
    except ConfigError as error:
        return str(error)
    return None


def _cost(
    config: Config, sources: Sources, dataset: PreferenceDataset, num_gpus: int, gpu: str, *, planned: bool
) -> _Cost:
    request = _request(config, sources, dataset, num_gpus, gpu)
    steps = num_train_iters(config, len(dataset))
    tokens = request.pack.pair_tokens * steps * config.batch.global_batch_size
    return _Cost(steps, tokens, steps * plan_one(request).time.total if planned else None)


def _time(cost: _Cost) -> str:
    if cost.seconds is None:
        return ""
    if cost.seconds < 60:
        return f", {cost.seconds:.0f} s"
    if cost.seconds < 3600:
        return f", {cost.seconds / 60:.1f} min"
    return f", {cost.seconds / 3600:,.1f} h"
