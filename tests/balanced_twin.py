"""The float64 reference of an MoE with a load-balancing loss, and the comparison of weights with its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from twin import TwinRecord, TwinSettings, batch_loss, train

COEFFICIENT, EXPERTS, CHOSEN = 0.5, 4, 2


def balance(logits_NE: Tensor) -> Tensor:
    """experts * sum over experts of (share of the choices * mean probability) (arXiv 2101.03961)."""
    share = torch.zeros(EXPERTS, dtype=torch.float64)
    for row in logits_NE:
        share[row.topk(CHOSEN).indices] += 1 / (len(logits_NE) * CHOSEN)
    return EXPERTS * (share * logits_NE.softmax(dim=-1).mean(dim=0)).sum()


def of_microbatch(model: torch.nn.Module, pairs: list) -> Tensor:
    """The loss of each layer [layers], over tokens of which each pair's prompt counts once."""
    by_layer: list[list[Tensor]] = [[] for _ in range(model.config.num_hidden_layers)]
    for prompt, chosen, rejected in pairs:
        for response, first in ((chosen, 0), (rejected, len(prompt))):
            logits = model(torch.tensor([[*prompt, *response]]), output_router_logits=True).router_logits
            for layer, of_layer in zip(by_layer, logits, strict=True):
                layer.append(of_layer[first:])
    return torch.stack([balance(torch.cat(layer)) for layer in by_layer])


def train_balanced(
    model: torch.nn.Module, steps: list, settings: TwinSettings, folder: Path
) -> tuple[list[tuple[float, float]], TwinRecord, dict[str, Tensor]]:
    """((loss, load-balancing loss) of each step, the record, the weights in the end), trained on a float64 copy.

    Args:
        steps: of each its microbatches of pairs.
        folder: for the weights.
    """
    twin, logged = copy.deepcopy(model).double(), []

    def loss_of(model: torch.nn.Module, microbatches: list, settings: TwinSettings) -> tuple[Tensor, float]:
        loss, margin = batch_loss(model, [pair for microbatch in microbatches for pair in microbatch], settings)
        of_microbatches = torch.stack([of_microbatch(model, microbatch) for microbatch in microbatches])
        logged.append((loss.item(), of_microbatches.mean().item()))
        return loss + COEFFICIENT * of_microbatches.sum(dim=1).mean(), margin

    record = train(twin, steps, settings, loss_of)
    twin.save_pretrained(folder)
    return logged, record, weights_in(folder)


def weights_in(folder: Path) -> dict[str, Tensor]:
    """The tensors of all safetensors files of `folder`."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def relative_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """The norm of the difference of the tensors `names`, divided by that of the expected ones."""
    squares = [((found[n] - expected[n]).double().pow(2).sum(), expected[n].pow(2).sum()) for n in names]
    of_difference, of_expected = torch.tensor(squares).sum(0).sqrt()
    return float(of_difference / of_expected)
