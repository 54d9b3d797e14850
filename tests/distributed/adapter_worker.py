"""Export adapters, and the model they are merged into, under several parallel layouts, and leave megatron's logits.

`adapter_worker.py FOLDER`: FOLDER/job.json names models, layouts, adapters' options and tokens. Each model and layout
leaves FOLDER/<model>-<layout>.safetensors ("logits", [B, S, V] in fp32), and -adapter and -merged folders of the name.
Each of the job's given adapters leaves <folder>-<layout>.safetensors, of adapters and of merged weights, and an export
in <folder>-<layout>-again.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from simpo_megatron.mcore import cpu_patches

cpu_patches.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from convert_worker import logits_of  # noqa: E402
from ranks import leave_groups  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from simpo_megatron import parallel  # noqa: E402
from simpo_megatron.checkpoint.adapter_checkpoint import open_adapter  # noqa: E402
from simpo_megatron.checkpoint.initial_weights import fill_adapters, fill_model, fill_weights  # noqa: E402
from simpo_megatron.checkpoint.model_source import find_model  # noqa: E402
from simpo_megatron.config import config_from  # noqa: E402
from simpo_megatron.convert import export_adapter, export_hf, load_hf_weights  # noqa: E402
from simpo_megatron.mcore.families import describe_hf_model  # noqa: E402
from simpo_megatron.mcore.lora import Adapter, ColumnParallelAdapter  # noqa: E402
from simpo_megatron.mcore.model import build_model  # noqa: E402


def run(model: Path, layout: str, options: dict, job: dict) -> None:
    options = job["lora"] | options | job["options"].get(model.name, {})
    options["sequence_parallel"] = "sequence_parallel" in options and "tensor_model_parallel_size" in options
    config = config_from(model=str(model), data=("unused",), bf16=False, **options)
    groups = parallel.initialize(config.parallel.sizes, backend="gloo", timeout_minutes=3)
    parallel.seed_everything(1)
    description = describe_hf_model(model)
    chunks = build_model(description, config, groups)
    load_hf_weights(chunks, model, description, tp_rank=groups.tp.rank(), tp_size=groups.tp.size())
    fill_b(chunks, groups)
    if groups.pp.size() == 1 and not config.parallel.sequence_parallel:
        replicated_gradients_agree(chunks[0], groups)
    for chunk in chunks:
        chunk.eval()
    logits = logits_of(chunks, torch.tensor(job["tokens"]), groups)
    out = model.with_name(f"{model.name}-{layout}")
    export_adapter(chunks, description, config.lora, model, f"{out}-adapter", groups=groups, dtype=torch.float32)
    export_hf(chunks, description, model, f"{out}-merged", groups=groups, dtype=torch.float32)
    if dist.get_rank() == 0:
        save_file({"logits": logits[..., : description.vocab_size].contiguous()}, f"{out}.safetensors")


def run_given(given: dict, layout: str, options: dict, job: dict) -> None:
    """Adapters that PEFT has written: as adapters that could go on training, and in the weights."""
    model, folder = Path(given["model"]), Path(given["folder"])
    description = describe_hf_model(model)
    settings = asdict(open_adapter(folder, description).settings)
    tokens, found = torch.tensor(job["tokens"]), {}
    for kind, lora in (("adapters", settings), ("merged", {})):
        config = config_from(model=str(model), data=("unused",), bf16=False, **lora, **options)
        groups = parallel.initialize(config.parallel.sizes, backend="gloo", timeout_minutes=3)
        parallel.seed_everything(1)
        chunks = build_model(description, config, groups)
        if lora:
            fill_weights(chunks, model, description, groups)
            fill_adapters(chunks, folder, description, groups)
            again = f"{folder}-{layout}-again"
            export_adapter(chunks, description, config.lora, model, again, groups=groups, dtype=torch.float32)
        else:
            fill_model(chunks, find_model(folder), description, groups)
        for chunk in chunks:
            chunk.eval()
        found[kind] = logits_of(chunks, tokens, groups)[..., : description.vocab_size].contiguous()
        leave_groups()
    if dist.get_rank() == 0:
        save_file(found, f"{folder}-{layout}.safetensors")


def fill_b(chunks: list, groups: parallel.ParallelGroups) -> None:
    """Every B as if it had learned something: alike on tensor-parallel ranks where it is replicated."""
    for chunk in chunks:
        for number, adapter in enumerate(module for module in chunk.modules() if isinstance(module, Adapter)):
            part = groups.tp.rank() if adapter.divided == "lora_B" else 0
            torch.manual_seed(1000 * groups.pp.rank() + 100 * part + number)
            torch.nn.init.normal_(adapter.lora_B, std=0.1)


def replicated_gradients_agree(chunk: torch.nn.Module, groups: parallel.ParallelGroups) -> None:
    """In training, what all tensor-parallel ranks see loses the same numbers to dropout on each."""
    torch.manual_seed(7)
    tokens = torch.arange(12)[None] % 50
    chunk(tokens, torch.arange(12)[None], None).square().sum().backward()
    for module in chunk.modules():
        if isinstance(module, ColumnParallelAdapter):
            gradients = [torch.empty_like(module.lora_A.grad) for _ in range(groups.tp.size())]
            dist.all_gather(gradients, module.lora_A.grad.contiguous(), group=groups.tp)
            assert gradients[0].abs().sum() > 0
            for other in gradients[1:]:
                torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    the_job = json.loads((folder / "job.json").read_text())
    for layout_name, layout_options in the_job["layouts"].items():
        for model_name in the_job["models"]:
            run(folder / model_name, layout_name, layout_options, the_job)
            leave_groups()
        for the_adapter in the_job["given"]:
            run_given(the_adapter, layout_name, layout_options, the_job)
    dist.destroy_process_group()
