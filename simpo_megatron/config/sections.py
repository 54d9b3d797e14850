"""Options of a run: one frozen dataclass per concern, every default here and nowhere else.

Field names are unique over all sections, because each is also a flag (`--weight-decay`) and a YAML key
(`weight_decay`). `option` holds its help text. A section checks its own fields; what needs the number of ranks or
the model's shape is checked in `resolving.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import typing
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

from simpo_megatron.config.checks import require_writable_name
from simpo_megatron.config.lora_section import LoRAConfig
from simpo_megatron.config.monitor_section import MonitorConfig
from simpo_megatron.config.optimizer_section import OptimizerConfig
from simpo_megatron.config.profiling_section import ProfilingConfig
from simpo_megatron.data import BatchConfig, PairOptions
from simpo_megatron.errors import require, require_positive
from simpo_megatron.loss import CPOObjective, DPOObjective, IPOObjective, ORPOObjective, SimPOObjective
from simpo_megatron.option_field import option
from simpo_megatron.parallel_sizes import ParallelSizes

Objective = SimPOObjective | CPOObjective | ORPOObjective | IPOObjective | DPOObjective
OBJECTIVES: dict[str, type[Objective]] = {kind().objective: kind for kind in typing.get_args(Objective)}
"""The objectives by the names that users give them; the first is the default."""

DEMO = "demo"  # as `model` or `data`: the tiny model and the preference pairs that come with the package


RECOMPUTE_MODULES = ("core_attn", "mlp", "layernorm", "moe", "moe_act")
"""Parts of a layer that megatron-core can recompute on their own."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to train and where the result goes."""

    model: str | None = option(
        None,
        "Folder or hub name of a model, checkpoint, folder of a run, or demo. A Hugging Face folder has "
        "config.json, *.safetensors, the tokenizer and its chat template; OWNER/NAME@REVISION is one of the hub's; of "
        "a run's folder the newest checkpoint is taken; demo is a tiny model made on the spot.",
        everyday=True,
        metavar="DIR",
    )
    hf_config: str | None = option(
        None,
        "Folder or hub name of config.json and tokenizer, for a model that is a checkpoint of Megatron-LM or "
        "Megatron-Bridge (torch_dist).",
        metavar="DIR",
    )
    export_hf: str | None = option(
        None, "Folder for the trained model in Hugging Face format.", everyday=True, metavar="DIR"
    )
    export_dtype: Literal["bfloat16", "float16", "float32", "stored"] = option(
        "bfloat16", "Dtype of the weights in export_hf; stored keeps that of the run's checkpoints, bit for bit."
    )
    push_to_hub: str | None = option(
        None,
        "Name on the hub, OWNER/NAME, to push export_hf to at the end, or export_adapter without it. The token is "
        "huggingface_hub's own; what fails costs a warning.",
        metavar="NAME",
    )
    hub_private_repo: bool = option(False, "Make that repository a private one; push to no public one.")
    hidden_dropout: float = option(
        0.0, "Dropout after attention and MLP. Off by default: it makes the two responses of a pair incomparable."
    )
    attention_dropout: float = option(0.0, "Dropout on attention weights. Off for the same reason.")
    moe_aux_loss_coeff: float | None = option(
        None,
        "Weight of the load-balancing loss of each MoE layer, megatron-core's: over all layers it is several times as "
        "strong as transformers' router_aux_loss_coef of the same number, and the run says how many. When not given, "
        "what transformers' trainers do: that of config.json where it sets output_router_logits, else 0.",
    )

    def __post_init__(self) -> None:
        require_writable_name(self, "export_hf")
        name = self.push_to_hub
        is_name = name is None or re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name) is not None
        require(is_name, "push_to_hub", name, "OWNER/NAME of the hub")
        require(name is not None or not self.hub_private_repo, "hub_private_repo", True, "push_to_hub with it")
        for key in ("hidden_dropout", "attention_dropout"):
            found = getattr(self, key)
            require(0 <= found < 1, key, found, "a number from 0 up to, not including, 1")
        found = self.moe_aux_loss_coeff
        require(found is None or 0 <= found < math.inf, "moe_aux_loss_coeff", found, "a number not below 0")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallel layout."""

    tensor_model_parallel_size: int = option(1, "Tensor parallelism: ranks that shard a layer.", everyday=True)
    pipeline_model_parallel_size: int = option(1, "Pipeline parallelism: stages of layers.", everyday=True)
    virtual_pipeline_model_parallel_size: int | None = option(
        None, "Model chunks per pipeline rank (interleaved schedule)."
    )
    context_parallel_size: int = option(1, "Context parallelism: ranks that shard a sequence.", everyday=True)
    expert_model_parallel_size: int = option(1, "Expert parallelism: ranks that share MoE experts.", everyday=True)
    sequence_parallel: bool = option(
        False, "Shard norms and residuals along the sequence over the tp ranks.", everyday=True
    )
    use_distributed_optimizer: bool = option(
        False, "Shard optimizer state over the data-parallel ranks.", everyday=True
    )
    overlap_grad_reduce: bool = option(False, "Overlap the gradient reduction with the backward pass.")
    overlap_param_gather: bool = option(
        False, "Overlap the parameter all-gather with the forward pass; needs the distributed optimizer."
    )
    tp_comm_overlap: bool = option(
        False,
        "Overlap tensor-parallel collectives with matrix products; needs Transformer Engine and fixed_pack_length.",
    )

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
            "tensor_model_parallel_size above 1; there is nothing to shard over one rank",
        )
        require(
            (self.virtual_pipeline_model_parallel_size or 1) == 1 or self.pipeline_model_parallel_size > 1,
            "virtual_pipeline_model_parallel_size",
            self.virtual_pipeline_model_parallel_size,
            "pipeline_model_parallel_size above 1; one stage cannot be interleaved",
        )
        require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "overlap_param_gather",
            True,
            "use_distributed_optimizer and overlap_grad_reduce with it",
        )
        require(
            not self.tp_comm_overlap or self.sequence_parallel,
            "tp_comm_overlap",
            True,
            "sequence_parallel with it; other collectives have no product to overlap with",
        )


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Dtypes of weights, activations and matrix products."""

    bf16: bool = option(True, "Train in bf16 with fp32 gradients and sums; --fp32 for fp32 throughout.")
    logit_dtype: Literal["float32"] | None = option(
        None,
        "Dtype of the logits that log-probs are read from, the model's when not given. float32 beside bf16 takes their "
        "rounding, some 0.01 nats a token, out of them, and twice the memory of logits.",
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = option(
        None,
        "FP8 matrix products by this recipe of Transformer Engine. mxfp8 needs Blackwell.",
        everyday=True,
        metavar="RECIPE",
    )
    fp8_param_gather: bool = option(
        False,
        "Keep the layers' weights in FP8 only and all-gather them in FP8 after an update. The fp32 "
        "masters stay in the distributed optimizer; checkpoints and exports are written from them in "
        "bf16.",
    )

    def __post_init__(self) -> None:
        require(self.fp8_recipe is None or self.bf16, "fp8_recipe", self.fp8_recipe, "bf16 and not fp32 beside it")
        # Delayed scaling would round the loaded weights with a scale of 1, before its history has any value.
        require(
            not self.fp8_param_gather or self.fp8_recipe in ("tensorwise", "blockwise"),
            "fp8_param_gather",
            True,
            f"fp8_recipe tensorwise or blockwise with it, found {self.fp8_recipe or 'none'}",
        )


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """Activation recomputation: trades compute for memory."""

    recompute_granularity: Literal["full", "selective"] | None = option(
        None, "Recompute whole layers (full) or their costly parts (selective).", everyday=True
    )
    recompute_method: Literal["uniform", "block"] | None = option(
        None,
        "With full: uniform recomputes all layers in units of recompute_num_layers (the default), block "
        "only the first recompute_num_layers of each stage.",
    )
    recompute_num_layers: int | None = option(
        None, "With full: layers per unit (uniform) or layers to recompute (block); 1 when not given."
    )
    recompute_modules: tuple[str, ...] = option(
        ("core_attn",),
        "With selective: parts of a layer to recompute, by megatron-core's names: core_attn, mlp, "
        "layernorm, moe, moe_act.",
        metavar="NAME",
    )

    @property
    def layers_per_unit(self) -> int:
        """With full: layers per unit (uniform) or layers to recompute (block)."""
        return self.recompute_num_layers or 1

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

    data: tuple[str, ...] = option(
        (),
        "Preference files: JSONL, CSV, parquet, datasets, hub:NAME, or demo. Weights and files may "
        "alternate. A folder or a quoted pattern stands for its files, and hf://OWNER/NAME for a data set of the hub; "
        "demo is the pairs that come with the package.",
        everyday=True,
        metavar="FILE",
    )
    valid_data: tuple[str, ...] = option(
        (),
        "Validation files. NAME=FILE NAME=FILE evaluates sets by name; the first one decides which checkpoint is best.",
        everyday=True,
        metavar="FILE",
    )
    valid_fraction: float = option(0.0, "Fraction of the training pairs to validate on instead.", everyday=True)
    data_cache: str | None = option(
        None,
        "Folder for tokenized data, built once and shared by all runs. The default is $SIMPO_MEGATRON_CACHE, or "
        "simpo_megatron in the user's cache folder.",
        metavar="DIR",
    )

    def __post_init__(self) -> None:
        require_writable_name(self, "data_cache")
        require(0 <= self.valid_fraction < 1, "valid_fraction", self.valid_fraction, "a fraction in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Output folder, checkpoints, resume and logging."""

    preset: str | None = option(
        None, "Published settings to start from, by the names below.", everyday=True, metavar="NAME"
    )
    seed: int = option(42, "Seed of the order of pairs, new weights and dropout.", everyday=True)
    deterministic: bool = option(
        False,
        "Compute with deterministic algorithms alone, so that a resumed run is that without a stop bit for bit, on a "
        "GPU too. Slower.",
    )
    save: str | None = option(
        None,
        "Folder of the run: checkpoints, metrics, report, config.yaml. Nothing is written without it.",
        everyday=True,
        metavar="DIR",
    )
    save_interval: int | None = option(
        None,
        "Steps between checkpoints. A sixth of the run, and half an hour at most, when not given.",
        everyday=True,
    )
    resume: str = option(
        "latest",
        "Resume from: latest, required, none or a step. latest starts anew when there is none; "
        "required is then an error.",
        everyday=True,
        metavar="STEP",
    )
    override_on_resume: bool = option(
        False, "Resume although objective, schedule, batch size, tokenizer or data changed since the checkpoint."
    )
    keep_checkpoints: int = option(
        2, "Newest checkpoints to keep, -1 for all; the one with the best validation accuracy stays as well."
    )
    async_save: bool = option(
        False, "Write checkpoints while training continues; meanwhile host memory holds a copy of each rank's shard."
    )
    on_save_failure: Literal["stop", "continue"] = option(
        "stop", "When a checkpoint cannot be written: stop the run, or warn and continue as long as steps follow."
    )
    eval_interval: int | None = option(
        None, "Steps between evaluations. Only before and after training when not given.", everyday=True
    )
    eval_epochs: float | None = option(None, "Epochs between evaluations, such as 0.25, instead of eval_interval.")
    log_interval: int = option(1, "Steps between log lines.")
    skip_nonfinite_steps: int = option(
        0, "Most steps with a loss or gradient that is not finite to skip before the run stops; resumes count."
    )
    distributed_timeout_seconds_after_init: int = option(
        600, "Longest time for one step; then the rank that did not arrive is named and the run ends."
    )
    tensorboard_dir: str | None = option(None, "Folder for TensorBoard.", metavar="DIR")
    verbose: bool = option(False, "Print every option and each phase's time at the start of the run.", everyday=True)
    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info", "Lowest level of the messages that are printed; each names its rank."
    )
    log_ranks: bool = option(False, "Also write the messages of each rank to SAVE/logs/rank0000.log and so on.")
    wandb_project: str | None = option(
        None, "Project on Weights & Biases; its key comes from the environment and is never stored.", metavar="NAME"
    )

    def __post_init__(self) -> None:
        require_writable_name(self, "save", "tensorboard_dir", "wandb_project")
        require_positive(self, "save_interval", "eval_interval", "eval_epochs", "log_interval")
        kept = self.keep_checkpoints
        require(kept > 0 or kept == -1, "keep_checkpoints", kept, "a number above 0, or -1 for all")
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
            "save with it; there is no folder to save in",
        )
        require(
            not self.log_ranks or self.save is not None,
            "log_ranks",
            self.log_ranks,
            "save with it; there is no folder for the logs",
        )
        require(
            self.resume in ("latest", "none") or self.save is not None,
            "resume",
            self.resume,
            "save with it; there is no folder to resume from",
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """All options of a run, by section; option names are unique over all sections."""

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
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)

    def flat(self) -> dict[str, typing.Any]:
        """Returns {option: value} of every option, in the order of the sections."""
        return {key: value for section in asdict(self).values() for key, value in section.items()}

    def fingerprint(self, *sections: str) -> str:
        """16 hex digits that differ when an option of `sections` (all, when none is named) differs."""
        named = asdict(self)
        chosen = {name: named[name] for name in sections or [entry.name for entry in fields(self)]}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]
