"""Import and export by Megatron-Bridge, for convert.py; runs under the Python that has megatron-bridge.

    python bridge_convert.py HF_FOLDER OUT_FOLDER

Prints {"import": {wall, cpu, peak}, "export": {...}} as JSON. Bridge fills a whole model in memory and writes no
checkpoint here, because its writer needs packages for GPUs. Bridge names classes of Transformer Engine that it does not
use for this; empty classes stand in for them.
"""

import importlib.machinery
import json
import os
import resource
import sys
import time
import types
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel  # noqa: F401 - loaded before anything stands in for its packages
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

CPU_OPTIONS = {
    "use_cpu_initialization": True,
    "perform_initialization": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "persist_layer_norm": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
}


class EmptyModule(types.ModuleType):
    """A module in which every public name is a class that does nothing."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (torch.nn.Module,), {})


def stand_in_for_transformer_engine() -> None:
    """Makes `import transformer_engine.pytorch` succeed; megatron-core was imported before, without it."""
    parent = None
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.ops"):
        module = EmptyModule(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        sys.modules[name] = module
        if parent is not None:
            setattr(parent, name.rpartition(".")[2], module)
        parent = module


def timed(action) -> tuple[dict, object]:
    """({wall, cpu, peak}, the result) of `action`: seconds, seconds and bytes."""
    before, start = time.process_time(), time.perf_counter()
    result = action()
    taken = {"wall": time.perf_counter() - start, "cpu": time.process_time() - before}
    return {**taken, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}, result


def main(source: Path, out: Path) -> None:
    """Measures both ways."""
    stand_in_for_transformer_engine()
    from megatron.bridge import AutoBridge

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()

    def to_megatron():
        bridge = AutoBridge.from_hf_pretrained(str(source))
        provider = bridge.to_megatron_provider(load_weights=True)
        provider.transformer_layer_spec = lambda config, **_: get_gpt_layer_local_spec(normalization="RMSNorm")
        for name, value in CPU_OPTIONS.items():
            setattr(provider, name, value)
        provider.finalize()
        return bridge, provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)

    imported, (bridge, model) = timed(to_megatron)

    def to_hf() -> None:
        bridge.save_hf_weights(model, str(out))
        for path in out.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    exported, _ = timed(to_hf)
    print(json.dumps({"import": imported, "export": exported}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
