"""Every layout of a model on a number of GPUs: those that fit, with their speed, and why the others do not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from simpo_megatron.config import Config, resolve
from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.parallel_sizes import ParallelSizes
from simpo_megatron.planning.gpus import ASSUMED, GIB, Gpu
from simpo_megatron.planning.memory import StageMemory, stage_memory
from simpo_megatron.planning.shapes import ModelShape, Pack
from simpo_megatron.planning.speed import StepTime, step_time, useful_flops
from simpo_megatron.planning.workload import Workload


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A request for a plan; `config` holds everything but the layout, whose sizes above 1 are kept as given."""

    description: ModelDescription
    config: Config
    num_gpus: int
    gpu: Gpu
    pack: Pack
    """The microbatch whose time a step is counted in."""
    largest: Pack | None = None
    """The microbatch that memory has to hold, where it is another."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that fits."""

    config: Config
    load: Workload
    memory: tuple[StageMemory, ...]
    """The memory of a rank of each pipeline stage."""
    time: StepTime
    tokens_per_microbatch: float
    """Mean tokens of a microbatch: a step's tokens, dealt evenly."""
    num_gpus: int
    gpu: Gpu

    @property
    def fullest(self) -> StageMemory:
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def tokens_per_step(self) -> float:
        """Over all GPUs."""
        return self.tokens_per_microbatch * self.load.num_microbatches * self.load.data_parallel_size

    @property
    def tokens_per_second(self) -> float:
        """Over all GPUs."""
        return self.tokens_per_step / self.time.total

    @property
    def utilization(self) -> float:
        """MFU (model FLOPs utilization): useful operations over the bf16 rate of all GPUs."""
        flops = useful_flops(self.load, self.tokens_per_microbatch) * self.load.data_parallel_size
        return flops / self.time.total / (self.num_gpus * self.gpu.bf16_flops)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A layout that cannot be run, and the reason in one line."""

    name: str
    reason: str
    too_many_bytes: float = 0.0
    """The bytes that the fullest rank needs, where that is the reason."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """All layouts that were examined: those that fit, fastest first, and the others."""

    job: PlanRequest
    candidates: tuple[Candidate, ...]
    refusals: tuple[Refusal, ...]

    @property
    def recommended(self) -> Candidate:
        """The layout with the most free GiB among those as fast as the fastest, within the estimate's error."""
        limit = self.candidates[0].time.total * (1 + ASSUMED.speed_error)
        equals = [candidate for candidate in self.candidates if candidate.time.total <= limit]
        return min(equals, key=lambda candidate: (round(candidate.fullest.total / GIB), candidate.time.total))


def survey(job: PlanRequest) -> Survey:
    """All layouts of `job`, each with the least recomputation that fits (or with what the configuration asks for)."""
    candidates: list[Candidate] = []
    refusals: list[Refusal] = []
    for layout in _layouts(job):
        answer = _try(job, layout)
        if isinstance(answer, Candidate):
            candidates.append(answer)
        else:
            refusals.append(answer)
    candidates.sort(key=lambda candidate: candidate.time.total)
    return Survey(job=job, candidates=tuple(candidates), refusals=tuple(refusals))


def fewest_gpus(job: PlanRequest, most: int = 512) -> Survey | None:
    """The survey of the smallest number of GPUs on which a layout of `job` fits; None if `most` are too few.

    Tries the divisors of a node's number of GPUs, then whole nodes.
    """
    per_node = job.gpu.per_node
    for num_gpus in (*_divisors(per_node), *range(2 * per_node, most + 1, per_node)):
        found = survey(replace(job, num_gpus=num_gpus))
        if found.candidates:
            return found
    return None


def plan_one(job: PlanRequest) -> Candidate:
    """The layout that the configuration states, unchanged.

    Raises:
        ConfigError: it cannot be run, or does not fit the GPUs' memory.
    """
    answer = _evaluate(job, job.config)
    if isinstance(answer, Refusal):
        raise ConfigError(f"{answer.name}: {answer.reason}")
    return answer


def layout_name(config: Config) -> str:
    """Such as `tp 8 pp 4 vpp 5`; sizes of 1 are left out, but for tp."""
    sizes = config.parallel.sizes
    named = {"pp": sizes.pipeline, "cp": sizes.context, "ep": sizes.expert, "vpp": sizes.virtual_pipeline or 1}
    return " ".join([f"tp {sizes.tensor}", *(f"{name} {size}" for name, size in named.items() if size > 1)])


def recomputation(config: Config) -> str:
    """The recomputation of a layout, in words."""
    recompute = config.recompute
    if recompute.recompute_granularity == "selective":
        return f"{' and '.join(recompute.recompute_modules)} recomputed"
    return "whole layers recomputed" if recompute.recompute_granularity == "full" else "nothing recomputed"


def _layouts(job: PlanRequest) -> Iterator[Config]:
    given, model = job.config.parallel, job.description.transformer
    num_layers = model["num_layers"]
    for tensor in _sizes(given.tensor_model_parallel_size, _divisors(job.gpu.per_node)):
        # Only as given: packs of whole pairs fit a rank, and no GPU has run it yet.
        context = given.context_parallel_size
        beside = job.num_gpus // (tensor * context)
        if beside == 0 or job.num_gpus % (tensor * context):
            continue
        for pipeline in _sizes(given.pipeline_model_parallel_size, _divisors(beside)):
            layers = num_layers // pipeline if num_layers % pipeline == 0 else 0
            virtual = _divisors(layers) if pipeline > 1 and layers > 1 else [1]
            if pipeline > num_layers:
                continue
            spread = _divisors(math.gcd(model.get("num_moe_experts", 1), job.num_gpus // pipeline))
            for expert in _sizes(given.expert_model_parallel_size, spread):
                for chunks in _sizes(given.virtual_pipeline_model_parallel_size or 1, virtual):
                    yield _with_layout(
                        job,
                        ParallelSizes(
                            tensor=tensor,
                            pipeline=pipeline,
                            virtual_pipeline=chunks if chunks > 1 else None,
                            context=context,
                            expert=expert,
                        ),
                    )


def _sizes(given: int, otherwise: list[int] | tuple[int, ...]) -> list[int] | tuple[int, ...]:
    return [given] if given > 1 else otherwise


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _with_layout(job: PlanRequest, sizes: ParallelSizes) -> Config:
    replicas = job.num_gpus // (sizes.tensor * sizes.pipeline)
    return replace(
        job.config,
        parallel=replace(
            job.config.parallel,
            tensor_model_parallel_size=sizes.tensor,
            pipeline_model_parallel_size=sizes.pipeline,
            virtual_pipeline_model_parallel_size=sizes.virtual_pipeline,
            context_parallel_size=sizes.context,
            expert_model_parallel_size=sizes.expert,
            sequence_parallel=sizes.tensor > 1,
            use_distributed_optimizer=replicas > 1,
            overlap_grad_reduce=replicas > 1,
            overlap_param_gather=replicas > 1,
        ),
    )


def _try(job: PlanRequest, config: Config) -> Candidate | Refusal:
    """`config` with the least recomputation that fits: none, core attention, MLPs with it, then whole layers."""
    mlp = "moe" if "num_moe_experts" in job.description.transformer else "mlp"
    if config.recompute.recompute_granularity is not None:
        return _evaluate(job, config)
    for options in (
        {},
        {"recompute_granularity": "selective"},
        {"recompute_granularity": "selective", "recompute_modules": ("core_attn", mlp)},
        {"recompute_granularity": "full"},
    ):
        answer = _evaluate(job, replace(config, recompute=replace(config.recompute, **options)))
        if isinstance(answer, Candidate):
            return answer
    return answer


def _evaluate(job: PlanRequest, config: Config) -> Candidate | Refusal:
    try:
        layout = resolve(config, world_size=job.num_gpus, model=job.description.transformer, machine=job.gpu.machine)
    except ConfigError as error:
        return Refusal(name=layout_name(config), reason="; ".join(map(str, error.parts or (error,))))
    dp = layout.data_parallel_size
    step_tokens = config.batch.global_batch_size * job.pack.pair_tokens
    multiple = layout.microbatch_multiple
    num_microbatches = math.ceil(math.ceil(step_tokens / job.pack.tokens / dp) / multiple) * multiple
    load = Workload(
        shape=ModelShape.of(job.description),
        config=config,
        pack=job.pack,
        data_parallel_size=dp,
        num_microbatches=num_microbatches,
    )
    fullest = replace(load, pack=job.largest or job.pack)
    memory = tuple(stage_memory(fullest, stage) for stage in range(load.sizes.pipeline))
    refusal = _too_much(job, config, memory)
    if refusal is not None:
        return refusal
    tokens = step_tokens / (dp * num_microbatches)
    return Candidate(
        config=config,
        load=load,
        memory=memory,
        time=step_time(load, tokens, job.gpu),
        tokens_per_microbatch=tokens,
        num_gpus=job.num_gpus,
        gpu=job.gpu,
    )


def _too_much(job: PlanRequest, config: Config, memory: tuple[StageMemory, ...]) -> Refusal | None:
    usable = job.gpu.memory_gib * ASSUMED.usable_memory * GIB
    stage, fullest = max(enumerate(memory), key=lambda entry: entry[1].total)
    if fullest.total <= usable:
        return None
    state = fullest.weights + fullest.gradients + fullest.optimizer
    work = fullest.activations + fullest.loss
    return Refusal(
        name=layout_name(config),
        reason=f"stage {stage} needs {fullest.total / GIB:.1f} GiB with {recomputation(config)} (weights, gradients "
        f"and optimizer {state / GIB:.1f}, activations and loss {work / GIB:.1f}); {usable / GIB:.1f} are usable",
        too_many_bytes=fullest.total,
    )
