"""Weights in FP8 under megatron's real DDP and distributed optimizer, on two data-parallel ranks.

`fp8_weights_worker.py FOLDER`: FOLDER/model is a Hugging Face folder in bf16. The FP8 tensors are stand-ins
(tests/fp8_stand_in.py): Transformer Engine's need a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

from simpo_megatron.mcore import cpu_patches

cpu_patches.install()

import fp8_stand_in  # noqa: E402

fp8_stand_in.install()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from fp8_stand_in import StandIn, keep_layer_in_fp8, quantised  # noqa: E402
from layout_worker import ListDataset  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from simpo_megatron import parallel  # noqa: E402
from simpo_megatron.checkpoint.manifest import Checkpoint, digest_file  # noqa: E402
from simpo_megatron.checkpoint.save_strategy import SaveStrategy  # noqa: E402
from simpo_megatron.checkpoint.sharded_state import read_state, read_weights  # noqa: E402
from simpo_megatron.checkpoint.writer import begin_write  # noqa: E402
from simpo_megatron.config import Machine, config_from, resolve  # noqa: E402
from simpo_megatron.convert import export_hf, load_hf_weights  # noqa: E402
from simpo_megatron.mcore.families import describe_hf_model  # noqa: E402
from simpo_megatron.mcore.fp8_weights import awaited_values, whole_masters  # noqa: E402
from simpo_megatron.mcore.model import build_model, zero_weights  # noqa: E402
from simpo_megatron.training.peers.consistency import check_replicas  # noqa: E402
from simpo_megatron.training.start.setup import build_trainer  # noqa: E402
from simpo_megatron.training.step import Trainer, batch_options, train_step  # noqa: E402

OPTIONS = {
    "data": ("none",), "use_distributed_optimizer": True, "global_batch_size": 8, "tokens_per_microbatch": 128,
    "lr": 1e-4, "lr_warmup_fraction": 0.0,
}  # fmt: skip
FP8 = {"fp8_recipe": "tensorwise", "fp8_param_gather": True}
# The recipe keeps the first and the last of four layers in bf16.
FP8_LAYERS = (1, 2)
GPU = Machine(has_cuda=True, has_transformer_engine=True, compute_capability=(9, 0))


class Job:
    """Everything that is the same for each model of this worker."""

    def __init__(self, folder: Path, groups: parallel.ParallelGroups, *, overlap: bool) -> None:
        self.folder, self.groups, self.description = folder, groups, describe_hf_model(folder / "model")
        options = {**OPTIONS, "model": str(folder / "model")}
        options |= {"overlap_grad_reduce": True, "overlap_param_gather": True} if overlap else {}
        self.plain, self.fp8 = config_from(**options), config_from(**options, **FP8)
        self.layout = resolve(self.fp8, world_size=2, model=self.description.transformer, machine=GPU)
        random = np.random.default_rng(7)
        lengths = random.integers(3, 20, size=(16, 3))
        self.data = ListDataset([[random.integers(3, 250, size=n).tolist() for n in pair] for pair in lengths])

    def model(self, config):
        chunks = build_model(self.description, config, self.groups)
        for number in FP8_LAYERS if config.precision.fp8_param_gather else ():
            keep_layer_in_fp8(chunks[0].decoder.layers[number])
        return chunks

    def loaded(self, config):
        chunks = self.model(config)
        load_hf_weights(chunks, self.folder / "model", self.description, tp_rank=0, tp_size=1)
        return chunks

    def trainer(self, chunks) -> Trainer:
        options = batch_options(self.fp8, self.layout, pad_id=0)
        return build_trainer(chunks, self.fp8, self.groups, self.layout, options, train_iters=10)

    def step(self, trainer: Trainer, number: int) -> None:
        train_step(trainer, self.data, trainer.plan_step(self.data, 8 * number))
        check_replicas(trainer.chunks, self.groups)


def fp8_weights(chunks) -> dict[str, StandIn]:
    found = {name: weight for name, weight in chunks[0].named_parameters() if isinstance(weight, StandIn)}
    assert len(found) == 4 * len(FP8_LAYERS)
    return found


def check_masters(chunks, trainer: Trainer, expected: dict[str, torch.Tensor]) -> None:
    """This rank's fp32 masters are, bit for bit, its part of the `expected` values, and all ranks' parts all of it."""
    (single,) = trainer.optimizer.chained_optimizers
    num_held = 0
    for name, weight in fp8_weights(chunks).items():
        if getattr(weight, "main_param", None) is not None:
            part = single._get_model_param_range_map(weight)["param"]
            assert weight.main_param.dtype is torch.float32
            assert torch.equal(weight.main_param, expected[name].float().flatten()[part.start : part.end]), name
            num_held += part.size
    total = torch.tensor(num_held)
    dist.all_reduce(total)
    assert int(total) == sum(weight.numel() for weight in fp8_weights(chunks).values())


def check_values(chunks, values: dict[str, torch.Tensor]) -> None:
    """Each FP8 weight is what quantising its whole bf16 `values` at once makes."""
    for name, weight in fp8_weights(chunks).items():
        data, scale_inv = quantised(values[name], values[name].abs().max())
        assert torch.equal(weight._data, data) and torch.equal(weight._scale_inv, scale_inv), name
        assert torch.equal(weight._transpose, data.t()), f"{name}: the transposed copy, of which gradients are made"


def masters_by_name(chunks, trainer: Trainer) -> dict[str, torch.Tensor]:
    masters = whole_masters(trainer.optimizer)
    return {name: masters[weight] for name, weight in fp8_weights(chunks).items()}


def main(folder: Path) -> None:
    groups = parallel.initialize(parallel.ParallelSizes(), backend="gloo", timeout_minutes=3)
    for overlap in (False, True):
        job = Job(folder, groups, overlap=overlap)
        parallel.seed_everything(1)
        in_file = {name: weight.detach() for name, weight in job.loaded(job.plain)[0].named_parameters()}
        stored = load_file(folder / "model/model.safetensors")
        proj = "model.layers.1.self_attn.o_proj.weight"
        assert torch.equal(in_file["decoder.layers.1.self_attention.linear_proj.weight"], stored[proj])

        chunks = job.loaded(job.fp8)
        trainer = job.trainer(chunks)
        check_masters(chunks, trainer, in_file)
        check_values(chunks, in_file)
        assert not any(hasattr(weight, "_high_precision_init_val") for weight in fp8_weights(chunks).values())

        before = {name: weight._data.clone() for name, weight in fp8_weights(chunks).items()}
        for number in range(2):
            job.step(trainer, number)
            check_values(chunks, masters_by_name(chunks, trainer))
        after = masters_by_name(chunks, trainer)
        for name, weight in fp8_weights(chunks).items():
            assert not torch.equal(after[name], in_file[name]) and not torch.equal(weight._data, before[name]), name

        check_resume(job, chunks, trainer, folder / f"checkpoint {overlap}")
        check_export(job, chunks, trainer, folder / f"exported {overlap}")
    parallel.shut_down()


def check_resume(job: Job, chunks, trainer: Trainer, saved: Path) -> None:
    """A fresh run continues from the checkpoint bit for bit, and one without FP8 weights finds the masters in it."""
    if dist.get_rank() == 0:
        saved.mkdir()
    dist.barrier()
    begin_write(trainer.state, 2, saved, SaveStrategy(trainer.groups.dp_cp), in_background=False).finish()
    masters = masters_by_name(chunks, trainer)

    resumed = job.model(job.fp8)
    zero_weights(resumed)
    again = job.trainer(resumed)
    files = {path.name: digest_file(path) for path in saved.iterdir()}
    read_state(again.state, Checkpoint(saved, 2, {}, files), same_layout=True)
    check_masters(resumed, again, {name: w.float() for name, w in exact_masters(chunks, trainer).items()})
    check_values(resumed, masters)
    for one in (trainer, again):
        job.step(one, 2)
    for (name, weight), (_, other) in zip(chunks[0].named_parameters(), resumed[0].named_parameters(), strict=True):
        pair = [w._data if isinstance(w, StandIn) else w for w in (weight, other)]
        assert torch.equal(*pair), name

    plain, fresh = job.model(job.plain), job.model(job.fp8)
    for model in (plain, fresh):
        read_weights(model, job.groups, saved)
    awaited = awaited_values(fresh)
    for name, weight in fp8_weights(fresh).items():
        assert torch.equal(plain[0].get_parameter(name), masters[name]), name
        assert torch.equal(awaited[weight], masters[name]), name


def exact_masters(chunks, trainer: Trainer) -> dict[str, torch.Tensor]:
    """Each FP8 weight's masters in fp32, put together in this test's own way."""
    (single,) = trainer.optimizer.chained_optimizers
    whole = {}
    for name, weight in fp8_weights(chunks).items():
        parts = [None, None]
        held = getattr(weight, "main_param", None)
        start = None if held is None else single._get_model_param_range_map(weight)["param"].start
        dist.all_gather_object(parts, (start, None if held is None else held.detach()))
        values = [values for start, values in sorted((p for p in parts if p[0] is not None), key=lambda p: p[0])]
        whole[name] = torch.cat(values).view(weight.shape)
    return whole


def check_export(job: Job, chunks, trainer: Trainer, folder: Path) -> None:
    """Checks that an export holds the fp32 masters in bf16, not the FP8 weights."""
    model, groups = job.folder / "model", job.groups
    masters = whole_masters(trainer.optimizer)
    export_hf(chunks, job.description, model, folder, groups=groups, in_place_of=masters)
    dist.barrier()
    read = job.model(job.plain)
    load_hf_weights(read, folder, job.description, tp_rank=0, tp_size=1)
    exact = exact_masters(chunks, trainer)
    for name, weight in fp8_weights(chunks).items():
        found = read[0].get_parameter(name)
        assert torch.equal(found, exact[name].bfloat16()), name
        assert not torch.equal(found, weight.dequantize()), name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
