"""Differences that FP8 makes to log-probs and margins of pairs, by Transformer Engine or emulated in software."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from simpo_megatron import parallel
from simpo_megatron.config import Config, PrecisionConfig
from simpo_megatron.errors import ConfigError, require
from simpo_megatron.loss import SimPOObjective
from simpo_megatron.mcore import cpu_patches, device

if TYPE_CHECKING:
    from simpo_megatron.mcore.model import PreferenceGPTModel

Recipe = Literal["tensorwise", "blockwise", "delayed"]
BLOCK = 128
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class FormatComparison:
    """Differences of two formats, in nats per token; a margin is avg(chosen) - avg(rejected)."""

    noise: np.ndarray
    """[P, 2]: difference of the average log-probs, chosen and rejected."""
    margins: np.ndarray
    """[P]: of the first format."""
    margin_noise: np.ndarray
    """[P]: difference of the margins."""

    @classmethod
    def of(cls, first: np.ndarray, second: np.ndarray) -> FormatComparison:
        """The comparison of average log-probs [P, 2] in both formats."""
        first, second = first.astype(np.float64), second.astype(np.float64)
        margins = first[:, 0] - first[:, 1]
        return cls(second - first, margins, second[:, 0] - second[:, 1] - margins)

    def crossing(self, level: float) -> np.ndarray:
        """Indices of the pairs whose margin lies on the other side of `level` in the second format."""
        return np.flatnonzero((self.margins > level) != (self.margins + self.margin_noise > level))


def report(found: FormatComparison, gamma_beta_ratio: float) -> list[str]:
    """The lines that the command prints, numbers in nats per token."""
    num_pairs = len(found.margins)
    size, largest = _rms(found.margin_noise), np.abs(found.margin_noise).max()
    spread = f"margins themselves spread by {found.margins.std():.4f}"
    target = f"gamma/beta is {gamma_beta_ratio:g}"
    if gamma_beta_ratio > 0:
        usual, most = size / gamma_beta_ratio, largest / gamma_beta_ratio
        target += f", of which the noise eats {usual:.1%} (rms), {most:.1%} at most"
    return [
        f"log-probs noise of a response: mean {found.noise.mean():+.4f}, rms {_rms(found.noise):.4f}, largest "
        f"{np.abs(found.noise).max():.4f}",
        f"margins   noise: mean {found.margin_noise.mean():+.4f}, rms {size:.4f}, largest {largest:.4f}; {spread}",
        f"target    {target}",
        *(
            f"{name:<9} {len(crossing)} of {num_pairs} pairs {what}{_shown(found.margins[crossing])}"
            for name, what, crossing in (
                ("signs", "change the response they prefer", found.crossing(0.0)),
                ("crossing", "change sides of the target margin", found.crossing(gamma_beta_ratio)),
            )
        ),
    ]


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _shown(margins: np.ndarray, most: int = 8) -> str:
    if not len(margins):
        return ""
    nearest = ", ".join(f"{margin:+.4f}" for margin in margins[:most])
    return f": their margins were {nearest}" + (", ..." if len(margins) > most else "")


def round_to_e4m3(values: Tensor, block: tuple[int, int] | None) -> Tensor:
    """`values` [..., R, C] as e4m3 holds them, in their own dtype.

    Args:
        block: rows and columns that share a scale, a power of two; None: one scale, which takes the largest magnitude
            to e4m3's largest number.
    """
    if block is None:
        return _scaled_round(values, _LARGEST / _magnitude(values.abs().amax()))
    rows, columns = values.shape[-2:]
    missing = (-columns % block[1], -rows % block[0])
    padded = F.pad(values, (0, missing[0], 0, missing[1]))
    tiles = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))  # [..., r, b0, c, b1]
    scale = torch.exp2(torch.floor(torch.log2(_LARGEST / _magnitude(tiles.abs().amax((-3, -1), keepdim=True)))))
    return _scaled_round(tiles, scale).flatten(-2).flatten(-3, -2)[..., :rows, :columns]


def _magnitude(largest: Tensor) -> Tensor:
    return largest.float().clamp(min=torch.finfo(torch.float32).tiny * _LARGEST)


def _scaled_round(values: Tensor, scale: Tensor) -> Tensor:
    return ((values.float() * scale).to(torch.float8_e4m3fn).float() / scale).to(values.dtype)


@torch.no_grad()
def emulate(chunks: Sequence[PreferenceGPTModel], recipe: Recipe) -> int:
    """The number of linear layers of `chunks` that compute with rounded weights and inputs from here on.

    Layers that the recipe leaves in bf16 are left alone, as are attention, norms, embedding and head.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from simpo_megatron.mcore.precision import precision_options

    kept = precision_options(PrecisionConfig(fp8_recipe=recipe))
    is_blockwise = recipe == "blockwise"
    # Of activations, 128 consecutive features of a token share a scale.
    of_weights, of_inputs = ((BLOCK, BLOCK), (1, BLOCK)) if is_blockwise else (None, None)
    linears = []
    for chunk in chunks:
        first = 1 + kept.get("num_layers_at_start_in_bf16", 0)
        last = chunk.config.num_layers - kept.get("num_layers_at_end_in_bf16", 0)
        layers = [layer for layer in chunk.decoder.layers if first <= layer.layer_number <= last]
        kinds = (ColumnParallelLinear, RowParallelLinear)
        linears += [module for layer in layers for module in layer.modules() if isinstance(module, kinds)]
    for linear in linears:
        linear.weight.copy_(round_to_e4m3(linear.weight, of_weights))
        linear.register_forward_pre_hook(lambda _, inputs: (round_to_e4m3(inputs[0], of_inputs), *inputs[1:]))
    return len(linears)


def check(config: Config, recipe: Recipe, num_pairs: int) -> None:
    """Judge the first `num_pairs` training pairs in both formats, on the ranks that torchrun started, and print it."""
    cpu_patches.install()
    from simpo_megatron.training.reference import reference_log_probs
    from simpo_megatron.training.start.run_plan import plan_run
    from simpo_megatron.training.start.setup import build_job

    if not isinstance(config.objective, SimPOObjective):
        raise ConfigError(f"objective: found {config.objective.objective}, expected simpo, which has a target margin")
    sums = config.objective.length_normalization
    require(sums == "mean", "length_normalization", sums, "mean, for noise is measured in nats per token")
    is_emulated = not device.has_cuda()
    if is_emulated and recipe == "delayed":
        raise ConfigError("recipe: found delayed, expected tensorwise or blockwise: a history is not emulated")
    in_bf16 = replace(config, precision=PrecisionConfig(bf16=True))
    in_fp8 = replace(config, precision=PrecisionConfig(bf16=True, fp8_recipe=recipe))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    plans = [plan_run(of_format, world_size) for of_format in ([in_bf16] if is_emulated else [in_bf16, in_fp8])]
    groups = parallel.initialize(config.parallel.sizes, backend=device.backend())
    parallel.seed_everything(config.run.seed)
    job = build_job(plans[0].config, plans[0], groups)
    probe = job.train_data.select(np.arange(min(num_pairs, len(job.train_data))))
    first = reference_log_probs(job.trainer, probe)
    if is_emulated:
        num_linears = emulate(job.model, recipe)
        how = f"EMULATED in software, e4m3 in {num_linears} linear layers of this rank"
    else:
        del job
        job = build_job(plans[1].config, plans[1], groups)
        how = "by Transformer Engine"
    found = FormatComparison.of(first, reference_log_probs(job.trainer, probe))
    if dist.get_rank() == 0:
        print(f"fp8 check {len(probe)} pairs in {recipe} FP8 ({how}) against bf16; nats per token")
        print(*report(found, config.objective.gamma_beta_ratio), sep="\n", flush=True)
    parallel.shut_down()
