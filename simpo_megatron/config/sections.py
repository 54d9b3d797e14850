"""The options of a run: one frozen dataclass per concern, every default here and nowhere else.

Field names are unique over all sections, because each is also a flag (`--weight-decay`) and a YAML key
(`weight_decay`). The sentence under a field is its `--help` text. A section checks its own fields; what needs
the number of ranks or the model's shape is checked in `resolving.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import typing
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

from simpo_megatron.config.checks import require_positive, require_writable_name
from simpo_megatron.config.lora_section import LoRAConfig
from simpo_megatron.config.monitor_section import MonitorConfig
from simpo_megatron.data import BatchOptions, PairOptions
from simpo_megatron.errors import require
from simpo_megatron.loss import CPOObjective, DPOObjective, IPOObjective, ORPOObjective, SimPOObjective
from simpo_megatron.parallel import ParallelSizes

Objective = SimPOObjective | CPOObjective | ORPOObjective | IPOObjective | DPOObjective
OBJECTIVES: dict[str, type[Objective]] = {kind().objective: kind for kind in typing.get_args(Objective)}
"""The objectives by the names that users give them; the first is the default."""

DEMO = "demo"  # as `model` or `data`: the tiny model and the preference pairs that come with the package


RECOMPUTE_MODULES = ("core_attn", "mlp", "layernorm", "moe", "moe_act")
"""The parts of a layer that megatron-core can recompute apart."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained, and where the result goes."""

    model: str | None = None
    """What to start from: a Hugging Face folder (config.json, *.safetensors, tokenizer and chat template) or a
    committed checkpoint, a run's newest one included; the word demo stands for a tiny model made on the spot."""

    export_hf: str | None = None
    """Folder for the trained model in Hugging Face form."""

    export_dtype: Literal["bfloat16", "float16", "float32", "stored"] = "bfloat16"
    """Number format of the weights in export_hf's folder; stored: that of the run's checkpoints, to the bit."""

    hidden_dropout: float = 0.0
    """Dropout after attention and MLP; off, for it makes the two responses of a pair incomparable."""

    attention_dropout: float = 0.0
    """Dropout on attention weights; off for the same reason."""

    moe_aux_loss_coeff: float | None = None
    """Weight of a mixture's load-balancing loss; router_aux_loss_coef of its config.json when not given, 0 for none."""

    def __post_init__(self) -> None:
        require_writable_name(self, "export_hf")
        for key in ("hidden_dropout", "attention_dropout"):
            found = getattr(self, key)
            require(0 <= found < 1, key, found, "a number from 0 up to, not including, 1")
        found = self.moe_aux_loss_coeff
        require(found is None or 0 <= found < math.inf, "moe_aux_loss_coeff", found, "a number not below 0")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is divided over ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every layer."""

    pipeline_model_parallel_size: int = 1
    """Stages the layers are divided into."""

    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks on each pipeline rank (interleaved schedule)."""

    context_parallel_size: int = 1
    """Ranks that share every sequence."""

    expert_model_parallel_size: int = 1
    """Ranks that share the experts of a mixture."""

    sequence_parallel: bool = False
    """Divide norms and residuals over the tensor-parallel ranks along the sequence."""

    use_distributed_optimizer: bool = False
    """Divide optimizer state over the data-parallel ranks."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""

    overlap_param_gather: bool = False
    """Gather updated parameters while the forward pass already runs; needs the distributed optimizer."""

    @property
    def sizes(self) -> ParallelSizes:
        return ParallelSizes(
            tensor=self.tensor_model_parallel_size,
            pipeline=self.pipeline_model_parallel_size,
            virtual_pipeline=self.virtual_pipeline_model_parallel_size,
            context=self.context_parallel_size,
            expert=self.expert_model_parallel_size,
        )

    def __post_init__(self) -> None:
        require_positive(
            self,
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
        )
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "sequence_parallel",
            True,
            "tensor_model_parallel_size above 1: there is nothing to divide over one rank",
        )
        require(
            (self.virtual_pipeline_model_parallel_size or 1) == 1 or self.pipeline_model_parallel_size > 1,
            "virtual_pipeline_model_parallel_size",
            self.virtual_pipeline_model_parallel_size,
            "pipeline_model_parallel_size above 1: one stage cannot be interleaved",
        )
        require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "overlap_param_gather",
            True,
            "use_distributed_optimizer and overlap_grad_reduce with it",
        )


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats."""

    bf16: bool = True
    """Weights and activations in bfloat16, gradients and sums in fp32; --fp32 for all of it in fp32."""

    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = None
    """Matrix products of the layers in FP8 by this recipe of Transformer Engine; mxfp8 needs Blackwell."""

    fp8_param_gather: bool = False
    """Keep the layers' matrices in FP8 alone, and gather them so after an update; fp32 masters stay in the distributed
    optimizer, and checkpoints and exports are written from them in bf16."""

    def __post_init__(self) -> None:
        require(self.fp8_recipe is None or self.bf16, "fp8_recipe", self.fp8_recipe, "bf16 and not fp32 beside it")
        # Delayed scaling would round the weights that are loaded by a scale of 1, before it has seen any.
        require(
            not self.fp8_param_gather or self.fp8_recipe in ("tensorwise", "blockwise"),
            "fp8_param_gather",
            True,
            f"fp8_recipe tensorwise or blockwise with it, found {self.fp8_recipe or 'none'}",
        )


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """Memory bought with time: activations computed again in the backward pass."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers (full) or only the costly parts (selective) in the backward pass."""

    recompute_method: Literal["uniform", "block"] | None = None
    """With full: all layers in units of recompute_num_layers (uniform, the default then) or only the first
    recompute_num_layers of each stage (block)."""

    recompute_num_layers: int | None = None
    """With full: layers per unit (uniform) or layers recomputed (block); 1 when not given."""

    recompute_modules: tuple[str, ...] = ("core_attn",)
    """With selective: the parts of a layer to recompute, by megatron-core's names: core_attn, mlp, layernorm, moe,
    moe_act."""

    def __post_init__(self) -> None:
        require_positive(self, "recompute_num_layers")
        for module in self.recompute_modules:
            require(module in RECOMPUTE_MODULES, "recompute_modules", module, " or ".join(RECOMPUTE_MODULES))
        if self.recompute_granularity == "full":
            object.__setattr__(self, "recompute_method", self.recompute_method or "uniform")
            object.__setattr__(self, "recompute_num_layers", self.recompute_num_layers or 1)
            return
        for key in ("recompute_method", "recompute_num_layers"):
            found = getattr(self, key)
            require(found is None, key, found, "recompute_granularity full with it")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Preference files."""

    data: tuple[str, ...] = ()
    """Preference files to train on (JSONL, JSON, parquet, a datasets folder, hub:NAME), or weights and files
    in turn; the word demo stands for the pairs that come with the package."""

    valid_data: tuple[str, ...] = ()
    """Held-out preference files. NAME=FILE NAME=FILE evaluates sets by name, as valid/NAME/...; the first one
    decides which checkpoint is best."""

    valid_fraction: float = 0.0
    """Share of the training pairs held out for evaluation, when there are no files of their own."""

    data_cache: str | None = None
    """Folder for tokenised data, made once and shared by all runs; beside the run's folder when not given."""

    def __post_init__(self) -> None:
        require_writable_name(self, "data_cache")
        require(0 <= self.valid_fraction < 1, "valid_fraction", self.valid_fraction, "a share in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many pairs a step takes, and how they are laid out."""

    global_batch_size: int = BatchOptions.global_batch_size
    """Pairs per optimizer step over all ranks; the authors hold it at 128."""

    packing: bool = BatchOptions.packing
    """Put pairs one behind the other into packs without padding."""

    prefix_sharing: bool = BatchOptions.prefix_sharing
    """Compute the prompt of a pair once for both responses."""

    tokens_per_microbatch: int = BatchOptions.tokens_per_microbatch
    """Tokens of a pack, at most."""

    micro_batch_size: int = BatchOptions.micro_batch_size
    """Pairs per microbatch with --no-packing."""

    def __post_init__(self) -> None:
        require_positive(self, "global_batch_size", "micro_batch_size", "tokens_per_microbatch")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 5e-7
    """Highest learning rate of AdamW; the authors search 3e-7 to 1e-6 and see 1e-5 fall into repetition."""

    min_lr: float = 0.0
    """Learning rate at the end of the decay."""

    lr_warmup_fraction: float = 0.1
    """Share of the steps over which the learning rate rises from 0."""

    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from lr to min_lr after the warm-up."""

    weight_decay: float = 0.0
    """Decoupled weight decay; never on biases and norms."""

    adam_beta1: float = 0.9
    """Decay of AdamW's average gradient."""

    adam_beta2: float = 0.999
    """Decay of AdamW's average squared gradient."""

    adam_eps: float = 1e-8
    """Added to AdamW's denominator."""

    clip_grad: float = 1.0
    """Largest norm of the whole gradient; 0 leaves it alone."""

    epochs: int = 1
    """Passes over the training pairs; train_iters takes its place."""

    train_iters: int | None = None
    """Optimizer steps, instead of epochs."""

    def __post_init__(self) -> None:
        require_positive(self, "lr", "adam_eps", "epochs", "train_iters")
        require(0 <= self.min_lr <= self.lr, "min_lr", self.min_lr, f"a number from 0 to lr ({self.lr})")
        for key in ("lr_warmup_fraction", "adam_beta1", "adam_beta2"):
            found = getattr(self, key)
            require(0 <= found < 1, key, found, "a number from 0 up to, not including, 1")
        for key in ("weight_decay", "clip_grad"):
            found = getattr(self, key)
            require(0 <= found < math.inf, key, found, "a number not below 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run writes, how often, and how it continues."""

    preset: str | None = None
    """Published settings to start from; see the list below."""

    seed: int = 42
    """Seed of the pairs' order, of new weights and of dropout."""

    save: str | None = None
    """Folder of the run: checkpoints, config.yaml, metrics.jsonl, report; nothing is written without it."""

    save_interval: int | None = None
    """Steps between checkpoints; only at the end when not given."""

    resume: str = "latest"
    """Checkpoint in save to continue from: latest (if any), required (an error if none), none, or a step."""

    override_on_resume: bool = False
    """Continue although objective, schedule, batch size, tokenizer or data changed since the checkpoint."""

    keep_checkpoints: int = 2
    """Newest checkpoints to keep; the one with the best held-out accuracy stays as well."""

    async_save: bool = False
    """Write checkpoints while training goes on; the host's memory then holds a copy of each rank's share meanwhile."""

    on_save_failure: Literal["stop", "continue"] = "stop"
    """What a checkpoint that cannot be written means: the end of the run, or a warning, as long as steps follow."""

    eval_interval: int | None = None
    """Steps between evaluations on held-out pairs; only before and after training when not given."""

    log_interval: int = 1
    """Steps between log lines."""

    skip_nonfinite_steps: int = 0
    """Steps with a loss or gradient that is not finite to leave out, at most, before the run stops; resumes count."""

    distributed_timeout_seconds_after_init: int = 600
    """Longest that a step may last; then the rank that did not arrive is named and the run ends."""

    tensorboard_dir: str | None = None
    """Folder for TensorBoard."""

    wandb_project: str | None = None
    """Project on Weights & Biases; its key comes from the environment and is never stored."""

    def __post_init__(self) -> None:
        require_writable_name(self, "save", "tensorboard_dir", "wandb_project")
        require_positive(self, "save_interval", "eval_interval", "log_interval", "keep_checkpoints")
        require_positive(self, "distributed_timeout_seconds_after_init")
        require(self.skip_nonfinite_steps >= 0, "skip_nonfinite_steps", self.skip_nonfinite_steps, "0 or more")
        require(0 <= self.seed < 2**31, "seed", self.seed, "a whole number from 0 to 2147483647")
        require(
            re.fullmatch(r"latest|required|none|[0-9]{1,9}", self.resume) is not None,
            "resume",
            self.resume,
            "latest, required, none or a step number",
        )
        require(
            self.save_interval is None or self.save is not None,
            "save_interval",
            self.save_interval,
            "save with it: there is no folder to save in",
        )
        require(
            self.resume in ("latest", "none") or self.save is not None,
            "resume",
            self.resume,
            "save with it: there is no folder to continue from",
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run is told. Sections group the options for the reader; their names are flat."""

    objective: Objective = field(default_factory=SimPOObjective)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pairs: PairOptions = field(default_factory=PairOptions)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    run: RunConfig = field(default_factory=RunConfig)
    monitors: MonitorConfig = field(default_factory=MonitorConfig)

    def flat(self) -> dict[str, object]:
        """Every option's value by its name, in the order of the sections."""
        return {key: value for section in asdict(self).values() for key, value in section.items()}

    def fingerprint(self, *sections: str) -> str:
        """16 hex digits that differ when an option of `sections` (all, when none is named) differs."""
        named = asdict(self)
        chosen = {name: named[name] for name in sections or [entry.name for entry in fields(self)]}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]
