"""Read converted checkpoints under parallel layouts, by this package and by megatron-core alone, and write some.

`offline_worker.py FOLDER`: FOLDER/job.json names the layouts, and as runs which model meets which. FOLDER/<model> is a
Hugging Face folder, FOLDER/<model>.megatron its conversion. Each run leaves FOLDER/<model>.<layout>, a checkpoint of
the same weights.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from argparse import Namespace
from pathlib import Path

from simpo_megatron.mcore import cpu_patches

cpu_patches.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor  # noqa: E402
from ranks import leave_groups  # noqa: E402

from simpo_megatron import parallel  # noqa: E402
from simpo_megatron.checkpoint import manifest  # noqa: E402
from simpo_megatron.checkpoint.initial_weights import fill_model, fill_weights  # noqa: E402
from simpo_megatron.checkpoint.model_source import find_model  # noqa: E402
from simpo_megatron.config import config_from  # noqa: E402
from simpo_megatron.convert import load_hf_weights  # noqa: E402
from simpo_megatron.mcore.families import describe_hf_model  # noqa: E402
from simpo_megatron.mcore.layers import weights_of  # noqa: E402
from simpo_megatron.mcore.model import build_model  # noqa: E402


def run(model: Path, layout: str, options: dict) -> None:
    config = config_from(model=str(model), data=("unused",), bf16=False, **options)
    groups = parallel.initialize(config.parallel.sizes, backend="gloo", timeout_minutes=3)
    parallel.seed_everything(1)
    description = describe_hf_model(model)
    expected, found, megatrons = (build_model(description, config, groups) for _ in range(3))
    for chunk in (*expected, *found, *megatrons):
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    load_hf_weights(expected, model, description, tp_rank=groups.tp.rank(), tp_size=groups.tp.size())
    release = Path(f"{model}.megatron") / "release"
    fill_weights(found, release, description, groups)
    check_same(expected, found, f"{model.name} {layout}")
    read_as_megatron_does(megatrons, expected, release, description.vocab_size)
    write(expected, Path(f"{model}.{layout}"), release)
    write_as_megatron_lm_does(expected, Path(f"{model}.{layout}.foreign"), singly=layout == "pp2")
    for source in sorted(model.parent.glob(f"{model.name}.*.foreign")):
        for chunk in found:
            for parameter in chunk.parameters():
                parameter.data.fill_(float("nan"))
        fill_model(found, find_model(source, model), description, groups)
        check_same(expected, found, f"{model.name} {layout} from {source.name}")
        assert not (source / "called").exists()


def check_same(expected: list, found: list, title: str) -> None:
    for before, after in zip(expected, found, strict=True):
        found_weights = dict(weights_of(after))
        for name, values in weights_of(before):
            assert torch.equal(found_weights[name], values), f"{title} {name}"


class Calls:
    """An object that makes a folder where it is unpickled."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


def write_as_megatron_lm_does(chunks: list, save: Path, *, singly: bool) -> None:
    """Megatron-LM's folder, with all that it keeps beside weights; `singly`: a tensor for each layer."""
    rank, world = dist.get_rank(), dist.get_world_size()
    state = {
        "args": Namespace(num_layers=2, rampup_batch_size=None),
        "checkpoint_version": 3.0,
        "iteration": 3,
        "opt_param_scheduler": {"num_steps": 12},
        "rng_state": ShardedObject("rng_state", [{"random_rng_state": (3, (1, 2), None)}], (world,), (rank,)),
        "optimizer": {
            "param_groups": [{"lr": 1e-3}],
            "exp_avg": ShardedTensor.from_rank_offsets(
                "optimizer.state.exp_avg.decoder.final_layernorm.weight", torch.ones(4), (0, rank, world)
            ),
        },
        **sharded(chunks, metadata={"non_homogeneous_layers": singly}),
    }
    folder = save / "iter_0000003"
    if rank == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, str(folder))
    if rank == 0:
        (save / "latest_checkpointed_iteration.txt").write_text("3")
        # Nothing but the index and the shards is looked at.
        called = f"!!python/object/apply:os.mkdir [{save}/called]"
        (folder / "run_config.yaml").write_text(f"model: {called}\n")
        (folder / "common.pt").write_bytes(pickle.dumps(Calls(f"{save}/called")))
    dist.barrier()


def sharded(chunks: list, **options: object) -> dict:
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    whole = {name: chunk.sharded_state_dict(**options) for name, chunk in zip(names, chunks, strict=True)}
    return extract_matching_values(whole, lambda value: isinstance(value, ShardedObject))[1]


def read_as_megatron_does(chunks: list, expected: list, release: Path, vocab_size: int) -> None:
    """With nothing of this package: what megatron.training's load_checkpoint calls."""
    assert dist_checkpointing.check_is_distributed_checkpoint(str(release))
    common = dist_checkpointing.load_common_state_dict(str(release))
    assert (common["checkpoint_version"], common["iteration"]) == (3.0, 0)
    state = dist_checkpointing.load(sharded(chunks), str(release), strict="raise_all")
    for name, chunk, before in zip(state.keys() - common.keys(), chunks, expected, strict=False):
        if len(chunks) > 1:
            continue
        chunk.load_state_dict(state[name], strict=False)
        for key, parameter in before.named_parameters():
            assert torch.equal(chunk.get_parameter(key), parameter), key


def write(chunks: list, save: Path, release: Path) -> None:
    """A committed checkpoint as a run of this layout leaves it, without an optimizer."""
    draft = save / "draft"
    if dist.get_rank() == 0:
        draft.mkdir(parents=True)
    dist.barrier()
    cpu_patches.write_checkpoints_in_threads()
    dist_checkpointing.save({"iteration": 7, **sharded(chunks)}, str(draft))
    if dist.get_rank() == 0:
        shutil.copyfile(release / "config.json", draft / "config.json")
        files = {path.name: manifest.digest_file(path) for path in draft.iterdir()}
        manifest.commit_draft(draft, 7, files, {})
    dist.barrier()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    for model_name, layout_name in job["runs"]:
        run(folder / model_name, layout_name, job["layouts"][layout_name])
        leave_groups()
    dist.destroy_process_group()
