"""Megatron's schedules on every rank of a layout in turn, recorded: with our settings, and over chunks or our model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from nccl_rules import Program
from recorded_calls import Recorder, fake_rank

from simpo_megatron import parallel
from simpo_megatron.config import Config, Machine, config_from, resolve
from simpo_megatron.data import TokenizedPair, collate
from simpo_megatron.loss import SimPOObjective
from simpo_megatron.mcore.families import ModelDescription, describe_hf_config
from simpo_megatron.mcore.forward_step import ForwardStep
from simpo_megatron.mcore.layers import LoadBalancedRouter
from simpo_megatron.mcore.microbatch import to_microbatch
from simpo_megatron.mcore.model import build_model, transformer_config, zero_weights
from simpo_megatron.mcore.optimizer import update, zero_gradients
from simpo_megatron.training.start.setup import build_trainer
from simpo_megatron.training.step import batch_options, run_schedule

_HIDDEN, _LENGTH = 16, 8


def description_of(num_layers: int, *, tied: bool = False, num_experts: int = 0) -> ModelDescription:
    """The smallest model of so many layers."""
    config = {
        "model_type": "mixtral" if num_experts else "llama",
        "hidden_act": "silu",
        "num_hidden_layers": num_layers,
        "hidden_size": _HIDDEN,
        "intermediate_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "vocab_size": 32,
        "tie_word_embeddings": tied,
    }
    experts = {"num_local_experts": num_experts, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
    return describe_hf_config(config | (experts if num_experts else {}), "config.json")


class _Chunk(torch.nn.Module):
    """A model chunk that multiplies: schedules ask no more of one."""

    def __init__(self, config: Any, vp_stage: int | None) -> None:
        super().__init__()
        self.config, self.vp_stage = config, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.weight = torch.nn.Parameter(torch.ones(_HIDDEN))
        self._received: torch.Tensor | None = None

    def set_input_tensor(self, tensor: Any) -> None:
        self._received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, own: torch.Tensor) -> torch.Tensor:
        return (own if self._received is None else self._received) * self.weight


def _step(iterator: Any, model: _Chunk) -> tuple:
    output = model(next(iterator))
    return output, lambda result: (result.sum(), torch.tensor(1), {})


def record_chunks(
    pp: int, vpp: int, num_microbatches: int, *, num_experts: int = 0, num_steps: int = 2, **settings: Any
) -> dict[int, Program]:
    """The programs of the ranks of a pipeline alone, `num_steps` steps; `settings` of megatron's override ours."""
    config = config_from(model="m", data=("d",), fp32=True, pp=pp, vpp=vpp if vpp > 1 else None)
    own = transformer_config(description_of(pp * vpp, num_experts=num_experts), config)
    own.num_moe_experts = None
    for name, value in settings.items():
        assert hasattr(own, name), name
        setattr(own, name, value)
    return {rank: _record_chunks(rank, own, config, num_microbatches, num_steps) for rank in range(pp)}


def _record_chunks(rank: int, own: Any, config: Config, num_microbatches: int, num_steps: int) -> Program:
    sizes = config.parallel.sizes
    shape = (_LENGTH, 1, _HIDDEN)
    recorder = Recorder(rank, shape)
    with fake_rank(rank, sizes.pipeline):
        parallel.initialize(sizes, backend="fake")
        stages = range(sizes.virtual_pipeline or 1)
        chunks = [_Chunk(own, stage if len(stages) > 1 else None) for stage in stages]
        with recorder.active():
            for _ in range(num_steps):
                data = [iter([torch.ones(shape)] * num_microbatches) for _ in chunks]
                get_forward_backward_func()(
                    forward_step_func=_step,
                    data_iterator=data,
                    model=chunks,
                    num_microbatches=num_microbatches,
                    seq_length=_LENGTH,
                    micro_batch_size=1,
                    forward_only=False,
                )
    return recorder.program


@contextmanager
def even_counts() -> Iterator[None]:
    """While this lasts, each expert gets as many tokens as the others: the fake backend gathers no counts of them."""
    num_routed = 0
    route = LoadBalancedRouter.routing

    def routing(router: LoadBalancedRouter, logits: torch.Tensor, **mask: torch.Tensor | None) -> tuple:
        nonlocal num_routed
        num_routed = logits.shape[0] * logits.shape[1] * router.topk
        return route(router, logits, **mask)

    def counts(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return tensor
        even = torch.full(tensor.shape, num_routed // tensor.numel())
        return even.tolist() if as_numpy else even

    with (
        mock.patch.object(LoadBalancedRouter, "routing", routing),
        mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", counts),
        # A backward without a schedule, as of another test, leaves a scale of a shape that schedules do not take.
        mock.patch.object(MoEAuxLossAutoScaler, "main_loss_backward_scale", None),
    ):
        yield


def record_model(
    world_size: int, num_microbatches: int, *, tied: bool = False, num_experts: int = 0, **options: Any
) -> dict[int, Program]:
    """The programs of all ranks of a step of our model: schedule, reduction of gradients, update."""
    config = config_from(model="m", data=("d",), fp32=True, **options)
    sizes = config.parallel.sizes
    num_layers = sizes.pipeline * (sizes.virtual_pipeline or 1)
    description = description_of(num_layers, tied=tied, num_experts=num_experts)
    return {rank: _record_model(rank, world_size, config, description, num_microbatches) for rank in range(world_size)}


def _record_model(
    rank: int, world_size: int, config: Config, description: ModelDescription, num_microbatches: int
) -> Program:
    layout = resolve(config, world_size=world_size, model=description.transformer, machine=Machine())
    part = _LENGTH // (config.parallel.sizes.tensor if config.parallel.sequence_parallel else 1)
    recorder = Recorder(rank, (part, 1, _HIDDEN))
    ids = np.arange(1, 7, dtype=np.int32)
    with fake_rank(rank, world_size):
        groups = parallel.initialize(config.parallel.sizes, backend="fake")
        parallel.seed_everything(1)
        model = build_model(description, config, groups)
        zero_weights(model)
        options = batch_options(config, layout, pad_id=0)
        trainer = build_trainer(model, config, groups, layout, options, train_iters=2)
        batch = collate([TokenizedPair(ids[:2], ids[:3], ids[3:])], [0], options)
        microbatches = [to_microbatch(batch, torch.device("cpu"))] * num_microbatches
        with recorder.active(), even_counts():
            for _ in range(2):
                zero_gradients(trainer.chunks, trainer.optimizer)
                step = ForwardStep(objective=SimPOObjective(), pairs_per_chosen_token=1.0)
                run_schedule(trainer, microbatches, step, forward_only=False)
                # What the fake backend leaves in a buffer is no number, and would be refused.
                for chunk in trainer.chunks:
                    chunk.zero_grad_buffer()
                update(trainer.optimizer, trainer.scheduler)
    return recorder.program
