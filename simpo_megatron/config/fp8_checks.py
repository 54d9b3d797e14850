"""Checks of FP8 recipes against machine, model and other options, by the sources of Transformer Engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpo_megatron.config.machine import Machine
from simpo_megatron.config.sections import Config
from simpo_megatron.errors import require

# Transformer Engine's FP8 matrix products need rows and columns in multiples of this.
FP8_MULTIPLE = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}
# Source: transformer_engine/pytorch/quantization.py (2.9 and 2.20).
_FP8_COMPUTE_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
_MXFP8_BELOW, _BLOCKWISE_CUDA = (12, 0), (12, 9)


def check_fp8(config: Config, model: Mapping[str, Any], machine: Machine) -> None:
    """Refuses a recipe that this machine or this model cannot compute.

    Raises: ConfigError.
    """
    recipe = config.precision.fp8_recipe
    if recipe is None:
        return
    key = "fp8_recipe"
    require(machine.has_cuda, key, recipe, "a CUDA device, and none is there; leave --fp8 out to train in bf16")
    # Without Transformer Engine megatron-core accepts the recipe and computes in full precision, silently.
    engine = "Transformer Engine, which cannot be imported; pip install 'simpo-megatron[te]'"
    require(machine.has_transformer_engine, key, recipe, engine)
    needed, found = _FP8_COMPUTE_CAPABILITY[recipe], machine.compute_capability
    if found is not None:
        require(found >= needed, key, recipe, "compute capability {}.{}, found {}.{}".format(*needed, *found))
        too_new = "compute capability below {}.{}, found {}.{}; take tensorwise".format(*_MXFP8_BELOW, *found)
        require(recipe != "mxfp8" or found < _MXFP8_BELOW, key, recipe, too_new)
    if machine.cuda is not None and recipe == "blockwise":
        older = "a torch built with CUDA {}.{} or later, found {}.{}".format(*_BLOCKWISE_CUDA, *machine.cuda)
        require(machine.cuda >= _BLOCKWISE_CUDA, key, recipe, older)
    for name, size, multiple in _fp8_widths(config, model, FP8_MULTIPLE[recipe]):
        require(size % multiple == 0, key, recipe, f"the model's {name}, {size}, to be a multiple of {multiple}")


def _fp8_widths(config: Config, model: Mapping[str, Any], multiple: int) -> list[tuple[str, int, int]]:
    """(name, size, its necessary divisor) of the inputs of FP8 matrices on a rank."""
    tensor = config.parallel.tensor_model_parallel_size
    dense, shared = model["ffn_hidden_size"], model.get("moe_shared_expert_intermediate_size")
    layers = model.get("moe_layer_freq", 1)
    widths = [("hidden size", model["hidden_size"], multiple)]
    if model.get("num_moe_experts"):
        # Experts are not sharded.
        widths.append(("width of an expert", model.get("moe_ffn_hidden_size") or dense, multiple))
    if shared:
        widths.append(("width of shared experts per rank", shared // tensor, multiple))
    if not model.get("num_moe_experts") or (isinstance(layers, list) and 0 in layers):
        widths.append(("MLP width per rank", dense // tensor, multiple))
    if model.get("kv_channels") and model.get("latent") is None:
        # A block of 128 may be filled in part.
        widths.append(
            ("query width per rank", model["num_attention_heads"] * model["kv_channels"] // tensor, min(multiple, 32))
        )
    return widths


def check_fp8_recompute(config: Config) -> None:
    """Refuses the recomputation of norms and activations under delayed scaling, as megatron's TransformerConfig does.

    Their products take the recomputed input, and would count it twice in the history of its scale.

    Raises: ConfigError.
    """
    found = {"layernorm", "moe_act"} & set(config.recompute.recompute_modules)
    if config.precision.fp8_recipe == "delayed" and config.recompute.recompute_granularity == "selective":
        expected = f"another fp8_recipe than delayed beside {' and '.join(sorted(found))}"
        require(not found, "recompute_modules", " ".join(config.recompute.recompute_modules), expected)


def check_fp8_weights(config: Config, model: Mapping[str, Any]) -> None:
    """Refuses FP8 weights where nothing keeps their fp32 masters.

    Raises: ConfigError.
    """
    if not config.precision.fp8_param_gather:
        return
    for holds, expected in (
        (config.parallel.use_distributed_optimizer, "use_distributed_optimizer with it, which keeps the fp32 masters"),
        (config.lora.lora_rank is None, "no lora_rank beside it; frozen weights have no fp32 masters"),
        (not model.get("num_moe_experts"), "a dense model; FP8 weights of experts are not supported yet"),
    ):
        require(holds, "fp8_param_gather", True, expected)
