"""Load Hugging Face folders under several parallel layouts, leave their logits, and export them again.

`convert_worker.py FOLDER`: FOLDER/job.json names the models, the layouts, the tokens, and as runs which model meets
which layout. A run leaves FOLDER/<model>-<layout>.safetensors ("logits", [B, S, V] in fp32) and the folder
FOLDER/<model>-<layout>/. Those that the job names as scored leave, beside the logits, "averages" [P, 2]: the average
log-probs of the responses of the job's pairs.
"""

from __future__ import annotations

import json
import resource
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

from simpo_megatron.mcore import cpu_patches, device

cpu_patches.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from layout_worker import ListDataset  # noqa: E402
from ranks import leave_groups  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from simpo_megatron import parallel  # noqa: E402
from simpo_megatron.config import Config, config_from, resolve  # noqa: E402
from simpo_megatron.convert import export_hf, load_hf_weights  # noqa: E402
from simpo_megatron.errors import CheckpointError  # noqa: E402
from simpo_megatron.mcore.families import describe_hf_model  # noqa: E402
from simpo_megatron.mcore.model import build_model  # noqa: E402
from simpo_megatron.training.reference import reference_log_probs  # noqa: E402
from simpo_megatron.training.start.setup import build_trainer  # noqa: E402
from simpo_megatron.training.step import batch_options  # noqa: E402


@torch.no_grad()
def logits_of(chunks: list, tokens: torch.Tensor, groups: parallel.ParallelGroups) -> torch.Tensor:
    """[B, S, V] fp32 on every rank: stages take turns, chunk by chunk, and broadcast what they computed."""
    num_sequences, length = tokens.shape
    position_ids = torch.arange(length).expand(num_sequences, -1)
    own_length = length // groups.tp.size() if chunks[0].config.sequence_parallel else length
    for index, chunk in enumerate(chunks):
        for stage in range(groups.pp.size()):
            is_last = index == len(chunks) - 1 and stage == groups.pp.size() - 1
            size = chunk.vocab_size // groups.tp.size() if is_last else chunk.config.hidden_size
            shape = (num_sequences, length, size) if is_last else (own_length, num_sequences, size)
            if groups.pp.rank() == stage:
                if index or stage:
                    chunk.set_input_tensor(output)  # noqa: F821 - the stage before has set it
                output = chunk(tokens, position_ids, None)
                assert output.shape == shape
            else:
                output = torch.empty(shape)
            dist.broadcast(output, dist.get_global_rank(groups.pp, stage), group=groups.pp)
    slices = [torch.empty_like(output) for _ in range(groups.tp.size())]
    dist.all_gather(slices, output.contiguous(), group=groups.tp)
    return torch.cat(slices, dim=-1)


def run(model: Path, layout: str, options: dict, job: dict) -> None:
    # The longest sequence decides which frequencies a longrope model has.
    lengths = {"max_length": 64, "max_prompt_length": 32}
    config = config_from(model=str(model), data=("unused",), bf16=False, **lengths, **options)
    groups = parallel.initialize(config.parallel.sizes, backend="gloo", timeout_minutes=3)
    parallel.seed_everything(1)
    description = describe_hf_model(model)
    chunks = build_model(description, config, groups)
    for chunk in chunks:
        chunk.eval()
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    load_hf_weights(chunks, model, description, tp_rank=groups.tp.rank(), tp_size=groups.tp.size())
    logits = logits_of(chunks, torch.tensor(job["tokens"]), groups)
    out = model.with_name(f"{model.name}-{layout}")
    stored_dtype = getattr(torch, job["models"][model.name])
    limit = job["max_shard_bytes"]
    export_hf(chunks, description, model, out, groups=groups, dtype=stored_dtype, max_shard_bytes=limit)
    found = {"logits": logits[..., : description.vocab_size].contiguous()}
    if [model.name, layout] in job.get("scored", []):
        found["averages"] = averages_of(chunks, config, description, groups, job["pairs"])
    if dist.get_rank() == 0:
        save_file(found, f"{out}.safetensors")
    if groups.dp_cp.size() == 1:
        refuse_on_all_ranks(chunks, description, model, out, groups)


def averages_of(chunks: list, config: Config, description, groups, pairs: list) -> torch.Tensor:
    """[P, 2] fp32 on every rank, by the pass of the trainer: packed, prompts shared, from slices of the vocabulary."""
    machine = device.machine()
    layout = resolve(config, world_size=dist.get_world_size(), model=description.transformer, machine=machine)
    options = batch_options(config, layout, pad_id=0)
    trainer = build_trainer(chunks, config, groups, layout, options, train_iters=1)
    return torch.from_numpy(reference_log_probs(trainer, ListDataset(pairs)))


def refuse_on_all_ranks(chunks: list, description, model: Path, out: Path, groups) -> None:
    """Each failure strikes the first rank only; the others must hear of it instead of waiting."""
    full = Path(f"{out}-full")
    inside_a_file = Path(f"{out}.safetensors") / "export"
    for target, expected in ((model, "did not write"), (inside_a_file, "Not a directory"), (full, "too large")):
        dist.barrier()
        with smaller_files(30_000) if target == full and dist.get_rank() == 0 else nullcontext():
            try:
                export_hf(chunks, description, model, target, groups=groups)
            except CheckpointError as error:
                assert expected in str(error), error
            else:
                raise AssertionError(f"export to {target} was not refused")
    assert not full.exists()


@contextmanager
def smaller_files(num_bytes: int):
    """Writing past `num_bytes` of a file fails, as on a full disk: in the midst of an export."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    for model_name, layout_name in job["runs"]:
        run(folder / model_name, layout_name, job["layouts"][layout_name], job)
        leave_groups()
    dist.destroy_process_group()
