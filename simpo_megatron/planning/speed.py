"""Seconds of a training step by part, from operations and bytes over assumed rates.

Tensor- and context-parallel collectives are not overlapped with compute, data-parallel ones are as far as the options
say; the slowest pipeline stage sets the pace. Operations count a multiplication and an addition as two.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from simpo_megatron.planning.gpus import ASSUMED, Assumptions, Gpu
from simpo_megatron.planning.parameters import optimizer_parameters, trained_parameters
from simpo_megatron.planning.workload import Workload


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
    share = tokens / load.pack.tokens
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
    """Operations of one data-parallel rank's step that training needs, recomputation apart, over its whole model."""
    share = tokens / load.pack.tokens * load.num_microbatches
    shape, pack, products = load.shape, load.pack, _products(load)
    layers = shape.num_layers * (products * pack.tokens * shape.layer_matrices + 12 * pack.attended * shape.query_size)
    return share * (layers + products * pack.response_rows * shape.vocab_size * shape.hidden_size)


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
    head = products * pack.response_rows * share * shape.vocab_size * shape.hidden_size / ranks / bf16
    # Forward and backward read or write about 16 activations of [S, H / s] and 8 of [S, F / tp] a layer.
    touched = (16 * shape.hidden_size / load.sequence_ranks + 8 * shape.ffn_hidden_size / sizes.tensor) * tokens * e
    elementwise = touched * layers / (gpu.memory_bytes_rate * assumed.elementwise)
    # Two all-gathers and two reduce-scatters of [S, H] a layer, forward as backward (two all-reduces without
    # sequence parallelism: the same bytes); experts are whole, and only attention has its half of them.
    gathered = tokens * shape.hidden_size * e * (sizes.tensor - 1) / sizes.tensor
    nvlink, network = gpu.nvlink_bytes_rate * assumed.links, gpu.network_bytes_rate * assumed.links
    tensor_parallel = (4 if shape.num_moe_experts else 8) * gathered * layers / nvlink
    # One all-to-all to the experts and one back, forward as backward, of every token as often as it has experts.
    routed = tokens / load.sequence_ranks * shape.moe_router_topk * shape.hidden_size * e
    elsewhere = routed * (sizes.expert - 1) / sizes.expert
    expert_parallel = 4 * elsewhere * layers / (nvlink if sizes.expert <= gpu.per_node else network)
    # One all-gather of keys and values a layer, and one reduce-scatter backward.
    keys = 2 * tokens * shape.key_size / sizes.tensor * e * (sizes.context - 1)
    context_parallel = 2 * keys * layers / (nvlink if ranks <= gpu.per_node else network)
    num_chunks = sizes.virtual_pipeline or 1
    sent = 2 * num_chunks * load.hidden_bytes * share if sizes.pipeline > 1 else 0.0
    # Plain 1F1B waits for its messages; interleaving sends more of them and hides, it is assumed, half.
    messages = sent / network * (0.5 if num_chunks > 1 else 1.0)
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


def _products(load: Workload) -> int:
    """Operations for each weight and token: three products, or two of a frozen weight, which gets no gradient."""
    return 6 if load.config.lora.lora_rank is None else 4


def _recompute(load: Workload, matrices: float, attention: float, exchanged: tuple[float, float, float]) -> float:
    """`exchanged`: a microbatch's seconds of tensor, context and expert parallelism, forward and backward."""
    tensor, context, expert = exchanged
    forward = 2 / _products(load)
    if load.config.recompute.recompute_granularity == "full":
        return matrices * forward + attention / 3 + sum(exchanged) / 2
    seconds = attention / 3 + context / 2 if "core_attn" in load.recomputed else 0.0
    if "mlp" in load.recomputed:
        mlp = 3 * load.shape.hidden_size * load.shape.ffn_hidden_size / load.shape.layer_matrices
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
