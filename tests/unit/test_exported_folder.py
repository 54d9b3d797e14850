"""An exported Llama-3 is what transformers and vLLM expect to read: both stop ids, one BOS, bf16, shards of 5 GB."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_llama3
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
)

from simpo_megatron.config import config_from
from simpo_megatron.errors import CheckpointError
from simpo_megatron.mcore import cpu_patches
from simpo_megatron.parallel import alone
from tools import convert_hf

cpu_patches.install()

from simpo_megatron.convert import export_hf, load_hf_weights  # noqa: E402
from simpo_megatron.convert.files import TensorSpec, header_bytes  # noqa: E402
from simpo_megatron.convert.folder import (  # noqa: E402
    MAX_SHARD_BYTES,
    check_model_files,
    copy_model_files,
    divide,
    write_config,
)
from simpo_megatron.convert.mapping import hf_tensors  # noqa: E402
from simpo_megatron.mcore.families import describe_hf_model  # noqa: E402
from simpo_megatron.mcore.model import build_model  # noqa: E402

QUESTION = [{"role": "user", "content": "What is the weather where you are?"}]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A Llama 3 of random weights, stored in bf16, its head apart from its embedding."""
    folder = tmp_path_factory.mktemp("llama3") / "source"
    write_llama3(
        folder,
        generation={"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return folder


@pytest.fixture(scope="module", params=["export_hf", "mcore-to-hf"])
def exported(request, source: Path, tmp_path_factory) -> Path:
    """The folder that the end of a training leaves, in several files, and that of the offline tool, in one."""
    parent = tmp_path_factory.mktemp("exported")
    out = parent / "hf"
    if request.param == "mcore-to-hf":
        assert convert_hf.main(["hf-to-mcore", str(source), str(parent / "megatron")]) == 0
        assert convert_hf.main(["mcore-to-hf", str(parent / "megatron"), str(out)]) == 0
        return out
    with alone() as groups:
        description = describe_hf_model(source)
        config = config_from(model=str(source), data=("unused",), bf16=False)
        model = build_model(description, config, groups)
        load_hf_weights(model, source, description, tp_rank=0, tp_size=1)
        export_hf(model, description, source, out, groups=groups, max_shard_bytes=50_000)
    return out


def test_the_weights_are_bf16_and_the_index_is_whole(exported: Path, source: Path) -> None:
    files = sorted(path.name for path in exported.glob("*.safetensors"))
    stored = {name: load_file(exported / name) for name in files}
    tensors = {key: tensor for part in stored.values() for key, tensor in part.items()}
    expected = load_file(source / "model.safetensors")
    assert tensors.keys() == expected.keys() and "lm_head.weight" in tensors
    assert all(tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected[key]) for key, tensor in tensors.items())
    if len(files) == 1:
        assert files == ["model.safetensors"] and not (exported / "model.safetensors.index.json").exists()
        return
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: name for name, part in stored.items() for key in part}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_config_names_architecture_and_dtype_and_no_foreign_code(exported: Path, source: Path) -> None:
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (exported, source))
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert config == before and "auto_map" not in config


def test_generation_stops_at_both_ids(exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    stops = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    generation = GenerationConfig.from_pretrained(exported)
    assert generation.eos_token_id == stops and generation.temperature == 0.6
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == stops
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    for stop in stops:
        with torch.no_grad():
            model.lm_head.weight.zero_()
            hidden = model.model(**ids).last_hidden_state[0, -1]
            model.lm_head.weight[stop] = hidden
        answer = model.generate(**ids, do_sample=False, max_new_tokens=4, pad_token_id=stops[0])
        assert answer[0, ids["input_ids"].shape[1] :].tolist() == [stop]


def test_a_templated_prompt_begins_with_one_bos_and_so_does_plain_text(exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    bos = tokenizer.bos_token_id
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    # As a server does it: the template's text first, and its tokens without any that the tokenizer would add.
    text = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert ids[0] == bos and ids.count(bos) == 1
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    plain = tokenizer("the weather")["input_ids"]
    assert plain[0] == bos and plain.count(bos) == 1 and len(plain) > 1


def test_no_file_of_a_large_model_is_larger_than_5_gb(tmp_path: Path) -> None:
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    LlamaConfig(**shape, num_key_value_heads=8, vocab_size=128256).save_pretrained(tmp_path)
    tensors = hf_tensors(describe_hf_model(tmp_path))
    assert sum(map(math.prod, tensors.values())) == 70_553_706_496
    parts = divide({name: TensorSpec(dims, torch.bfloat16) for name, dims in tensors.items()}, MAX_SHARD_BYTES)
    sizes = [len(header_bytes(part)) + sum(spec.num_bytes for spec in part.values()) for part in parts]
    assert max(sizes) <= 5 * 10**9 and len(sizes) == 30


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A snapshot of Hugging Face's cache: a folder of links into the blobs beside it."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("LICENSE", "generation_config.json", "tokenizer_config.json")):
        (blobs / str(number)).write_text("{}")
        (snapshot / name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_a_snapshot_of_links_into_its_blobs_is_copied_as_files(linked: Path, tmp_path: Path) -> None:
    (linked / "NOTICE").symlink_to("LICENSE")
    (tmp_path / "out").mkdir()
    copy_model_files(linked, tmp_path / "out")
    copied = {path.name: path.is_symlink() for path in (tmp_path / "out").iterdir()}
    assert copied == dict.fromkeys(("LICENSE", "NOTICE", "generation_config.json", "tokenizer_config.json"), False)


@pytest.mark.parametrize("name", ["LICENSE.txt", "NOTICE", "chat_template.jinja", "tokenizer.json", "vocab.json",
                                  "additional_chat_templates/a.jinja"])  # fmt: skip
@pytest.mark.parametrize("through", ["absolute", "relative", "folder"])
def test_a_link_to_what_is_no_part_of_the_model_is_refused_by_name(linked, tmp_path, name, through) -> None:
    private = tmp_path / "private"
    private.mkdir()
    (private / Path(name).name).write_text("{}")
    link = linked / name
    if through == "folder" and "/" in name:
        link.parent.symlink_to(private)
    elif through == "folder":
        (linked / "sub").symlink_to(private)
        link.symlink_to(Path("sub") / name)
    else:
        link.parent.mkdir(exist_ok=True)
        target = private / link.name
        link.symlink_to(target if through == "absolute" else os.path.relpath(target, link.parent))
    for check in (check_model_files, lambda folder: copy_model_files(folder, tmp_path)):
        with pytest.raises(CheckpointError, match=f"{link}: found a link to {private}"):
            check(linked)
    assert not (tmp_path / name).exists()


def test_blobs_are_those_of_a_snapshot_alone(linked: Path, tmp_path: Path) -> None:
    other = tmp_path / "a" / "b" / "c"
    other.mkdir(parents=True)
    (tmp_path / "a" / "blobs").mkdir()
    (tmp_path / "a" / "blobs" / "LICENSE").write_text("private")
    (other / "LICENSE").symlink_to("../../blobs/LICENSE")
    with pytest.raises(CheckpointError, match="found a link"):
        check_model_files(other)


def test_what_names_foreign_code_reaches_neither_an_export_nor_a_checkpoint(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    named = {"auto_map": {"AutoTokenizer": ["a--b.C", None]}, "kept": [{"auto_map": 1, "also": 2}]}
    # Escaped, as json allows: what looks for the word in the text does not find it.
    (source / "tokenizer_config.json").write_text(json.dumps(named).replace("auto_map", "auto\\u005fmap"))
    (source / "generation_config.json").write_text(' {"kept":1}')
    (source / "custom.py").write_text("")
    copy_model_files(source, target)
    write_config(target, {"model_type": "llama", "auto_map": {}, "custom_pipelines": {}, "kept": 1})
    assert json.loads((target / "tokenizer_config.json").read_text()) == {"kept": [{"also": 2}]}
    assert json.loads((target / "config.json").read_text()) == {"model_type": "llama", "kept": 1}
    assert (target / "generation_config.json").read_text() == ' {"kept":1}'
    assert len(list(target.iterdir())) == 3
