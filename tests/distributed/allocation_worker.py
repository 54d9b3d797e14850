"""Count what megatron-core allocates for Llama-3.1-70B on chosen ranks of a world that torch only pretends is there.

`allocation_worker.py FOLDER`: FOLDER/job.json holds the model's config.json, the options and the (world, ranks) of
each case; FOLDER/measured.json gets the bytes of weights, gradients and optimizer of each rank. Everything is built by
the trainer's own functions on the meta device: real shapes, no memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from simpo_megatron.mcore import cpu_patches, device

cpu_patches.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from simpo_megatron import parallel  # noqa: E402
from simpo_megatron.config import config_from  # noqa: E402
from simpo_megatron.mcore import model, optimizer  # noqa: E402
from simpo_megatron.mcore.families import describe_hf_config  # noqa: E402

META = torch.device("meta")
torch.cuda.current_device = lambda: META
device.current_device = lambda: META
# Beside these groups megatron makes some over gloo, for checkpoints; here they are as fake as the rest.
create_group = parallel_state.create_group
parallel_state.create_group = lambda *args, backend=None, **kwargs: create_group(*args, **kwargs)

# The optimizers sort weights by the name of their type.
type_name = torch.Tensor.type
torch.Tensor.type = lambda tensor, *args: (
    type_name(tensor, *args) if args else type_name(tensor).replace("torch.meta.", "torch.cuda.")
)


def allocated(case: dict, rank: int) -> dict[str, int]:
    """Bytes of the storages behind weights, `main_grad`s and the optimizer's tensors on `rank`."""
    config = config_from(**case["options"])
    dist.init_process_group("fake", rank=rank, world_size=case["world"], store=FakeStore())
    groups = parallel.initialize(config.parallel.sizes, backend="fake")
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    with META:
        chunks = model.build_model(describe_hf_config(case["model"], "config.json"), config, groups)
        wrapped = model.wrap_in_ddp(chunks, config)
        built, _ = optimizer.build_optimizer(wrapped, config, 10)
        parts = getattr(built, "chained_optimizers", [built])
        for part in parts:
            part.init_state_fn(part.optimizer, part.config)
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    state = [tensor for part in parts for tensor in optimizer_tensors(part, parameters)]
    measured = {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "weights": storage_bytes(parameters),
        "gradients": storage_bytes([parameter.main_grad for parameter in parameters if parameter.requires_grad]),
        "optimizer": storage_bytes(state),
    }
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return measured


def optimizer_tensors(part: object, parameters: list) -> list[torch.Tensor]:
    """Moments and main weights; tensors that are the model's own weights are none of the optimizer's."""
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    main = [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
    moments = [t for state in part.optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
    return [tensor for tensor in main + moments if tensor.untyped_storage()._cdata not in own]


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    results = {name: {rank: allocated(case, rank) for rank in case["ranks"]} for name, case in job.items()}
    (folder / "measured.json").write_text(json.dumps(results))
