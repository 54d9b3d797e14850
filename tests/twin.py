"""The slow obvious twin: SimPO training in float64 with transformers' model, one response at a time.

Nothing of the package is used here. The objective is the reference implementation's: the sum of a response's token
log-probs over their number, and the mean over the pairs of the global batch (arXiv 2405.14734, equations 4 and 6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TwinSettings:
    """The options of one twin run, by the trainer's names."""

    beta: float = 2.0
    gamma_beta_ratio: float = 0.5
    sft_weight: float = 0.0
    lr: float = 1e-3
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0

    def of_trainer(self, *, batch_size: int, num_steps: int) -> dict[str, object]:
        """Options of the trainer for the twin's steps, without the objective's constants."""
        return dict(
            model="given by the job",
            data=("given by the job",),
            bf16=False,
            global_batch_size=batch_size,
            tokens_per_microbatch=128,
            lr=self.lr,
            weight_decay=self.weight_decay,
            lr_warmup_fraction=0.0,
            lr_decay_style="constant",
            train_iters=num_steps,
        )


@dataclass
class TwinRecord:
    """The records of each step: loss before the update, gradient norm before clipping, mean margin."""

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)


def response_log_probs(model: torch.nn.Module, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """float64 log-probs of the response tokens after the prompt, differentiable.

    A token of context, written as its complement `~id`, is seen and left out.
    """
    response_ids = [token if token >= 0 else ~token for token in response]
    ids = torch.tensor([[*prompt, *response_ids]])
    logits = model(ids).logits[0].double()
    log_probs = F.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
    of_tokens = log_probs.gather(1, torch.tensor(response_ids)[:, None])[:, 0]
    return of_tokens[[place for place, token in enumerate(response) if token >= 0]]


def batch_loss(model: torch.nn.Module, pairs: Sequence, settings: TwinSettings) -> tuple[Tensor, float]:
    """(mean loss over the pairs, mean reward margin), the pairs given as (prompt, chosen, rejected) ids."""
    losses, margins, chosen_nll = [], [], []
    for prompt, chosen, rejected in pairs:
        chosen_log_probs = response_log_probs(model, prompt, chosen)
        rejected_log_probs = response_log_probs(model, prompt, rejected)
        average_chosen = chosen_log_probs.sum() / len(chosen_log_probs)
        average_rejected = rejected_log_probs.sum() / len(rejected_log_probs)
        margin = settings.beta * (average_chosen - average_rejected)
        losses.append(-F.logsigmoid(margin - settings.beta * settings.gamma_beta_ratio))
        margins.append(margin.item())
        chosen_nll.append(-chosen_log_probs)
    loss = torch.stack(losses).mean() + settings.sft_weight * torch.cat(chosen_nll).mean()
    return loss, sum(margins) / len(margins)


@contextmanager
def nothing_in_fp32() -> Iterator[None]:
    """While the context lasts, float64 is what transformers gets where it asks for fp32 by name.

    Norms, softmax and rotary embedding do so in a model of any dtype. Of some shapes that alone costs 2e-5 of the
    weights after two steps, which is more than tests allow.
    """
    names, method = {name: getattr(torch, name) for name in ("float32", "float")}, torch.Tensor.float
    try:
        for name in names:
            setattr(torch, name, torch.float64)
        # A copy, as a change of dtype is: DeepSeek-V2's rotary embedding cannot read each view of a tensor.
        torch.Tensor.float = lambda tensor: tensor.to(torch.float64, copy=True)
        yield
    finally:
        for name, dtype in names.items():
            setattr(torch, name, dtype)
        torch.Tensor.float = method


@nothing_in_fp32()
def train(
    model: torch.nn.Module, batches: Sequence[Sequence], settings: TwinSettings, loss_of: Callable = batch_loss
) -> TwinRecord:
    """One AdamW step per batch at a constant learning rate; the model, in float64, is trained in place.

    `loss_of` takes the place of SimPO's `batch_loss`.

    As in megatron, weight decay spares biases and norms, which are the one-dimensional parameters; those of all experts
    may be rows of one.
    """
    parameters = list(model.parameters())
    spared = {p for name, p in model.named_parameters() if p.dim() == 1 or name.endswith("bias")}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p not in spared], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p in spared], "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
    )
    record = TwinRecord()
    for pairs in batches:
        optimizer.zero_grad()
        loss, margin = loss_of(model, pairs, settings)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad)
        optimizer.step()
        record.loss.append(loss.item())
        record.grad_norm.append(norm.item())
        record.margin.append(margin)
    return record


def with_context(pairs: Sequence[list[list[int]]]) -> list[list[list[int]]]:
    """Every other pair with some response tokens turned into context: never the last, now and then the first."""
    return [
        [
            ids if part == 0 or number % 2 else [
                ~token if (number // 2 + part + place) % 5 < 2 and place < len(ids) - 1 else token
                for place, token in enumerate(ids)
            ]
            for part, ids in enumerate(pair)
        ]
        for number, pair in enumerate(pairs)
    ]  # fmt: skip
