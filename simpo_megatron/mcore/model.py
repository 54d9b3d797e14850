"""megatron-core's GPTModel with one change at each end: positions from the layout, log-probs instead of logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor

from simpo_megatron.config import Config
from simpo_megatron.loss import ResponseTokens, VocabShard, fused_linear_log_probs
from simpo_megatron.mcore import device
from simpo_megatron.mcore.architecture import ArchitectureConfig
from simpo_megatron.mcore.attention.rotary import concentration, scaled_frequencies
from simpo_megatron.mcore.families import ModelDescription, padded_vocab_size
from simpo_megatron.mcore.layers import MainGradEmbedding, load_balancing_coefficient
from simpo_megatron.mcore.lora import add_adapters
from simpo_megatron.mcore.microbatch import MicrobatchLayout
from simpo_megatron.mcore.precision import precision_options
from simpo_megatron.mcore.specs import block_spec
from simpo_megatron.parallel import ParallelGroups


class LogProbHead(ColumnParallelLinear):
    """megatron's output layer, returning log-probs of the response tokens instead of logits.

    The layer itself computes them, not a function beside it: DistributedDataParallel waits for gathered parameters in
    hooks on the layer's forward. Without these hooks the head would read stale weights under `overlap_param_gather`.
    """

    true_vocab_size: int
    logit_dtype: torch.dtype | None = None

    def forward(self, input_: Tensor, weight: Tensor | None = None, *, labels: ResponseTokens | None = None) -> Tensor:
        """fp32 [N] log-probs of `labels` with gradients, or this rank's logits [S, B, v] where there are none."""
        cap = self.config.final_logit_softcapping
        if self.config.logits_scaling != 1:
            input_ = input_ / self.config.logits_scaling
        if labels is None:
            logits = super().forward(input_, weight)[0]
            return logits if cap is None else cap * torch.tanh(logits / cap)
        return fused_linear_log_probs(
            input_,
            self.weight if weight is None else weight,
            labels,
            vocab=VocabShard(start=self.tp_group.rank() * self.output_size_per_partition, size=self.true_vocab_size),
            tp_group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
            logit_softcap=cap,
            logit_dtype=self.logit_dtype,
            accumulate_into_main_grad=True,
        )


class PreferenceGPTModel(GPTModel):
    """GPTModel over one microbatch of pairs, whose `labels` are the response tokens to predict.

    As in megatron, `forward` without labels returns logits. With `labels=ResponseTokens(...)` the last stage returns
    their fp32 [N] log-probs, natural log.
    """

    def __init__(
        self,
        *args: Any,
        true_vocab_size: int,
        logit_dtype: torch.dtype | None = None,
        inverse_frequencies: Tensor | None = None,
        padding_idx: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # GPTModel builds the embedding and the output layer itself and takes no other classes for them.
        if self.pre_process:
            self.embedding.word_embeddings.__class__ = MainGradEmbedding
            self.embedding.word_embeddings.padding_idx = padding_idx
        if self.post_process:
            self.output_layer.__class__ = LogProbHead
            self.output_layer.true_vocab_size = true_vocab_size
            self.output_layer.logit_dtype = logit_dtype
        if self.config.latent is not None:
            # megatron's is as wide as a value.
            self.rotary_pos_emb = self._rotary_embedding(self.config.latent.qk_pos_emb_head_dim, kwargs["rotary_base"])
        # Frequencies are picked by position below, and not cut a second time under context parallelism.
        self.rotary_pos_emb.cp_group = None
        self.windowed_rotary_pos_emb = None
        if self.config.windowed_rotary_base is not None:
            base = self.config.windowed_rotary_base
            self.windowed_rotary_pos_emb = self._rotary_embedding(self.config.kv_channels, base)
            self.windowed_rotary_pos_emb.cp_group = None
        if inverse_frequencies is not None:
            self.rotary_pos_emb.inv_freq = inverse_frequencies.to(self.rotary_pos_emb.inv_freq.device)

    def _rotary_embedding(self, size: int, base: float) -> RotaryEmbedding:
        return RotaryEmbedding(
            size,
            rotary_percent=1.0,
            rotary_interleaved=self.config.rotary_interleaved,
            rotary_base=base,
            use_cpu_initialization=self.config.use_cpu_initialization,
        )

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple:
        """megatron's embedding, scaled, and rotary frequencies, put in the order of the pack's positions."""
        hidden, frequencies, cosine, sine, offset, _, *rest = super()._preprocess(
            input_ids, position_ids, *args, **kwargs
        )
        multiplier = self.config.embedding_multiplier
        if hidden is not None and multiplier != 1:
            hidden = hidden * torch.tensor(multiplier, dtype=hidden.dtype)
        if hidden is not None and torch.is_grad_enabled():
            # Also after a frozen embedding: activation recomputation needs an input that requires a gradient.
            hidden.requires_grad_()
        layout = kwargs.get("packed_seq_params")
        if self.windowed_rotary_pos_emb is not None:
            frequencies = torch.stack((frequencies, self.windowed_rotary_pos_emb(len(frequencies))))
        if isinstance(layout, MicrobatchLayout) and layout.position_ids_S is not None:
            # The positions are the fourth dimension from the right, [S, 1, 1, D].
            frequencies = frequencies.index_select(-4, layout.position_ids_S)
        return hidden, frequencies, cosine, sine, offset, self._padding(layout), *rest

    def _padding(self, layout: Any) -> Tensor | None:
        """bool [B, S], True for padding among the tokens that this rank routes; None of a dense model.

        megatron's own argument for it is divided over tensor-parallel ranks on the first pipeline stage only.
        """
        if self.config.num_moe_experts is None or not isinstance(layout, MicrobatchLayout) or layout.padding_BS is None:
            return None
        if not self.config.sequence_parallel:
            return layout.padding_BS
        tp_group = self.pg_collection.tp
        return layout.padding_BS.chunk(tp_group.size(), dim=1)[tp_group.rank()]

    def _postprocess(
        self, hidden_states: Tensor, *args: Any, labels: ResponseTokens | None = None, **kwargs: Any
    ) -> Tensor:
        """Hidden states between stages; from the last, log-probs of `labels`, or logits [B, S, v] without labels."""
        if not self.post_process:
            return hidden_states
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        output = self.output_layer(hidden_states, weight, labels=labels)
        return output.transpose(0, 1).contiguous() if labels is None else output


def transformer_config(description: ModelDescription, config: Config) -> ArchitectureConfig:
    """megatron's TransformerConfig: the architecture from `description`, everything else from `config`."""
    sizes = config.parallel.sizes
    interleaved = sizes.virtual_pipeline is not None
    rotary = scaled_frequencies(description.hf_config, config.pairs.max_length)
    attention_factor = 1.0 if rotary is None else rotary.attention_factor
    return ArchitectureConfig(
        **{**description.transformer, **_moe(description, config)},
        **concentration(attention_factor),
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual_pipeline,
        context_parallel_size=sizes.context,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=config.parallel.sequence_parallel,
        tp_comm_overlap=config.parallel.tp_comm_overlap,
        attention_softmax_in_fp32=True,
        hidden_dropout=config.model.hidden_dropout,
        attention_dropout=config.model.attention_dropout,
        recompute_granularity=config.recompute.recompute_granularity,
        recompute_method=config.recompute.recompute_method,
        recompute_num_layers=config.recompute.recompute_num_layers,
        recompute_modules=config.recompute.recompute_modules,
        # The step's loss is a sum over pairs; finalize_model_grads divides by the pairs of the whole global batch.
        calculate_per_token_loss=True,
        # All microbatches of a step have one shape, so stages need not ask for it before each message.
        variable_seq_lengths=False,
        moe_token_dispatcher_type="alltoall",  # noqa: S106 - no secret, whatever its name says
        # With two stages, interleaving over megatron's default batched p2p gives silently wrong gradients.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # Synchronises the device after every message, for a bug in versions of torch older than ours. The schedule
        # waits for each message anyway.
        batch_p2p_sync=False,
        deterministic_mode=config.run.deterministic,
        use_cpu_initialization=not device.has_cuda(),
        perform_initialization=False,
        **precision_options(config.precision),
        **_fusions(description, config, attention_factor),
    )


def _moe(description: ModelDescription, config: Config) -> dict[str, Any]:
    """Arguments for the routing and the experts of an MoE; none for a dense model."""
    if "num_moe_experts" not in description.transformer:
        return {}
    has_engine = device.has_cuda() and device.machine().has_transformer_engine
    return {
        "moe_aux_loss_coeff": load_balancing_coefficient(description, config.model.moe_aux_loss_coeff),
        "moe_router_load_balancing_type": "aux_loss",
        "moe_router_dtype": "fp32" if config.precision.bf16 else None,
        # All experts of a rank in one kernel, which only Transformer Engine has.
        "moe_grouped_gemm": device.uses_transformer_engine(bf16=config.precision.bf16),
        # Without its kernels, megatron's permutation of tokens waits for the device twice a layer to learn the number
        # of its outputs. They are not known to be deterministic.
        "moe_permute_fusion": has_engine and not config.run.deterministic,
    }


def _fusions(description: ModelDescription, config: Config, attention_factor: float) -> dict[str, Any]:
    """Fused kernels where there is a GPU; on the CPU they would compile for seconds or are not there at all."""
    fused = device.has_cuda()
    is_swiglu = description.transformer["activation_func"] is F.silu and description.transformer["gated_linear_unit"]
    return {
        "bias_activation_fusion": fused and is_swiglu,
        # With this option the layer's spec brings its own activation; experts multiply by token weights in between.
        "use_te_activation_func": not fused and is_swiglu and "num_moe_experts" not in description.transformer,
        "bias_dropout_fusion": fused,
        "masked_softmax_fusion": fused,
        # The fused kernel takes no factor on sine and cosine.
        "apply_rope_fusion": fused and device.machine().has_transformer_engine and attention_factor == 1,
        "persist_layer_norm": False,
        # Frozen weights have no `main_grad` to add to.
        "gradient_accumulation_fusion": device.fuses_weight_gradients() and config.lora.lora_rank is None,
    }


def build_model(description: ModelDescription, config: Config, groups: ParallelGroups) -> list[PreferenceGPTModel]:
    """This rank's model chunks, one per virtual pipeline stage, with weights allocated and not yet set."""
    mcore_config = transformer_config(description, config)
    rotary = scaled_frequencies(description.hf_config, config.pairs.max_length)
    num_chunks = groups.sizes.virtual_pipeline or 1
    chunks = []
    for stage in range(num_chunks):
        vp_stage = stage if num_chunks > 1 else None
        chunk = PreferenceGPTModel(
            mcore_config,
            block_spec(
                mcore_config,
                vp_stage,
                transformer_engine=device.uses_transformer_engine(bf16=config.precision.bf16),
                fuse_norms=config.lora.lora_rank is None,
            ),
            padded_vocab_size(description.vocab_size, groups.tp.size()),
            pre_process=groups.is_first_stage and stage == 0,
            post_process=groups.is_last_stage and stage == num_chunks - 1,
            vp_stage=vp_stage,
            true_vocab_size=description.vocab_size,
            logit_dtype=None if config.precision.logit_dtype is None else torch.float32,
            inverse_frequencies=None if rotary is None else rotary.inverse,
            padding_idx=description.padding_idx,
            **description.gpt,
        )
        _mark_divided_weights(chunk)
        mark_experts(chunk)
        if config.lora.lora_rank is not None:
            add_adapters(chunk, config.lora, tp_group=groups.tp, seed=config.run.seed)
        chunks.append(chunk.to(device.current_device()))
    return chunks


def zero_weights(chunks: list[PreferenceGPTModel]) -> None:
    """Zero the weights before a checkpoint fills them: at a smaller tp, it lacks rows that pad the vocabulary."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                # A checkpoint fills FP8 weights completely: none of them has a vocabulary dimension.
                if not is_float8tensor(parameter):
                    parameter.zero_()


def _mark_divided_weights(chunk: PreferenceGPTModel) -> None:
    """Mark each weight whose shards are on different tensor-parallel ranks.

    Up to megatron-core 0.16 only the initialisation of weights, which we skip, sets the mark. An unmarked weight counts
    as a replica: the gradient norm, and clipping, would ignore the shards of all ranks but the first.
    """
    divided_dimension = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in chunk.modules():
        for kind, dimension in divided_dimension.items():
            if not isinstance(module, kind) or module.weight is None or hasattr(module.weight, "partition_dim"):
                continue
            set_tensor_model_parallel_attributes(module.weight, True, dimension, 1)


def mark_experts(chunk: PreferenceGPTModel) -> None:
    """Mark experts for DDP and optimizer: their replicas are on other ranks than those of dense weights.

    megatron marks them only under expert parallelism. But without it, too, every tensor-parallel rank has a replica of
    each expert, with the gradient of its own tokens only. It also marks their biases as those of a layer that ranks
    share; their gradients would then be summed twice. And up to megatron-core 0.16 the gradient norm would leave out
    the second bias of experts on all tensor-parallel ranks but the first.
    """
    for name, parameter in chunk.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = parameter.sequence_parallel = False
            parameter.tensor_model_parallel = True
    for name, module in chunk.named_modules():
        if ".mlp.experts." in name and isinstance(module, RowParallelLinear) and module.bias is not None:
            # megatron adds the bias in place, which autograd forbids for the view that a group of one rank returns.
            module.register_forward_hook(lambda layer, _, outputs: (outputs[0].clone(), outputs[1]))


def wrap_in_ddp(chunks: list[PreferenceGPTModel], config: Config) -> list[DistributedDataParallel]:
    """The chunks under megatron's DistributedDataParallel, gradients accumulated and reduced in fp32."""
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_param_gather=config.precision.fp8_param_gather,
    )
    return [
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
