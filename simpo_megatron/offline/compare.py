"""The comparison of two models: every tensor by its hash, and the log-probs of both for given pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from simpo_megatron.checkpoint.adapter_checkpoint import open_adapter
from simpo_megatron.checkpoint.initial_weights import fill_adapters, fill_model
from simpo_megatron.checkpoint.model_source import ModelSource, find_model
from simpo_megatron.config import config_from
from simpo_megatron.convert.files import TensorSpec
from simpo_megatron.data import PairOptions, PreferenceDataset, build_preference_dataset, load_tokenizer
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.mcore.hf import load_transformers_model
from simpo_megatron.mcore.model import build_model
from simpo_megatron.offline.weights import AdaptedWeights, HfWeights, Weights
from simpo_megatron.parallel import ParallelGroups

LogitsOf = Callable[[Tensor], Tensor]
"""Logits [1, S, V] of tokens [1, S]."""


@dataclass(frozen=True)
class ComparedTensor:
    """One tensor of either model; None where a model has no tensor of that name."""

    name: str
    specs: tuple[TensorSpec | None, TensorSpec | None]
    """The dtype and shape that each model stores."""
    cast_to: torch.dtype | None
    """Dtype that both sides were cast to before they were compared; None where they are stored in one dtype."""
    sha256: tuple[str | None, str | None]
    largest_difference: float | None
    """Largest difference of two elements in the same place, zero when equal; None without two of one shape."""

    @property
    def is_equal(self) -> bool:
        shapes = [None if spec is None else spec.shape for spec in self.specs]
        return None not in shapes and shapes[0] == shapes[1] and self.sha256[0] == self.sha256[1]


def compare_tensors(first: Weights, second: Weights) -> Iterator[ComparedTensor]:
    """Every tensor of either model, one of each in memory at a time."""
    for name in {**first.specs, **second.specs}:
        specs = first.specs.get(name), second.specs.get(name)
        cast_to = _narrower({spec.dtype: None for spec in specs if spec is not None})
        tensors = [weights.read(name) if name in weights.specs else None for weights in (first, second)]
        tensors = [tensor if tensor is None or cast_to is None else tensor.to(cast_to) for tensor in tensors]
        ours, theirs = (None if tensor is None else hash_tensor(tensor) for tensor in tensors)
        yield ComparedTensor(name, specs, cast_to, (ours, theirs), _largest_difference(*tensors))


def common_dtype(first: Weights, second: Weights) -> torch.dtype | None:
    """The dtype to which both models are rounded before the comparison; None if their dtypes are the same."""
    if all(spec.dtype == second.specs[name].dtype for name, spec in first.specs.items() if name in second.specs):
        return None
    return _narrower({spec.dtype: None for weights in (first, second) for spec in weights.specs.values()})


def _narrower(dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
    """The dtype of several with the fewest bits, the last of two that have as many; None where there is only one."""
    *others, last = dtypes
    return min((last, *others), key=lambda dtype: dtype.itemsize) if others else None


def hash_tensor(tensor: Tensor) -> str:
    """64 hex digits of the bytes of `tensor` in its own dtype."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def _largest_difference(first: Tensor | None, second: Tensor | None) -> float | None:
    if first is None or second is None or first.shape != second.shape:
        return None
    if first.dtype == second.dtype and torch.equal(first, second):
        return 0.0
    # Row by row: a whole table in fp64 would be four times its size.
    rows = zip(first.reshape(len(first), -1), second.reshape(len(second), -1), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in rows)


def read_pair_files(files: Sequence[str], folder: Path, cache: Path, max_pairs: int) -> PreferenceDataset:
    """The first `max_pairs` pairs of `files`, tokenised with the tokenizer of `folder`."""
    dataset = build_preference_dataset(files, load_tokenizer(folder), PairOptions(), cache)
    return dataset.select(torch.arange(min(max_pairs, len(dataset))).numpy())


@torch.no_grad()
def average_log_probs(
    weights: Weights, pairs: PreferenceDataset, groups: ParallelGroups, cast_to: torch.dtype | None = None
) -> list[tuple[float, float]]:
    """(chosen, rejected) average log-prob per response token of each pair, computed in fp32 on the CPU.

    A Hugging Face folder is computed by transformers, a checkpoint by megatron-core, so that neither vouches for the
    other; adapters of a run stand beside the weights then, those of PEFT are added to them. The whole model is in
    memory, in fp32.

    Args:
        cast_to: what its weights are rounded to first; None leaves them as stored.
    """
    if is_of_hugging_face(weights):
        model, logits_of = _transformers(weights)
    else:
        longest = max(int(lengths[0] + max(lengths[1:])) for lengths in pairs.lengths)
        model, logits_of = _megatron(weights, groups, longest)
    for parameter in model.parameters() if cast_to is not None else ():
        parameter.copy_(parameter.to(cast_to))
    averages = []
    for index in range(len(pairs)):
        pair = pairs[index]
        prompt = torch.tensor(pair.prompt_ids, dtype=torch.long)
        chosen, rejected = (
            _average(logits_of, prompt, torch.tensor(ids, dtype=torch.long), weights.description)
            for ids in (pair.chosen_ids, pair.rejected_ids)
        )
        averages.append((chosen, rejected))
    return averages


def is_of_hugging_face(weights: Weights) -> bool:
    """True of weights that transformers computes with: a folder's, and those with PEFT's adapters."""
    if isinstance(weights, AdaptedWeights) and weights.checkpoint is None:
        return is_of_hugging_face(weights.base)
    return isinstance(weights, HfWeights)


def _average(logits_of: LogitsOf, prompt: Tensor, response: Tensor, description: ModelDescription) -> float:
    logits = logits_of(torch.cat((prompt, response))[None])[0, len(prompt) - 1 : -1, : description.vocab_size]
    return float(logits.log_softmax(-1).gather(1, response[:, None]).mean())


def _transformers(weights: Weights) -> tuple[torch.nn.Module, LogitsOf]:
    from transformers import AutoModelForCausalLM

    model = load_transformers_model(AutoModelForCausalLM, weights.folder, dtype=torch.float32)
    for name in weights.adapted if isinstance(weights, AdaptedWeights) else ():
        model.get_parameter(name).copy_(weights.read(name))
    return model, lambda tokens: model(tokens).logits


def _megatron(weights: Weights, groups: ParallelGroups, longest: int) -> tuple[torch.nn.Module, LogitsOf]:
    lengths = {"max_length": longest, "max_prompt_length": longest - 1}
    *beneath, last = [None, *find_model(weights.named).adapters]
    settings = {} if last is None else asdict(open_adapter(last, weights.description).settings)
    config = config_from(model=str(weights.folder), data=("unused",), bf16=False, **lengths, **settings)
    (chunk,) = model = build_model(weights.description, config, groups)
    fill_model(model, ModelSource(weights.folder, tuple(filter(None, beneath))), weights.description, groups)
    if last is not None:
        fill_adapters(model, last, weights.description, groups)
    chunk.eval()
    return chunk, lambda tokens: chunk(tokens, torch.arange(tokens.shape[1])[None], None)
