"""The slices that a rank reads of a Hugging Face folder, their places, and refused folders.

Megatron itself is not needed here; the expected values come from qwen2_twin.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from qwen2_twin import CONFIG, HEAD_DIM, HIDDEN, LAYERS, VOCAB, random_weights, stand_in, twin_parameters, write_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simpo_megatron.convert import load_hf_weights
from simpo_megatron.convert import load_weights as loading
from simpo_megatron.convert.files import TensorSpec, write_safetensors
from simpo_megatron.convert.mapping import pieces_by_rule
from simpo_megatron.convert.weight_layouts import TensorRank
from simpo_megatron.convert.weight_rules import layer_rules
from simpo_megatron.errors import CheckpointError, NumericsError
from simpo_megatron.mcore.families import ModelDescription, describe_hf_config, padded_vocab_size


class CountingFile:
    """A safetensors file that notes how many bytes every slice taken from it had."""

    def __init__(self, file, counts: list[int]) -> None:
        self.file, self.counts = file, counts

    def __enter__(self) -> CountingFile:
        self.file.__enter__()
        return self

    def __exit__(self, *args) -> None:
        self.file.__exit__(*args)

    def get_slice(self, name: str):
        found = self.file.get_slice(name)

        def take(item) -> Tensor:
            self.counts.append(found[item].nbytes)
            return found[item]

        return type("Slice", (), {"__getitem__": lambda _, item: take(item)})()


@pytest.mark.parametrize("te", [False, True], ids=["local names", "transformer engine names"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_every_rank_gets_the_slices_the_twin_cuts_and_reads_no_other_byte(
    tmp_path: Path, monkeypatch, tp_size: int, te: bool
) -> None:
    weights = random_weights()
    description = write_folder(tmp_path, weights)
    counts: list[int] = []
    opened = loading.open_safetensors
    monkeypatch.setattr(loading, "open_safetensors", lambda path: CountingFile(opened(path), counts))
    num_padded = 0
    for tp_rank in range(tp_size):
        expected = twin_parameters(weights, tp_rank, tp_size, te=te)
        chunk = stand_in(expected)
        counts.clear()
        load_hf_weights([chunk], tmp_path, description, tp_rank=tp_rank, tp_size=tp_size)
        for name, parameter in chunk.named_parameters():
            assert torch.equal(parameter, expected[name]), name
        rows = len(expected["output_layer.weight"])
        padding = rows - min(max(VOCAB - tp_rank * rows, 0), rows)
        num_padded += padding
        assert sum(counts) == sum(p.nbytes for p in chunk.parameters()) - 2 * padding * HIDDEN * 4
    assert num_padded == padded_vocab_size(VOCAB, tp_size) - VOCAB


@pytest.mark.parametrize("fused", [False, True], ids=["three tensors", "one tensor"])
@pytest.mark.parametrize(("heads", "groups", "head_dim", "tp_size"), [(8, 1, 6, 4), (12, 3, 4, 12), (8, 2, 6, 8)])
def test_ranks_that_share_a_group_hold_the_rows_that_megatron_cuts(heads, groups, head_dim, tp_size, fused) -> None:
    """The whole weight, put together head by head and cut evenly, in the midst of a group."""
    q, k, v = (torch.randn(number * head_dim, 3) for number in (heads, groups, groups))
    parts = []
    for group in range(groups):
        own = heads // groups
        parts += [q[group * own * head_dim : (group + 1) * own * head_dim]]
        parts += [x[group * head_dim : (group + 1) * head_dim] for x in (k, v)]
    slices = torch.cat(parts).chunk(tp_size)
    config = {**CONFIG, "model_type": "phi3" if fused else "llama", "num_attention_heads": heads, "head_dim": head_dim}
    description = describe_hf_config({**config, "num_key_value_heads": groups, "pad_token_id": 0}, "config.json")
    rule = next(rule for rule in layer_rules(description, 0) if rule.parameter == "self_attention.linear_qkv.weight")
    stored = dict(zip(rule.hf_names, (torch.cat((q, k, v)),) * 3 if fused else (q, k, v)))
    for rank, expected in enumerate(slices):
        found = torch.full_like(expected, float("nan"))
        for piece in pieces_by_rule(found, rule, 0, description, TensorRank(rank, tp_size)):
            name = piece.hf_name.replace("layers.0.", "layers.{}.")
            loading.fill(piece, stored[name], rank, description)
        assert torch.equal(found, expected), rank


@pytest.mark.parametrize("grouped", [False, True], ids=["an expert a module", "transformer engine's grouped experts"])
def test_an_expert_parallel_rank_gets_its_experts_whole(tmp_path: Path, grouped: bool) -> None:
    width, num_experts, mine = 10, 6, (2, 3)
    moe = {"model_type": "qwen3_moe", "num_experts": num_experts, "num_experts_per_tok": 2}
    weights = {name: tensor for name, tensor in random_weights().items() if ".mlp." not in name and "bias" not in name}
    expected = {}
    for layer in range(LAYERS):
        prefix, to = f"model.layers.{layer}.", f"decoder.layers.{layer}.mlp."
        weights[f"{prefix}mlp.gate.weight"] = expected[f"{to}router.weight"] = torch.randn(num_experts, HIDDEN)
        for norm in ("q", "k"):
            weights[f"{prefix}self_attn.{norm}_norm.weight"] = torch.randn(HEAD_DIM)
        for expert in range(num_experts):
            gate, up, down = torch.randn(width, HIDDEN), torch.randn(width, HIDDEN), torch.randn(HIDDEN, width)
            for name, tensor in (("gate", gate), ("up", up), ("down", down)):
                weights[f"{prefix}mlp.experts.{expert}.{name}_proj.weight"] = tensor
            if expert in mine:
                local = mine.index(expert)
                for name, tensor in (("linear_fc1", torch.cat((gate, up))), ("linear_fc2", down)):
                    alone, joined = f"local_experts.{local}.{name}.weight", f"{name}.weight{local}"
                    expected[f"{to}experts.{joined if grouped else alone}"] = tensor
    description = write_folder(tmp_path, weights, **moe, moe_intermediate_size=width)
    chunk = stand_in(expected)
    for layer in chunk.decoder.layers:
        layer.mlp.local_expert_indices = list(mine)
    # Tensor-parallel ranks hold experts whole, too.
    load_hf_weights([chunk], tmp_path, description, tp_rank=1, tp_size=2)
    for name, parameter in chunk.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_a_file_is_held_in_memory_a_bounded_part_at_a_time(tmp_path: Path, monkeypatch) -> None:
    weights = random_weights()
    description = write_folder(tmp_path, weights)
    opened, of_each_opening = loading.open_safetensors, []

    def count(path: Path) -> CountingFile:
        of_each_opening.append([])
        return CountingFile(opened(path), of_each_opening[-1])

    monkeypatch.setattr(loading, "open_safetensors", count)
    limit = weights["lm_head.weight"].nbytes + 100
    monkeypatch.setattr(loading, "MAX_MAPPED_BYTES", limit)
    expected = twin_parameters(weights, 0, 1, te=False)
    chunk = stand_in(expected)
    load_hf_weights([chunk], tmp_path, description, tp_rank=0, tp_size=1)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in chunk.named_parameters())
    assert all(0 < sum(counts) <= limit for counts in of_each_opening)
    assert sum(map(sum, of_each_opening)) == sum(tensor.nbytes for tensor in weights.values())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_any_stored_dtype_is_cast_to_the_parameters(tmp_path: Path, stored: torch.dtype) -> None:
    weights = {name: tensor.to(stored) for name, tensor in random_weights().items()}
    description = write_folder(tmp_path, weights)
    chunk = stand_in(twin_parameters(random_weights(), 0, 1, te=False), torch.bfloat16)
    load_hf_weights([chunk], tmp_path, description, tp_rank=0, tp_size=1)
    assert torch.equal(chunk.decoder.final_layernorm.weight, weights["model.norm.weight"].bfloat16())


def shard(folder: Path, first_file: str = "a.safetensors") -> dict:
    """The folder's single file as two files and their index, whose content is returned."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def load(folder: Path, description: ModelDescription) -> nn.Module:
    chunk = stand_in(twin_parameters(random_weights(), 0, 1, te=False))
    load_hf_weights([chunk], folder, description, tp_rank=0, tp_size=1)
    return chunk


def test_sharded_files_and_the_links_of_a_download_cache_are_read(tmp_path: Path) -> None:
    weights = random_weights()
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    description = write_folder(snapshot, weights)
    shard(snapshot)
    for file in list(snapshot.glob("*.safetensors")):
        file.rename(blobs / file.stem)
        file.symlink_to(Path("../../blobs") / file.stem)
    chunk = load(snapshot, description)
    for name, expected in twin_parameters(weights, 0, 1, te=False).items():
        assert torch.equal(chunk.get_parameter(name), expected), name


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "weights.bin", "..", "linked.safetensors"],
)
def test_an_index_that_leaves_its_folder_is_refused_unread(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    description = write_folder(folder, random_weights())
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "linked.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(CheckpointError, match="expected a (safetensors )?file inside the folder") as caught:
        load(folder, description)
    assert name in str(caught.value)


def _without_one(weights: dict) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"]


def _with_an_adapter(weights: dict) -> None:
    weights["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 2)


def _transposed(weights: dict) -> None:
    weights["model.layers.0.mlp.down_proj.weight"] = weights["model.layers.0.mlp.down_proj.weight"].T.contiguous()


def _in_integers(weights: dict) -> None:
    weights["model.norm.weight"] = torch.zeros(HIDDEN, dtype=torch.int8)


def _of_another_model(weights: dict) -> None:
    for name in list(weights):
        weights[f"transformer.{name}"] = weights.pop(name)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_without_one, "model.layers.1.mlp.up_proj.weight is missing"),
        (_with_an_adapter, "model.layers.0.self_attn.q_proj.lora_A.weight is not part of"),
        (
            _transposed,
            "model.layers.0.mlp.down_proj.weight has shape [20, 24], expected [24, 20]",
        ),
        (_in_integers, "model.norm.weight is stored as I8"),
        (_of_another_model, "and 44 more"),  # 27 are missing, 27 are extra, 10 are listed
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused_by_name(
    tmp_path: Path, damage: Callable[[dict], None], named: str
) -> None:
    weights = random_weights()
    damage(weights)
    description = write_folder(tmp_path, weights)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, description)
    assert named in str(caught.value)
    assert str(caught.value).count(";") <= 10


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def _huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")


def _shard_missing(folder: Path) -> None:
    shard(folder)
    (folder / "b.safetensors").unlink()


def _tensor_twice(folder: Path) -> None:
    shard(folder)
    weights = load_file(folder / "a.safetensors")
    save_file(load_file(folder / "b.safetensors") | weights, folder / "b.safetensors")


def _empty_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')


def _index_of_a_million_tensors(folder: Path) -> None:
    shard(folder)
    index = {"weight_map": {str(number): "a.safetensors" for number in range(10**6)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_of_files_that_are_not_there(folder: Path) -> None:
    shard(folder)
    index = {"weight_map": {str(number): f"{number:06}.safetensors" for number in range(300_000)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_no_weights, "found no weights, expected model.safetensors or"),
        (_pickles_only, r"pytorch_model\.bin"),
        (_truncated, "expected a readable safetensors"),
        (_huge_header, "expected a readable safetensors"),
        (_shard_missing, r"b\.safetensors: found no such file"),
        (_index_of_a_million_tensors, r"model\.safetensors\.index\.json: cannot be read \(it has \d+ bytes, more than"),
        (_index_of_files_that_are_not_there, r"000000\.safetensors: found no such file"),
        (_tensor_twice, r"also in a\.safetensors"),
        (_empty_index, "found no weight_map or an empty one"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, damage: Callable[[Path], None], named: str) -> None:
    description = write_folder(tmp_path, random_weights())
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=named):
        load(tmp_path, description)


def test_a_head_stored_beside_its_tied_embedding_must_be_the_same(tmp_path: Path) -> None:
    weights = random_weights()
    description = write_folder(tmp_path, weights, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="lm_head.weight that differs"):
        load(tmp_path, description)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    write_folder(tmp_path, weights, tie_word_embeddings=True)
    load(tmp_path, description)


def test_rotary_frequencies_of_old_files_are_passed_over(tmp_path: Path) -> None:
    weights = random_weights() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    load(tmp_path, write_folder(tmp_path, weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_streamed_file_is_what_the_library_reads_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "b": torch.randn(3, 5).to(dtype),
        "a": torch.randn(7),
        "c": torch.randn(4, 6).to(dtype).T,
    }
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", specs, iter(tensors.values()))
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number_is_named_with_its_file_on_the_way_in(tmp_path: Path, value: float) -> None:
    weights = random_weights()
    weights["model.layers.1.mlp.up_proj.weight"][2, 1] = value
    description = write_folder(tmp_path, weights)
    path = tmp_path / "model.safetensors"
    with pytest.raises(NumericsError, match=f"{path}: model.layers.1.mlp.up_proj.weight: found 1 of .* not finite"):
        load(tmp_path, description)


def test_a_weight_that_is_no_number_or_becomes_none_by_a_cast_is_not_written(tmp_path: Path) -> None:
    for values in (torch.tensor([1.0, math.nan]), torch.tensor([1e6]).half()):
        with pytest.raises(NumericsError, match=r"^x.safetensors: a: found 1 of"):
            write_safetensors(tmp_path / "x.safetensors", {"a": TensorSpec(values.shape, values.dtype)}, [values])
