"""The run: evaluate, step, log, evaluate again, export. The only loop over steps."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from simpo_megatron import parallel
from simpo_megatron.config import Config, lint, to_table
from simpo_megatron.convert.hf import export_hf
from simpo_megatron.mcore import device
from simpo_megatron.mcore.optimizer import gather_parameters
from simpo_megatron.training.assembly import Job, assemble, plan_run
from simpo_megatron.training.evaluation import evaluate
from simpo_megatron.training.loggers import RunLog, open_run_log
from simpo_megatron.training.metrics import reduce_sums, throughput
from simpo_megatron.training.step import Pass, train_step

# Everything a rank does alone, such as tokenising for the others, must fit into a wait of the others.
_GROUP_TIMEOUT_MINUTES = 60.0


def train(config: Config) -> None:
    """Run `config` on the ranks that torchrun started.

    Raises:
        SimPOError: whatever the user can mend; what the configuration alone tells, before any collective.
    """
    device.install()
    plan = plan_run(config, int(os.environ.get("WORLD_SIZE", 1)))
    groups = parallel.initialize(
        config.parallel.sizes, backend=device.backend(), timeout_minutes=_GROUP_TIMEOUT_MINUTES
    )
    parallel.seed_everything(config.run.seed)
    job = assemble(config, plan, groups)
    is_logging_rank = dist.get_rank() == 0
    with open_run_log(config, train_iters=job.train_iters, is_logging_rank=is_logging_rank) as log:
        _introduce(config, job, log)
        _evaluate(job, log, iteration=0)
        _run_steps(config, job, log)
        _finish(config, job, log)
    parallel.shut_down()


def _introduce(config: Config, job: Job, log: RunLog) -> None:
    """Say what will run, on what, and what looks doubtful."""
    log.say(to_table(config))
    for warning in lint(config):
        log.say(f"WARNING {warning}")
    for line in describe_job(config, job):
        log.say(line)


def describe_job(config: Config, job: Job) -> list[str]:
    """What was found: the model, the pairs, the ranks and the steps, a line each."""
    description, sizes = job.plan.description, config.parallel.sizes
    shape = description.transformer
    vocabulary = f"{description.vocab_size} ids"
    padded = job.trainer.chunks[0].module.vocab_size
    if padded != description.vocab_size:
        vocabulary += f" padded to {padded} for tp {sizes.tensor} (padding is masked out of the softmax)"
    held_out = f", {len(job.valid_data)} held out" if job.valid_data is not None else ", none held out"
    batch = job.trainer.batch_options
    return [
        f"model     {description.family} from {job.plan.sources.model}: {shape['num_layers']} layers, hidden "
        f"{shape['hidden_size']}, {vocabulary}",
        f"pairs     {len(job.train_data)} to train on{held_out}",
        f"ranks     {dist.get_world_size()} ({device.backend()}): tp {sizes.tensor} x pp {sizes.pipeline} x cp "
        f"{sizes.context} x dp {job.plan.layout.data_parallel_size}",
        f"steps     {job.train_iters} of {batch.global_batch_size} pairs",
    ]


def _run_steps(config: Config, job: Job, log: RunLog) -> None:
    trainer, run = job.trainer, config.run
    window = _Window()
    for iteration in range(1, job.train_iters + 1):
        plan = trainer.plan_step(job.train_data, (iteration - 1) * trainer.batch_options.global_batch_size)
        computed, grad_norm, learning_rate = train_step(trainer, job.train_data, plan)
        window.add(computed)
        if iteration % run.log_interval == 0 or iteration == job.train_iters:
            metrics = window.close(trainer.groups)
            log.step(iteration, metrics | {"grad_norm": grad_norm, "learning_rate": learning_rate})
        else:
            log.advance(iteration)
        if run.eval_interval and iteration % run.eval_interval == 0 and iteration < job.train_iters:
            _evaluate(job, log, iteration)
            window.restart_clock()


class _Window:
    """The passes since the last log line, and how long they took."""

    def __init__(self) -> None:
        self._passes: list[Pass] = []
        self._started = time.perf_counter()

    def add(self, computed: Pass) -> None:
        self._passes.append(computed)

    def restart_clock(self) -> None:
        self._started = time.perf_counter()

    def close(self, groups: parallel.ParallelGroups) -> dict[str, float]:
        """Means and speed over the window's pairs, which is empty afterwards.

        Collectives: those of `reduce_sums`.
        """
        num_pairs = sum(computed.num_pairs for computed in self._passes)
        num_tokens = sum(computed.num_tokens for computed in self._passes)
        sums = [sums for computed in self._passes for sums in computed.sums]
        means = reduce_sums(sums, num_pairs, groups)
        seconds = time.perf_counter() - self._started
        self._passes = []
        self.restart_clock()
        return means | throughput(num_pairs=num_pairs, num_tokens=num_tokens, seconds=seconds)


def _evaluate(job: Job, log: RunLog, iteration: int) -> None:
    if job.valid_data is not None:
        log.evaluation(iteration, evaluate(job.trainer, job.valid_data))


def _finish(config: Config, job: Job, log: RunLog) -> None:
    """The last evaluation, the model for Hugging Face, and where everything lies."""
    _evaluate(job, log, job.train_iters)
    if config.model.export_hf is not None:
        gather_parameters(job.trainer.chunks)
        export_hf(
            job.model,
            job.plan.description,
            job.plan.sources.model,
            config.model.export_hf,
            groups=job.trainer.groups,
            dtype=torch.bfloat16 if config.precision.bf16 else torch.float32,
        )
        log.say(f"model     {config.model.export_hf} (AutoModelForCausalLM loads it)")
