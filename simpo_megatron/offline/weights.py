"""The tensors of a model under their Hugging Face names, one at a time, from a folder or from a checkpoint.

Adapters count as the model that they make of their base.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from simpo_megatron.checkpoint import manifest
from simpo_megatron.checkpoint.adapter_checkpoint import open_adapter
from simpo_megatron.checkpoint.fingerprint import require_bases
from simpo_megatron.checkpoint.model_source import find_model, has_tokenizer
from simpo_megatron.checkpoint.tensor_index import refuse_other_weights
from simpo_megatron.checkpoint.torch_dist import CheckpointReader
from simpo_megatron.convert.export import gather_tensor
from simpo_megatron.convert.files import DTYPE_NAMES, TensorSpec
from simpo_megatron.convert.folder import check_model_files
from simpo_megatron.convert.load_adapters import merged, names_of
from simpo_megatron.convert.load_weights import checked_tensors
from simpo_megatron.convert.mapping import hf_tensors, pieces_of
from simpo_megatron.convert.stored_tensors import open_safetensors
from simpo_megatron.convert.weight_layouts import ALONE
from simpo_megatron.errors import CheckpointError
from simpo_megatron.mcore.families import ModelDescription, describe_hf_model
from simpo_megatron.mcore.meta_model import MetaModel
from simpo_megatron.parallel import ParallelGroups

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Weights(Protocol):
    """A model whose tensors can be had one by one."""

    folder: Path
    """The folder that also holds the configuration."""
    named: Path
    """The folder that was opened: `folder`, or that of adapters on it."""
    tokenizer: Path
    """The folder of tokenizer and chat template."""
    description: ModelDescription
    specs: Mapping[str, TensorSpec]
    """Every tensor of the model, in the order of the forward."""

    def read(self, name: str) -> Tensor:
        """The tensor `name` on the CPU, as it is stored."""
        ...

    def place(self, name: str) -> Path:
        """The file or folder that holds the tensor `name`."""
        ...


def open_weights(path: str | Path, groups: ParallelGroups) -> Weights:
    """The model at `path`: a Hugging Face folder or its name on the hub, a committed checkpoint, or a folder whose
    newest one counts; a PEFT folder, or a run of adapters, is the model that the adapters make of their base.

    Raises:
        CheckpointError: it is none of them, damaged, or holds another model than its config.json describes.
        ConfigError: its family, an option of it, or the kind of its adapters is not supported.
    """
    source = find_model(path)
    require_bases(source)
    is_checkpoint = (source.base / manifest.RECORD_FILE).is_file()
    weights: Weights = MegatronWeights(source.base, groups) if is_checkpoint else HfWeights(source.base)
    for folder in source.adapters:
        weights = AdaptedWeights(weights, folder)
    return weights


class HfWeights:
    """A folder of safetensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = self.named = self.tokenizer = folder
        self.description = describe_hf_model(folder)
        check_model_files(folder)
        self._stored = checked_tensors(folder, self.description)
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(shape, _DTYPES[self._stored[name].dtype])
            for name, shape in hf_tensors(self.description).items()
        }

    def read(self, name: str) -> Tensor:
        # Opened each time: the pages of a file count as this process's memory until it is closed.
        with open_safetensors(self._stored[name].file) as file:
            return file.get_tensor(name)

    def place(self, name: str) -> Path:
        return self._stored[name].file


class MegatronWeights:
    """A committed checkpoint, each file of it verified before anything of that file is read."""

    def __init__(self, folder: Path, groups: ParallelGroups) -> None:
        self.folder = self.named = self.tokenizer = folder
        self._tp_group = groups.tp
        self.checkpoint = manifest.read(folder)
        if "config.json" not in self.checkpoint.files:
            raise CheckpointError(
                f"{folder}: found no config.json, expected one; an earlier version saved it, resume that run once"
            )
        self._shards = sorted(name for name in self.checkpoint.files if name.endswith(".distcp"))
        manifest.check_hashes(self.checkpoint, self.checkpoint.files.keys() - self._shards)
        self._verifier, self._verified = ThreadPoolExecutor(1), dict[str, Future[None]]()
        self.description = describe_hf_model(folder)
        self._model = MetaModel(self.description, groups)
        self._reader = CheckpointReader(folder, self._verify)
        self._parameters: dict[str, dict[str, None]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        on_meta = {name: torch.empty(shape, device="meta") for name, shape in self._model.shapes.items()}
        parts = {name: self._model.parts(name, values) for name, values in on_meta.items()}
        refuse_other_weights(set(self._reader.tensors), {part.key for own in parts.values() for part in own}, folder)
        for parameter, values in on_meta.items():
            self._dtypes[parameter] = self._reader.tensor(parts[parameter][0]).properties.dtype
            for piece in self._pieces(parameter, values):
                self._parameters.setdefault(piece.hf_name, {})[parameter] = None
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(shape, self._dtypes[next(iter(self._parameters[name]))])
            for name, shape in hf_tensors(self.description).items()
        }
        self._last: tuple[str, Tensor] | None = None

    def read(self, name: str) -> Tensor:
        found = [
            piece
            for parameter in self._parameters[name]
            for piece in self._pieces(parameter, self._values(parameter))
            if piece.hf_name == name
        ]
        whole = gather_tensor(found, self.description, self.specs[name].dtype, tp_group=self._tp_group)
        assert whole is not None, "a process that works alone is rank 0"
        return whole

    def place(self, name: str) -> Path:
        return self.folder

    def _verify(self, shard: str) -> None:
        """Return once the hash of `shard` is verified; the next shard is hashed meanwhile."""
        if shard not in self._shards:
            raise CheckpointError(f"{self.folder}: found {shard!r} in its index, expected shards of this checkpoint")
        first = self._shards.index(shard)
        for name in self._shards[first : first + 2]:
            if name not in self._verified:
                self._verified[name] = self._verifier.submit(manifest.check_hashes, self.checkpoint, [name])
        self._verified[shard].result()

    def _pieces(self, parameter: str, values: Tensor) -> list:
        return pieces_of(self._model.chunk, parameter, values, self.description, tp=ALONE)

    def _values(self, parameter: str) -> Tensor:
        """The whole parameter; the last one is cached, since it may hold several Hugging Face tensors."""
        if self._last is None or self._last[0] != parameter:
            self._last = None
            values = torch.empty(self._model.shapes[parameter], dtype=self._dtypes[parameter])
            for part in self._model.parts(parameter, values):
                self._reader.fill(part)
            self._last = (parameter, values)
        return self._last[1]


class AdaptedWeights:
    """Another model's weights with what adapters add to them, each sum taken in fp32."""

    def __init__(self, base: Weights, folder: Path) -> None:
        """`folder` holds the adapters: in PEFT's form, or as a committed checkpoint, all of which is verified."""
        self.base, self.named = base, folder
        self.folder, self.description = base.folder, base.description
        self.tokenizer = folder if has_tokenizer(folder) else base.tokenizer
        check_model_files(self.tokenizer)
        self.checkpoint = manifest.read(folder) if (folder / manifest.RECORD_FILE).is_file() else None
        if self.checkpoint is not None:
            manifest.check_hashes(self.checkpoint, self.checkpoint.files)
        self.adapter = open_adapter(folder, base.description)
        beneath = base.adapted if isinstance(base, AdaptedWeights) else frozenset()
        self.adapted: frozenset[str] = beneath | {
            name for name in base.specs if names_of(name)[0] in self.adapter.names
        }
        dtype = self.adapter.base_dtype
        self.specs: Mapping[str, TensorSpec] = {
            name: replace(spec, dtype=dtype or spec.dtype) for name, spec in base.specs.items()
        }

    def read(self, name: str) -> Tensor:
        return merged(self.base.read(name), name, self.adapter)

    def place(self, name: str) -> Path:
        return self.named
