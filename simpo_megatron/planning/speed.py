"""Seconds of a training step by part, from operations and bytes over assumed rates.

Context-parallel collectives are not overlapped with compute; tensor- and data-parallel ones are where the options say
so. The slowest pipeline stage sets the pace. The loss is counted as on a GPU: its products, and two passes over the
logits. A multiplication and an addition count as two operations.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from simpo_megatron.planning.gpus import ASSUMED, Assumptions, Gpu
from simpo_megatron.planning.parameters import optimizer_parameters, trained_parameters
from simpo_megatron.planning.shapes import ModelShape
from simpo_megatron.planning.workload import Workload

# Operations for each weight and token: three products; two for a frozen weight, which gets no gradient.
_PRODUCTS, _PRODUCTS_OF_FROZEN = 6, 4


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step by part; they add up to `total`."""

    matrices: float
    attention: float
    head: float
    elementwise: float
    recompute: float
    tensor_parallel: float
    context_parallel: float
    expert_parallel: float
    pipeline_messages: float
    bubble: float
    data_parallel: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


def step_time(load: Workload, tokens: float, gpu: Gpu, assumed: Assumptions = ASSUMED) -> StepTime:
    """The parts of a step whose microbatches hold `tokens` tokens each, on average."""
    num, sizes = load.num_microbatches, load.sizes
    # In a pipeline all packs of a step are as long as the longest.
    share = tokens / load.pack.tokens * (1 + assumed.padding if sizes.pipeline > 1 else 1)
    if load.config.batch.fixed_pack_length:
        share = 1.0
    stage = _forward_backward(load, share, gpu, assumed)
    busy = sum(stage.values())
    # Warm-up and cool-down of the pipeline, in units of a microbatch's time on a stage.
    bubble = (sizes.pipeline - 1) / (sizes.virtual_pipeline or 1) * busy
    return StepTime(
        **{name: num * seconds for name, seconds in stage.items()},
        bubble=bubble,
        data_parallel=_data_parallel(load, busy, gpu, assumed),
        optimizer=_optimizer(load, gpu, assumed),
    )


def useful_flops(load: Workload, tokens: float) -> float:
    """Useful operations of one data-parallel rank's step, without recomputation, over its whole model."""
    pack, share = load.pack, tokens / load.pack.tokens * load.num_microbatches
    of_pack = _flops(
        load.shape, _products(load), tokens=pack.tokens, attended=pack.attended, response_rows=pack.response_rows
    )
    return share * of_pack


def pairs_flops(
    shape: ModelShape, lengths: np.ndarray, counted: np.ndarray, *, prefix_sharing: bool, freezes_weights: bool
) -> float:
    """Useful operations of training on pairs of `lengths`, without recomputation, over the whole model.

    Args:
        lengths: int [num_pairs, 3], the tokens of prompt, chosen and rejected.
        counted: int [num_pairs, 2], those of chosen and rejected that count in the loss, and meet the vocabulary.
        freezes_weights: the model's matrices get no gradient, as beside adapters, whose own products are left out.
    """
    prompt, chosen, rejected = lengths.astype(np.float64).T
    # Causally, a query sees half of its own part on average, and all of what stands before it.
    of_rejected = rejected * (prompt + rejected / 2) if prefix_sharing else (prompt + rejected) ** 2 / 2
    return _flops(
        shape,
        _PRODUCTS_OF_FROZEN if freezes_weights else _PRODUCTS,
        tokens=float(((1 if prefix_sharing else 2) * prompt + chosen + rejected).sum()),
        attended=float(((prompt + chosen) ** 2 / 2 + of_rejected).sum()),
        response_rows=float(counted.sum()),
    )


def _flops(shape: ModelShape, products: int, *, tokens: float, attended: float, response_rows: float) -> float:
    # Scores and their sums of values, forward; backward takes twice as many. A value may be narrower than a key.
    attention = 6 * attended * (shape.query_size + shape.value_size) * shape.num_layers
    matrices = products * tokens * shape.num_active_weights
    return matrices + attention + products * response_rows * shape.vocab_size * shape.hidden_size


def _forward_backward(load: Workload, share: float, gpu: Gpu, assumed: Assumptions) -> dict[str, float]:
    """Seconds of one microbatch on the slowest stage, the last: its layers and the head."""
    shape, pack, sizes, e = load.shape, load.pack, load.sizes, load.itemsize
    layers, ranks = shape.num_layers / sizes.pipeline, sizes.tensor * sizes.context
    bf16 = gpu.bf16_flops * assumed.bf16
    rate = bf16
    if load.config.precision.fp8_recipe is not None and gpu.fp8_flops is not None:
        rate = gpu.fp8_flops * assumed.fp8
    tokens = pack.tokens * share / sizes.context
    products = _products(load)
    matrices = products * tokens * shape.layer_matrices / sizes.tensor * layers / rate
    attention = 12 * pack.attended * share * shape.query_size / ranks * layers / (gpu.bf16_flops * assumed.attention)
    head = _head(load, gpu, assumed) * share
    # Forward and backward read or write about 16 activations of [S, H / s] and 8 of [S, F / tp] a layer.
    touched = (16 * shape.hidden_size / load.sequence_ranks + 8 * shape.ffn_hidden_size / sizes.tensor) * tokens * e
    elementwise = touched * layers / (gpu.memory_bytes_rate * assumed.elementwise)
    # Two all-gathers and two reduce-scatters of [S, H] a layer, forward as backward (two all-reduces without
    # sequence parallelism: the same bytes); experts are whole, and only attention has its half of them.
    gathered = tokens * shape.hidden_size * e * (sizes.tensor - 1) / sizes.tensor
    nvlink, network = gpu.nvlink_bytes_rate * assumed.links, gpu.network_bytes_rate * assumed.links
    tensor_parallel = (4 if shape.num_moe_experts else 8) * gathered * layers / nvlink
    if load.config.parallel.tp_comm_overlap:
        tensor_parallel -= min(assumed.tensor_overlap * tensor_parallel, matrices)
    # One all-to-all to the experts and one back, forward as backward, of every token as often as it has experts.
    routed = tokens / load.sequence_ranks * shape.moe_router_topk * shape.hidden_size * e
    elsewhere = routed * (sizes.expert - 1) / sizes.expert
    expert_parallel = 4 * elsewhere * layers / (nvlink if sizes.expert <= gpu.per_node else network)
    # One all-gather of keys and values a layer, and one reduce-scatter backward.
    keys = 2 * tokens * shape.key_size / sizes.tensor * e * (sizes.context - 1)
    context_parallel = 2 * keys * layers / (nvlink if ranks <= gpu.per_node else network)
    num_chunks = sizes.virtual_pipeline or 1
    num_messages = 2 * num_chunks if sizes.pipeline > 1 else 0
    # Plain 1F1B waits for its messages; interleaving sends more of them and is assumed to hide half.
    messages = num_messages * load.hidden_bytes * share / network * (0.5 if num_chunks > 1 else 1.0)
    return {
        "matrices": matrices,
        "attention": attention,
        "head": head,
        "elementwise": elementwise,
        "recompute": _recompute(load, matrices, attention, (tensor_parallel, context_parallel, expert_parallel)),
        "tensor_parallel": tensor_parallel,
        "context_parallel": context_parallel,
        "expert_parallel": expert_parallel,
        "pipeline_messages": messages,
    }


def _head(load: Workload, gpu: Gpu, assumed: Assumptions) -> float:
    """Seconds of the loss of a full pack: products, one more where logits are not kept, and two passes over these.

    The forward reads each logit once; the backward reads it and writes its gradient.
    """
    rows_N, v, plan = load.head_rows, load.vocab_slice, load.head_blocks
    again = 2 * (1 - plan.num_kept / max(1, len(plan.blocks)))
    flops = (_products(load) + again) * rows_N * v * load.shape.hidden_size
    moved = (2 * load.logit_bytes + load.itemsize) * rows_N * v
    return flops / (gpu.bf16_flops * assumed.bf16) + moved / (gpu.memory_bytes_rate * assumed.elementwise)


def _products(load: Workload) -> int:
    return _PRODUCTS if load.config.lora.lora_rank is None else _PRODUCTS_OF_FROZEN


def _recompute(load: Workload, matrices: float, attention: float, exchanged: tuple[float, float, float]) -> float:
    """`exchanged`: a microbatch's seconds of tensor, context and expert parallelism, forward and backward."""
    tensor, context, expert = exchanged
    forward = 2 / _products(load)
    if load.config.recompute.recompute_granularity == "full":
        return matrices * forward + attention / 3 + sum(exchanged) / 2
    seconds = attention / 3 + context / 2 if "core_attn" in load.recomputed else 0.0
    if "mlp" in load.recomputed:
        mlp = load.shape.mlp_matrices * load.shape.hidden_size * load.shape.ffn_hidden_size / load.shape.layer_matrices
        seconds += mlp * matrices * forward + (expert / 2 if load.shape.num_moe_experts else tensor / 4)
    return seconds


def _data_parallel(load: Workload, busy: float, gpu: Gpu, assumed: Assumptions) -> float:
    """Reducing fp32 gradients and gathering bf16 weights, less what overlaps with half of a microbatch's time each."""
    within_node = load.sizes.model * load.data_parallel_size <= gpu.per_node
    rate = (gpu.nvlink_bytes_rate if within_node else gpu.network_bytes_rate) * assumed.links
    parallel, copies = load.config.parallel, (load.dense_copies, load.expert_copies)
    trained = trained_parameters(load, load.sizes.pipeline - 1)
    each_way = sum(number * (ranks - 1) / ranks for number, ranks in zip(trained, copies, strict=True)) / rate
    distributed = parallel.use_distributed_optimizer
    gradients, weights = (4 * each_way, load.itemsize * each_way) if distributed else (8 * each_way, 0.0)
    if parallel.overlap_grad_reduce:
        gradients = max(0.0, gradients - busy / 2)
    if parallel.overlap_param_gather:
        weights = max(0.0, weights - busy / 2)
    return gradients + weights


def _optimizer(load: Workload, gpu: Gpu, assumed: Assumptions) -> float:
    """Adam reads and writes its shard (30 bytes a parameter), the norm reads and zeroing writes all gradients."""
    last = load.sizes.pipeline - 1
    touched = 30 * optimizer_parameters(load, last) + 8 * sum(trained_parameters(load, last))
    return touched / (gpu.memory_bytes_rate * assumed.elementwise)
