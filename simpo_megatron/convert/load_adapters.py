"""Trained adapters into a model: into adapters that go on training, or into the weights beside which they stood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from simpo_megatron.convert.adapter import adapter_pieces
from simpo_megatron.convert.adapter_folder import AdapterTensors
from simpo_megatron.convert.files import require_finite
from simpo_megatron.convert.load_weights import fill
from simpo_megatron.convert.mapping import Piece, pieces
from simpo_megatron.convert.peft_files import PREFIX
from simpo_megatron.convert.weight_layouts import TensorRank
from simpo_megatron.errors import CheckpointError
from simpo_megatron.mcore.families import ModelDescription
from simpo_megatron.mcore.fp8_weights import awaited_values


def load_adapters(
    model_chunks: Sequence[torch.nn.Module], adapter: AdapterTensors, description: ModelDescription, *, tp: TensorRank
) -> None:
    """Fill the adapters of this rank's model from `adapter`, whose settings are those that the model was built with.

    Raises:
        CheckpointError: parts that share an A in the model have another each in `adapter`.
        NumericsError: a value is not finite.
    """
    for chunk in model_chunks:
        filled: dict[int, str] = {}
        for piece in adapter_pieces(chunk, description, adapter.settings, tp):
            stored, address = adapter.read(piece.hf_name), piece.view.data_ptr()
            require_finite(stored, f"{adapter.folder}: {piece.hf_name}")
            if piece.hf_name.endswith(".lora_A.weight") and address in filled:
                _require_same_A(adapter, piece.hf_name, filled[address])
                continue
            fill(piece, stored, tp.rank, description)
            filled[address] = piece.hf_name


def _require_same_A(adapter: AdapterTensors, name: str, other: str) -> None:
    if not torch.equal(adapter.read(name), adapter.read(other)):
        raise CheckpointError(
            f"{adapter.folder}: found {name} other than {other}, expected the same, as in the first layer"
        )


def merge_adapter(
    model_chunks: Sequence[torch.nn.Module], adapter: AdapterTensors, description: ModelDescription, *, tp: TensorRank
) -> None:
    """Add what `adapter` adds to each weight of this rank's model, which is in the model's dtype; sums are fp32.

    Of weights in FP8 the values that become their masters are changed, as `load_hf_weights` does.

    Raises:
        NumericsError: a value is not finite.
    """
    awaited = awaited_values(model_chunks)
    for chunk in model_chunks:
        for piece in pieces(chunk, description, tp=tp, in_place_of=awaited):
            factors = factors_of(adapter, piece.hf_name)
            if factors is None:
                continue
            A, B = factors
            if piece.layout.cut == 1:
                width = piece.hf_shape[1]
                A = A[:, tp.rank * width : (tp.rank + 1) * width]
            else:
                B = _rows(B, piece, tp, description)
            added = (adapter.settings.scale * (B @ A)).view(piece.view.shape)
            piece.view.copy_(piece.view.float().cpu() + added)


def _rows(B: Tensor, piece: Piece, tp: TensorRank, description: ModelDescription) -> Tensor:
    """The rows of B that belong to the rows of a weight in `piece`."""
    shape = (piece.hf_shape[0], B.shape[1])
    own = replace(piece, view=torch.empty(shape), hf_shape=shape)
    fill(own, B, tp.rank, description)
    return own.view


def merged(weight: Tensor, name: str, adapter: AdapterTensors) -> Tensor:
    """The whole Hugging Face tensor `name`, whose values are `weight`, with what `adapter` adds to it, in its dtype.

    The weight is first rounded to the dtype that it had beside the adapters, the sum is fp32.
    """
    dtype = adapter.base_dtype or weight.dtype
    factors = factors_of(adapter, name)
    if factors is None:
        return weight.to(dtype)
    A, B = factors
    return (weight.to(dtype).float() + adapter.settings.scale * (B @ A)).to(dtype)


def names_of(name: str) -> tuple[str, str]:
    """PEFT's names of A and B of the Hugging Face tensor `name`."""
    module = PREFIX + name.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def factors_of(adapter: AdapterTensors, name: str) -> tuple[Tensor, Tensor] | None:
    """fp32 (A, B) of what is added to the Hugging Face tensor `name`; None where nothing is.

    Raises:
        NumericsError: a value is not finite.
    """
    names = names_of(name)
    if names[0] not in adapter.names:
        return None
    A, B = (adapter.read(part).float() for part in names)
    for part, values in zip(names, (A, B), strict=True):
        require_finite(values, f"{adapter.folder}: {part}")
    return A, B
