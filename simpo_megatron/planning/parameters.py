"""The number of parameters that a rank holds."""

from __future__ import annotations

from simpo_megatron.mcore.families import padded_vocab_size
from simpo_megatron.parallel_sizes import ParallelSizes
from simpo_megatron.planning.shapes import ModelShape
from simpo_megatron.planning.workload import Workload


def layer_parameters(shape: ModelShape, tensor_ranks: int) -> int:
    """Parameters of one layer on a tensor-parallel rank, experts apart: matrices divided; norms, row-parallel biases
    and an MoE's router whole.

    Source: megatron.core SelfAttention (linear_qkv [(A + 2G) D / tp, H], linear_proj), MLP (linear_fc1 [2F / tp, H],
    linear_fc2) or Router [E, H], two RMSNorms (four with post-norms) and, with qk_layernorm, two of the head size;
    our LatentAttention has two of the size of the latents.
    """
    matrices = shape.divided_matrices // tensor_ranks
    qkv_out = (shape.query_size + 2 * shape.key_size) // tensor_ranks
    biases = qkv_out if shape.add_bias_linear or shape.add_qkv_bias else 0
    if shape.add_bias_linear:
        biases += (shape.mlp_matrices - 1) * shape.ffn_hidden_size // tensor_ranks + 2 * shape.hidden_size
    if shape.attention_output_bias:
        biases += shape.hidden_size
    norms = (4 if shape.post_layernorms else 2) * shape.hidden_size
    norms += 2 * shape.kv_channels if shape.qk_layernorm else 0
    norms += 0 if shape.latent is None else shape.latent_width - shape.latent.qk_pos_emb_head_dim
    return matrices + shape.down_projections + shape.router + biases + norms


def expert_parameters(shape: ModelShape, sizes: ParallelSizes) -> int:
    """Parameters of a stage's experts on a rank: whole experts, spread over the expert-parallel ranks."""
    return shape.num_layers // sizes.pipeline * shape.expert_matrices // sizes.expert


def stage_parameters(shape: ModelShape, sizes: ParallelSizes, stage: int) -> int:
    """Parameters on one rank of a pipeline stage; virtual stages only order them differently.

    Source: megatron.core GPTModel: the embedding on the first stage, final norm and output layer on the last, each
    with the vocabulary padded to 128 tp; a tied table is one where both are on one stage and else two.
    """
    is_first, is_last = stage == 0, stage == sizes.pipeline - 1
    num_tables = int(is_first) + int(is_last and not (is_first and shape.tied))
    table = padded_vocab_size(shape.vocab_size, sizes.tensor) // sizes.tensor * shape.hidden_size
    layers = shape.num_layers // sizes.pipeline * layer_parameters(shape, sizes.tensor)
    return layers + expert_parameters(shape, sizes) + num_tables * table + (shape.hidden_size if is_last else 0)


def adapter_parameters(load: Workload) -> int:
    """Parameters of a stage's low-rank adapters on a tensor-parallel rank; 0 without adapters.

    Source: simpo_megatron.mcore.lora: A [p r, inputs] and B [outputs, r] of each target, one of the two divided.
    """
    lora, shape, tp = load.config.lora, load.shape, load.sizes.tensor
    if lora.lora_rank is None:
        return 0
    inputs_and_outputs = {
        "linear_qkv": _sides_before_attention(shape, tp),
        "linear_proj": (shape.num_attention_heads * shape.kv_channels // tp, shape.hidden_size),
        "linear_fc1": (shape.hidden_size, (shape.mlp_matrices - 1) * shape.ffn_hidden_size // tp),
        "linear_fc2": (shape.ffn_hidden_size // tp, shape.hidden_size),
    }
    sides = 0
    for target, own_parts in lora.own_parts.items():
        num_inputs, num_outputs = inputs_and_outputs[target]
        sides += len(own_parts or (0,)) * num_inputs + num_outputs
    return shape.num_layers // load.sizes.pipeline * lora.lora_rank * sides


def _sides_before_attention(shape: ModelShape, tp: int) -> tuple[int, int]:
    """(Inputs, outputs) of the matrices that make queries, keys and values, on a tensor-parallel rank."""
    if shape.latent is None:
        return shape.hidden_size, (shape.query_size + 2 * shape.key_size) // tp
    sizes, num_values = shape.latent, shape.num_attention_heads * (shape.latent.qk_head_dim + shape.latent.v_head_dim)
    of_queries = sizes.q_lora_rank or 0
    num_inputs = 2 * shape.hidden_size + of_queries + sizes.kv_lora_rank
    num_outputs = of_queries + shape.query_size // tp + sizes.kv_lora_rank + sizes.qk_pos_emb_head_dim
    return num_inputs, num_outputs + num_values // tp


def trained_parameters(load: Workload, stage: int) -> tuple[int, int]:
    """(those outside experts, those of experts) that an optimizer step changes on a rank of a pipeline stage."""
    if load.config.lora.lora_rank is not None:
        return adapter_parameters(load), 0
    experts = expert_parameters(load.shape, load.sizes)
    return stage_parameters(load.shape, load.sizes, stage) - experts, experts


def optimizer_parameters(load: Workload, stage: int) -> float:
    """Parameters whose optimizer state a rank keeps: with the distributed optimizer its share of those it trains.

    Source: megatron.core get_megatron_optimizer: one optimizer over the dp x cp ranks, and one over the ranks that
    hold the same experts.
    """
    dense, experts = trained_parameters(load, stage)
    if not load.config.parallel.use_distributed_optimizer:
        return dense + experts
    return dense / load.dense_copies + experts / load.expert_copies
