"""Hooks that checkpoint_worker.py puts into a rank before its run: records of its work, and faults.

To be imported after `cpu_patches.install()`.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup

from simpo_megatron.checkpoint import manifest
from simpo_megatron.checkpoint.save_strategy import SaveStrategy
from simpo_megatron.checkpoint.writer import begin_write
from simpo_megatron.errors import SimPOError
from simpo_megatron.training import loop
from simpo_megatron.training.peers.watchdog import Watchdog
from simpo_megatron.training.step import passes as step

_CLONE_NEWNS = 0x20000


def record_pairs(path: Path) -> None:
    """Write the pairs of each training step, sorted, as a line of `path`."""
    plan_step = step.Trainer.plan_step

    def recorded(self, dataset, consumed_pairs):
        plan = plan_step(self, dataset, consumed_pairs)
        pairs = sorted(index for rank in plan for microbatch in rank for index in microbatch)
        with path.open("a") as file:
            file.write(json.dumps([consumed_pairs, pairs]) + "\n")
        return plan

    step.Trainer.plan_step = recorded


def write_after_start(target: Path) -> None:
    start_run = loop.start_run

    def start_and_write(config, job, found):
        start = start_run(config, job, found)
        target.mkdir(exist_ok=True)
        begin_write(
            job.trainer.state, start.iteration, target, SaveStrategy(job.trainer.groups.dp_cp), in_background=False
        ).finish()
        return start

    loop.start_run = start_and_write


def disturb_weight(nth: int) -> None:
    start_run, train_step, count = loop.start_run, loop.train_step, 0

    def disturb(model):
        with torch.no_grad():
            dict(model[0].named_parameters())["decoder.final_layernorm.weight"][3] += 1e-3

    def start_and_disturb(config, job, found):
        start = start_run(config, job, found)
        if nth == 0:
            disturb(job.model)
        return start

    def step_and_disturb(trainer, *arguments):
        nonlocal count
        count += 1
        done = train_step(trainer, *arguments)
        if count == nth:
            disturb([trainer.chunks[0].module])
        return done

    loop.start_run, loop.train_step = start_and_disturb, step_and_disturb


def spoil_gradient(nth: int) -> None:
    run_pass, count = step.run_pass, 0

    def spoilt(trainer, *arguments, **options):
        nonlocal count
        computed = run_pass(trainer, *arguments, **options)
        count += 1
        if count == nth:
            next(trainer.chunks[0].parameters()).main_grad.view(-1)[5] = float("inf")
        return computed

    step.run_pass = spoilt


def shorten_plan(rank: int, nth: int) -> None:
    train_step, count = loop.train_step, 0

    def short_step(trainer, dataset, plan, *arguments):
        nonlocal count
        count += 1
        if count == nth:
            plan = [list(microbatches) for microbatches in plan]
            plan[rank] = plan[rank][:-1]
        return train_step(trainer, dataset, plan, *arguments)

    loop.train_step = short_step


def halve_sums_of_gradients(swap: bool) -> None:
    all_reduce, start_grad_sync = torch.distributed.all_reduce, BucketGroup.start_grad_sync

    def in_halves(tensor, *arguments, **options):
        halves = tensor.split(tensor.numel() // 2)
        for half in halves[::-1] if swap else halves:
            handle = all_reduce(half, *arguments, **options)
        return handle

    def start_in_halves(self, *arguments, **options):
        torch.distributed.all_reduce = in_halves
        try:
            return start_grad_sync(self, *arguments, **options)
        finally:
            torch.distributed.all_reduce = all_reduce

    BucketGroup.start_grad_sync = start_in_halves


def note_phases(file: Path) -> None:
    enter_phase = Watchdog.enter_phase

    def noted(self, name, *, timeout):
        enter_phase(self, name, timeout=timeout)
        file.touch()

    Watchdog.enter_phase = noted


def compare_state_of_steps() -> None:
    train_step = loop.train_step

    def state_of(trainer):
        states = trainer.optimizer.chained_optimizers[0].optimizer.state.values()
        moments = [value for state in states for _, value in sorted(state.items())]
        weights = [weight for chunk in trainer.chunks for weight in chunk.parameters()]
        schedule = json.dumps(trainer.scheduler.state_dict())
        return [[tensor.detach().clone() for tensor in part] for part in (weights, moments)], schedule

    def compared(trainer, *arguments):
        before, schedule = state_of(trainer)
        try:
            return train_step(trainer, *arguments)
        except SimPOError:
            after, schedule_after = state_of(trainer)
            weights, moments = (
                [torch.equal(one, other) for one, other in zip(*parts, strict=True)]
                for parts in zip(before, after, strict=True)
            )
            same = schedule == schedule_after and all(weights + moments)
            print(f"{len(weights)} weights, {len(moments)} moments and the schedule are as before: {same}", flush=True)
            raise

    loop.train_step = compared


def signal_at_step(nth: int, names: list[str]) -> None:
    train_step, count = loop.train_step, 0

    def signalled(*arguments):
        nonlocal count
        count += 1
        for name in names if count == nth else []:
            os.kill(os.getpid(), signal.Signals[name])
        return train_step(*arguments)

    loop.train_step = signalled


def signal_store_at_step(nth: int, name: str, with_rank: bool = False) -> None:
    """To the process of rank 0 that keeps the ranks' store, and to rank 0; the former is killed a while later."""
    train_step, count = loop.train_step, 0

    def signalled(*arguments):
        nonlocal count
        count += 1
        if count == nth:
            (store,) = psutil.Process().children()
            store.send_signal(signal.Signals[name])
            subprocess.Popen(["sh", "-c", f"sleep 40; kill -KILL {store.pid} 2>/dev/null"], start_new_session=True)
            if with_rank:
                os.kill(os.getpid(), signal.Signals[name])
        return train_step(*arguments)

    loop.train_step = signalled


def remove_at_step(nth: int, folder: Path) -> None:
    do_at_step(nth, lambda: shutil.rmtree(folder))


def mount_for_this_process_alone() -> None:
    """Hide from all others what this process and its children mount from now on; for root."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def make_read_only_at_step(nth: int, folder: Path) -> None:
    def mount() -> None:
        # Over the folder: where a file of it is open to be written, as the metrics are, it cannot become read-only.
        subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)

    do_at_step(nth, mount)


def do_at_step(nth: int, work: Callable[[], Any]) -> None:
    train_step, count = loop.train_step, 0

    def stepped(*arguments):
        nonlocal count
        count += 1
        if count == nth:
            work()
        return train_step(*arguments)

    loop.train_step = stepped


def limit_memory(num_bytes: int) -> None:
    probe_memory = loop.probe_memory

    def probe_within_limit(*arguments):
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + num_bytes, mapped + num_bytes))
        return probe_memory(*arguments)

    loop.probe_memory = probe_within_limit


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rename_tensor(checkpoint: Path, old: str, new: str) -> None:
    """Renames a tensor in a committed checkpoint, as if a model with another name for it had written it."""
    saved, path = manifest.read(checkpoint), checkpoint / ".metadata"
    index = pickle.loads(path.read_bytes())
    index.state_dict_metadata[new] = index.state_dict_metadata.pop(old)
    index.storage_data = {
        replace(place, fqn=new) if place.fqn == old else place: where for place, where in index.storage_data.items()
    }
    path.write_bytes(pickle.dumps(index))
    manifest._seal(checkpoint, replace(saved, files={**saved.files, path.name: manifest.digest_file(path)}))


def hold_writer(pattern: str, iteration: int, seconds: float, metrics: Path) -> None:
    sought = f'{{"iteration": {iteration},'

    def hook(name: str, arguments: tuple) -> None:
        if name == "open" and re.search(pattern, str(arguments[0])):
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and sought not in metrics.read_text():
                time.sleep(0.01)

    sys.addaudithook(hook)


def fill_disk(pattern: str) -> None:
    def hook(name: str, arguments: tuple) -> None:
        if name == "open" and re.search(pattern, str(arguments[0])):
            Path(arguments[0]).symlink_to("/dev/full")

    sys.addaudithook(hook)


def signal_at(event: str, pattern: str, nth: int, signal_name: str = "SIGKILL") -> None:
    count = 0

    def hook(name: str, arguments: tuple) -> None:
        nonlocal count
        if name == event and re.search(pattern, repr(arguments)):
            count += 1
            if count == nth:
                os.kill(os.getpid(), signal.Signals[signal_name])

    sys.addaudithook(hook)
