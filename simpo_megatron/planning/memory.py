"""Bytes on one rank of a run, by part, as a pure function of shape, layout, precision, recomputation and pack.

Each term names what it counts and where it is allocated. Symbols: e is the bytes of a weight or activation outside
FP8 (2 in bf16, 4 in fp32), S the tokens of a pack, N its response tokens, H the hidden size, F the MLP width. A, G and
D are attention heads, key/value groups and head size; v is a rank's slice of the padded vocabulary. tp is the
tensor-parallel size; s is tp under sequence parallelism, else 1. Under context parallelism S is a rank's share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from simpo_megatron.config.lora_section import LORA_TARGETS
from simpo_megatron.loss.block_plan import round_up
from simpo_megatron.loss.blocks_torch import MAX_BLOCK_WIDTH, MIN_BLOCK_WIDTH
from simpo_megatron.loss.fused_linear import DEFAULT_LOGITS_BUDGET_BYTES
from simpo_megatron.mcore.precision import precision_options
from simpo_megatron.planning.parameters import (
    adapter_parameters,
    optimizer_parameters,
    stage_parameters,
    trained_parameters,
)
from simpo_megatron.planning.workload import Workload

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on a rank of one pipeline stage at the peak of a step, by part; they add up to `total`."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    communication: float
    runtime: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


def stage_memory(load: Workload, stage: int) -> StageMemory:
    """The parts of a rank of pipeline stage `stage` (from 0).

    On top of what the layers keep, the peak is the larger of two moments: while the loss is computed, or, after its
    buffers are freed, in the backward of the last layer. The excess of the second is counted with activations.
    """
    parameters = stage_parameters(load.shape, load.sizes, stage) + adapter_parameters(load)
    loss = sum(head_bytes(load)) if stage == load.sizes.pipeline - 1 else 0.0
    excess = max(0.0, backward_work_bytes(load) - loss)
    return StageMemory(
        weights=parameters * load.itemsize + fp8_bytes(load, stage),
        gradients=gradient_bytes(sum(trained_parameters(load, stage))),
        optimizer=optimizer_bytes(load, stage),
        activations=activation_bytes(load, stage) + excess,
        loss=loss,
        communication=communication_bytes(load),
        runtime=runtime_bytes(load),
    )


def gradient_bytes(parameters: int) -> int:
    """fp32 `main_grad` of every parameter that is trained.

    Source: megatron.core _ParamAndGradBuffer with grad_reduce_in_fp32. Its padding under the distributed optimizer is
    left out: each parameter starts at a multiple of 64 elements, each bucket ends at one of lcm(dp, 128).
    """
    return 4 * parameters


def optimizer_bytes(load: Workload, stage: int) -> float:
    """Adam's two fp32 moments and, beside bf16 weights, an fp32 copy of the rank's share.

    Source: megatron.core DistributedOptimizer (shard_fp32_from_float16_groups) and
    Float16OptimizerWithFloat16Params; Adam's exp_avg and exp_avg_sq.
    """
    return (12 if load.config.precision.bf16 else 8) * optimizer_parameters(load, stage)


def fp8_bytes(load: Workload, stage: int) -> float:
    """The bytes that the FP8 matrices of a stage's layers add to weights in bf16, per rank.

    Each is kept twice over the microbatches, plain and transposed, at one byte a value. Both are kept beside the bf16
    matrix or, under fp8_param_gather, instead of it. Layers that a recipe leaves in bf16 have none.

    Source: transformer_engine.pytorch Linear's weight workspace, rowwise and columnwise, and with primary weights in
    FP8 the weight itself (`_data`, `_transpose`; of blocks `_rowwise_data`, `_columnwise_data`).
    """
    precision, shape, sizes = load.config.precision, load.shape, load.sizes
    if precision.fp8_recipe is None:
        return 0.0
    kept = precision_options(precision)
    num_layers = shape.num_layers // sizes.pipeline
    num_layers -= kept.get("num_layers_at_start_in_bf16", 0) * (stage == 0)
    num_layers -= kept.get("num_layers_at_end_in_bf16", 0) * (stage == sizes.pipeline - 1)
    matrices = shape.divided_matrices / sizes.tensor + shape.expert_matrices / sizes.expert
    return (2.0 - load.itemsize * precision.fp8_param_gather) * max(num_layers, 0) * matrices


def layer_activation_bytes(load: Workload) -> dict[str, float]:
    """The bytes that one layer keeps of a pack for its backward, by part, with nothing that an option recomputes.

    FP8 keeps the inputs of matrix products in one byte. A frozen layer keeps none, but its adapter does.

    Source: for the torch engine the tensors that autograd saves in `lean_layers.LeanTransformerLayer`, where matrices
    keep no outputs of norms and of SwiGLU; for Transformer Engine those of its LayerNormLinear, Linear and fused
    attention and of megatron's fused SwiGLU and rotary embedding.
    """
    shape, e, tp = load.shape, load.itemsize, load.sizes.tensor
    query, _ = _query_key_bytes(load)
    mlp = load.tokens * shape.ffn_hidden_size / tp * e
    is_lora = load.config.lora.lora_rank is not None
    own_parts = load.config.lora.own_parts
    needs = {name: not is_lora or name in own_parts for name in LORA_TARGETS}
    low = load.tokens * (load.config.lora.lora_rank or 0) * sum(len(parts or (0,)) for parts in own_parts.values()) * e
    num_norms = 4 if shape.post_layernorms else 2
    # Latents are kept by their norms and, of Transformer Engine, by the matrices behind these, whole unless ranks
    # divide the sequence.
    latents = load.tokens * shape.latent_width / load.sequence_ranks * e
    if load.engine == "transformer_engine":
        is_fp8 = load.config.precision.fp8_recipe is not None
        product = 0.5 if is_fp8 and not is_lora else 1.0  # bytes of a matrix product's input, in units of e
        return {
            "norms": num_norms * load.hidden_bytes,
            "attention in": product * load.hidden_bytes * needs["linear_qkv"] + 2 * latents,
            "attention": _attention_bytes(load),
            "attention out": query + (0.5 * query if is_fp8 else 0),
            "mlp in": product * load.hidden_bytes * needs["linear_fc1"],
            "mlp": (_kept_of_activation(load) + product * needs["linear_fc2"]) * mlp + _routing_bytes(load, product),
            "adapters": low,
        }
    # An activation that is not fused keeps each factor, an expert that times its router's weight.
    product = 0.0 if _fuses_activation(load) else 1.0
    return {
        "norms": num_norms * load.hidden_bytes,
        "attention in": latents,
        "attention": _attention_bytes(load),
        "attention out": query if _keeps_its_outputs(load) else query * needs["linear_proj"],
        "mlp in": 0.0,
        "mlp": (_kept_of_activation(load) + product * needs["linear_fc2"] + bool(shape.num_moe_experts)) * mlp
        + _routing_bytes(load, 1.0),
        "adapters": low,
    }


def _fuses_activation(load: Workload) -> bool:
    """True if the MLP keeps the input of its gated activation alone; the CPU's experts do not."""
    return load.shape.fuses_activation and (load.engine == "transformer_engine" or not load.shape.num_moe_experts)


def _kept_of_activation(load: Workload) -> int:
    """The number of tensors of the MLP's width that its activation keeps, without the input of its last product."""
    if not load.shape.gated_linear_unit:
        return 2
    return 2 if _fuses_activation(load) else 4


def _routing_bytes(load: Workload, product: float) -> float:
    """The bytes that an MoE keeps beyond a dense MLP: each expert's inputs, and three fp32 scores a token and expert.

    Assumes that experts are chosen equally often, so that as many tokens reach a rank as leave it.

    Source: megatron.core TopKRouter (logits, probabilities, those of the auxiliary loss), MoEAlltoAllTokenDispatcher.
    """
    shape = load.shape
    if not shape.num_moe_experts:
        return 0.0
    inputs = product * shape.moe_router_topk * load.hidden_bytes
    return inputs + 12 * load.tokens / load.sequence_ranks * shape.num_moe_experts


def _keeps_its_outputs(load: Workload) -> bool:
    """True where core attention on the CPU keeps the very outputs that the next matrix keeps, and each key once."""
    return load.engine == "torch" and load.shape.attn_logit_softcapping is None and load.sizes.context == 1


def _attention_bytes(load: Workload) -> float:
    """The bytes that the core attention keeps: queries, keys and values of all segments, and its own sums.

    Where `_keeps_its_outputs` does not hold, a prompt's keys are gathered a second time for the rejected response. With
    soft-capped scores, torch's operations keep scores and weights in fp32, and keys and values for each head.
    """
    shape, e, tp, pack = load.shape, load.itemsize, load.sizes.tensor, load.pack
    query, key = _query_key_bytes(load)
    gathered = _keys_per_token(load) * (1 + pack.repeated_keys / pack.tokens)
    if shape.attn_logit_softcapping is not None:
        scores = pack.scores / load.sizes.context * shape.num_attention_heads / tp
        return query + 2 * query * gathered + scores * (8 + (e if e < 4 else 0))
    log_sum_exp = 4 * load.tokens * shape.num_attention_heads / tp
    if load.engine == "transformer_engine":
        return query + 2 * key * gathered + log_sum_exp
    if _keeps_its_outputs(load):
        return query + 2 * key + log_sum_exp
    return query + 2 * key * gathered + log_sum_exp + query + _mask_bytes(load)


def _mask_bytes(load: Workload) -> float:
    """The bytes of the masks of a pack's rejected responses, which see keys of their prompt before their own."""
    pack = load.pack
    scores = pack.num_pairs * pack.response * (pack.prompt + pack.response) if pack.prefix_sharing else 0
    return scores * load.itemsize


def _keys_per_token(load: Workload) -> float:
    """Keys that a rank gathers for each of its tokens: under context parallelism also those that lie with others.

    Source: ContextShare's two pieces a rank; each needs what comes before it in the sequence that it begins in.
    """
    cp, pack = load.sizes.context, load.pack
    if cp == 1:
        return 1.0
    return min(1 + 2 * (pack.prompt + pack.response) / load.tokens, cp + 0.5)


def _query_key_bytes(load: Workload) -> tuple[float, float]:
    """The bytes of [S, A / tp, D] and of [S, G / tp, D], one group at least."""
    per_width, tp = load.tokens * load.itemsize, load.sizes.tensor
    return per_width * load.shape.query_size / tp, per_width * load.shape.key_size_of_rank(tp)


def kept_layer_bytes(load: Workload) -> float:
    """The bytes that one layer keeps between forward and backward, selective recomputation taken into account.

    Source: megatron.core Attention._checkpointed_attention_forward keeps the rotated query and key and, because the
    value is a view of it, the whole output of linear_qkv.
    """
    parts = layer_activation_bytes(load)
    if "core_attn" in load.recomputed:
        query, key = _query_key_bytes(load)
        parts["attention"] = 2 * query + 3 * key
    if "mlp" in load.recomputed:
        parts["mlp"] = 0.0
    return sum(parts.values())


def chunk_layers(load: Workload) -> int:
    """Layers of one model chunk: of a stage, or of one of its virtual stages."""
    return load.shape.num_layers // load.sizes.pipeline // (load.sizes.virtual_pipeline or 1)


def chunks_in_flight(load: Workload, stage: int) -> int:
    """Model chunks of this stage whose forward is done and whose backward is not, at most.

    Source: megatron.core schedules: the warm-up of 1F1B and of interleaved 1F1B, and one more in the steady state.
    """
    sizes, num_chunks = load.sizes, load.sizes.virtual_pipeline or 1
    if sizes.pipeline == 1:
        return 1
    warm_up = sizes.pipeline - stage - 1
    if num_chunks > 1:
        warm_up = 2 * warm_up + (num_chunks - 1) * sizes.pipeline
    return min(load.num_microbatches * num_chunks, warm_up + 1)


def activation_bytes(load: Workload, stage: int) -> float:
    """The bytes that all chunks in flight on a stage keep: their layers, and with pipelining each chunk's output.

    Source: megatron.core TransformerBlock._checkpointed_forward for full recomputation; schedules keep the outputs
    (deallocate_pipeline_outputs is off).
    """
    recompute = load.config.recompute
    num_layers = chunk_layers(load)
    kept = num_layers * kept_layer_bytes(load)
    if recompute.recompute_granularity == "full":
        unit = recompute.layers_per_unit
        if recompute.recompute_method == "block":
            checkpointed = min(unit, num_layers)
            kept = checkpointed * load.hidden_bytes + (num_layers - checkpointed) * kept_layer_bytes(load)
        else:
            kept = math.ceil(num_layers / unit) * load.hidden_bytes
    elif _keeps_its_outputs(load):
        # All layers share the masks of a pack, and three factors for its rotation.
        kept += _mask_bytes(load) * ("core_attn" not in load.recomputed)
        kept += 3 * load.tokens * load.shape.head_size * load.itemsize
    if load.sizes.pipeline > 1:
        kept += load.hidden_bytes
    return kept * chunks_in_flight(load, stage)


def backward_work_bytes(load: Workload) -> float:
    """Peak of one layer's backward beyond what was kept, with the activations it recomputes.

    Counted are gradients of the residual stream and of the MLP's widest activations, and a weight gradient beside
    them (weight gradients are not fused into `main_grad`). A layer, or a unit of layers, that is recomputed as a whole
    is held in full first. A recomputed core attention is held only after the layer's MLP has freed its activations.
    """
    shape, e, tp = load.shape, load.itemsize, load.sizes.tensor
    parts, recompute = layer_activation_bytes(load), load.config.recompute
    # Fused SwiGLU hands on both halves' gradient at once.
    width = (2 if _fuses_activation(load) else 1) * shape.ffn_hidden_size / tp
    is_frozen = load.config.lora.lora_rank is not None
    gradients = 2 * load.hidden_bytes + load.tokens * width * e + (0 if is_frozen else width * shape.hidden_size * e)
    again = 0.0
    if recompute.recompute_granularity == "full":
        num_layers = chunk_layers(load)
        unit = min(recompute.layers_per_unit, num_layers)
        if recompute.recompute_method == "uniform":
            again = unit * sum(parts.values())
        elif unit == num_layers:  # else layers that kept everything have given it back by then
            again = sum(parts.values())
    elif recompute.recompute_granularity == "selective":
        mlp = parts["mlp"] if "mlp" in load.recomputed else 0.0
        attention = parts["attention"] if "core_attn" in load.recomputed else 0.0
        again = max(mlp, attention - (parts["mlp"] - mlp))
    return gradients + max(0.0, again)


def head_bytes(load: Workload) -> tuple[float, float]:
    """(bytes that the final norm and the head keep of a pack, their peak beyond that).

    Under sequence parallelism rows go to every tensor-parallel rank and back. Then there are the gradient of all
    positions, and a placeholder for the weight gradient that was added to `main_grad`.
    """
    shape, is_frozen = load.shape, load.config.lora.lora_rank is not None
    rows = load.head_rows * shape.hidden_size * load.itemsize
    logits, block, scratch, backward = _triton_blocks(load, rows) if load.is_on_gpu else _torch_blocks(load, rows)
    returned = rows * (2 if load.sequence_ranks > 1 else 1) + load.hidden_bytes
    returned += 0 if is_frozen else load.vocab_slice * shape.hidden_size * load.itemsize
    return load.hidden_bytes + rows + logits, max(load.hidden_bytes + block, scratch + max(backward, returned))


def _triton_blocks(load: Workload, rows: float) -> tuple[float, float, float, float]:
    """Bytes of (logits kept, the block in work, scratch all through the backward, its gradients); `rows` are [N, H].

    Source: simpo_megatron.loss.blocks_triton: the slopes of a block, and the rows' gradient, in fp32 over several.
    """
    plan = load.head_blocks
    e, widths = load.itemsize, [round_up(stop - start) for start, stop in plan.blocks]
    width = load.head_rows * max(widths, default=0)
    again = 0.0 if plan.num_kept == len(plan.blocks) else width * load.logit_bytes
    scratch = width * e + (again if load.logit_bytes != e else 0.0)
    gradient = rows if len(plan.blocks) == 1 else rows * (4 / e + 1)
    return load.head_rows * load.logit_bytes * sum(widths[: plan.num_kept]), again, scratch, gradient


def _torch_blocks(load: Workload, rows: float) -> tuple[float, float, float, float]:
    """The same bytes as `_triton_blocks`, for the blocks of a CPU.

    Source: simpo_megatron.loss.blocks_torch: logits within the byte budget are kept; a block in fp32 is worked on; the
    backward sums the rows' gradient in fp32 and hands it back in e.
    """
    e, is_frozen = load.itemsize, load.config.lora.lora_rank is not None
    budget, rows_N = DEFAULT_LOGITS_BUDGET_BYTES, load.head_rows
    width = min(max(budget / (rows_N * e) / 8, MIN_BLOCK_WIDTH), MAX_BLOCK_WIDTH, load.vocab_slice)
    backward = rows * (4 / e + 1) + (0 if is_frozen else width * load.shape.hidden_size * (4 + e))
    return min(rows_N * load.vocab_slice * e, budget), rows_N * width * 4 if e < 4 else 0.0, 0.0, backward


def communication_bytes(load: Workload) -> float:
    """Buffers of collectives and pipeline messages outside NCCL.

    Source: megatron.core's global memory buffer holds one gathered [S, H] under sequence parallelism (Transformer
    Engine allocates the same anew); an all-to-all has its tokens twice, as sent and as received; p2p messages hold an
    activation and a gradient each way.
    """
    gathered = load.hidden_bytes * load.sequence_ranks if load.sequence_ranks > 1 else 0.0
    if load.sizes.expert > 1:
        gathered = max(gathered, 2 * load.shape.moe_router_topk * load.hidden_bytes)
    return gathered + (4 * load.hidden_bytes if load.sizes.pipeline > 1 else 0.0)


def runtime_bytes(load: Workload) -> float:
    """CUDA context, kernels and workspaces, and NCCL's channels for each kind of group. Assumed, not measured."""
    if load.engine == "torch":
        return 0.0
    sizes = load.sizes
    groups = (sizes.tensor, sizes.pipeline, sizes.context, sizes.expert, load.data_parallel_size)
    kinds = 1 + sum(ranks > 1 for ranks in groups)
    return 1.0 * GIB + 0.3 * GIB * kinds
