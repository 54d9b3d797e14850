"""Patches of megatron-core and torch are listed, narrow, and absent where CUDA is."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from simpo_megatron.errors import ConfigError
from simpo_megatron.mcore import cpu_patches, device
from simpo_megatron.mcore.patch_table import MODULES_NAMING_CUDA, PATCHES, Patch

RESTORE = "_restore_adam_step_of_the_distributed_optimizer"


@pytest.fixture(scope="module", autouse=True)
def installed():
    cpu_patches.install()


class TransformerEnginesAdam:
    __module__ = "transformer_engine.pytorch.optimizers.fused_adam"


NO_ENGINE = [
    "_define_te_general_gemm",
    "_recompute_parts_without_transformer_engine",
    "_compile_rotary_embedding",
]


@pytest.mark.parametrize(
    ("has_engine", "adam", "expected"),
    [
        (True, TransformerEnginesAdam, []),
        (True, torch.optim.AdamW, [RESTORE]),
        (False, torch.optim.AdamW, [*NO_ENGINE, RESTORE]),
    ],
)
def test_where_cuda_is_there_install_patches_what_an_engine_would_do_and_torchs_adam(
    gpu, monkeypatch, has_engine, adam, expected
):
    ran = []
    for name in PATCHES:
        monkeypatch.setattr(cpu_patches, name, lambda n=name: ran.append(n))
    monkeypatch.setattr(cpu_patches, "_compile_for_any_length", lambda: None)
    monkeypatch.setattr(device, "has_transformer_engine", lambda: has_engine)
    monkeypatch.setattr(device, "has_apex", lambda: True)
    monkeypatch.setattr(importlib.import_module("megatron.core.optimizer"), "Adam", adam)
    assert cpu_patches.install.__wrapped__() is None
    assert ran == expected


def places(patch: Patch) -> list[str]:
    """Each dotted name of a patch, braces written out."""
    found = []
    for place in patch.places.split(" "):
        parent, _, names = place.rpartition(".") if "{" not in place else place.partition(".{")
        found += [f"{parent}.{name}" for name in names.rstrip("}").split(",")]
    return found


def is_needed(patch: Patch) -> bool:
    requirement = Requirement(patch.versions)
    return requirement.specifier.contains(version(requirement.name), prereleases=True)


@pytest.mark.parametrize("patch", PATCHES.values(), ids=list(PATCHES))
def test_every_place_that_is_listed_exists_in_the_versions_that_need_the_patch(patch):
    for place in places(patch) if is_needed(patch) else []:
        owner, _, name = place.rpartition(".")
        assert hasattr(pkgutil.resolve_name(owner), name), place
    assert patch.when and patch.why


def test_every_patch_stands_in_the_list_with_the_names_it_replaces():
    """A function that replaces or filters something is an entry, and replaces what its entry says."""
    tree = ast.parse(inspect.getsource(cpu_patches))
    replaced = {}
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
        names = {key.arg for call in calls if ast.unparse(call.func) == "_replace" for key in call.keywords}
        if any(ast.unparse(call.func).endswith(".addFilter") for call in calls):
            names.add("logger")
        if names:
            replaced[function.name] = names
    listed = {name: {place.rpartition(".")[2] for place in places(patch)} for name, patch in PATCHES.items()}
    assert replaced == listed


def test_install_runs_once():
    step = torch.Tensor.type
    cpu_patches.install()
    assert torch.Tensor.type is step


@pytest.fixture
def any_length():
    dynamo = importlib.import_module("torch._dynamo")
    with dynamo.config.patch(assume_static_by_default=True):
        yield
    dynamo.reset()


@pytest.mark.parametrize("patched", [True, False])
def test_a_fused_function_compiles_once_for_all_lengths(any_length, patched):
    from megatron.core.fusions import fused_bias_dropout

    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if patched:
        cpu_patches._compile_for_any_length()
    function = torch.compile(fused_bias_dropout._bias_dropout_add_func, backend=count)
    for length in (7, 12, 33):
        hidden = torch.randn(length, 1, 4)
        out = function((hidden, None), hidden, 0.0, True)
        assert torch.equal(out, hidden + hidden)
    assert len(graphs) == (1 if patched else 2)


def test_the_rotary_embedding_compiles_once_for_queries_and_keys_of_all_lengths(any_length, monkeypatch):
    """Into one graph without a break, whose values and gradients are megatron's."""
    from megatron.core.models.common.embeddings import rope_utils

    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain, compile_ = rope_utils._apply_rotary_pos_emb_bshd.__wrapped__, torch.compile
    monkeypatch.setattr(rope_utils, "_apply_rotary_pos_emb_bshd", plain)
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=count, fullgraph=True))
    cpu_patches._compile_for_any_length()
    cpu_patches._compile_rotary_embedding()
    for length, num_heads in ((7, 6), (7, 2), (12, 6), (33, 2)):
        rows = torch.randn(length, 1, num_heads, 8, requires_grad=True)
        frequencies = torch.randn(length, 1, 1, 8)
        found = rope_utils._apply_rotary_pos_emb_bshd(rows, frequencies)
        expected = plain(rows, frequencies)
        assert torch.equal(found, expected)
        slope = torch.randn_like(rows)
        assert torch.equal(*(torch.autograd.grad(x, rows, slope)[0] for x in (found, expected)))
    assert len(graphs) == 1


def test_tensor_type_tells_the_truth_to_everybody_but_megatrons_optimizers():
    tensor = torch.zeros(2)
    assert tensor.type() == "torch.FloatTensor"
    assert tensor.type(torch.float64).dtype == torch.float64
    told = {}
    asks = "answer = tensor.type(); other = tensor.type(torch.float64)"
    for module in ("megatron.core.optimizer.clip_grads", "megatron.core.tensor_parallel.layers", "another"):
        scope = {"__name__": module, "tensor": tensor, "torch": torch}
        exec(asks, scope)
        told[module] = scope["answer"]
        assert scope["other"].dtype == torch.float64
    assert told == {
        "megatron.core.optimizer.clip_grads": "torch.cuda.FloatTensor",
        "megatron.core.tensor_parallel.layers": "torch.FloatTensor",
        "another": "torch.FloatTensor",
    }


def test_only_the_modules_that_name_cuda_allocate_on_the_cpu_instead():
    schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    assert schedules.torch.zeros(2, device="cuda").device.type == "cpu"
    assert schedules.torch.tensor([1], dtype=torch.int).dtype == torch.int
    assert schedules.torch.nn is torch.nn
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    assert layers.torch is torch
    assert not isinstance(torch, cpu_patches.TorchOnCpu)


@pytest.mark.parametrize("module", MODULES_NAMING_CUDA)
def test_every_redirected_module_of_the_installed_megatron_still_names_cuda(module):
    """One that no longer does should leave the list; its allocations would not need us."""
    source = Path(importlib.import_module(module).__file__).read_text()
    named = {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    asks_for_device = "torch.cuda.current_device()" in source
    assert "cuda" in named or asks_for_device, f"{module} names no CUDA device"


@pytest.mark.parametrize("factor", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
def test_gradients_are_scaled_where_they_are_by_megatrons_rule(factor):
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_scale

    source = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    expected, rounded, in_place = torch.empty(5, 3), torch.empty(5, 3, dtype=torch.bfloat16), source.clone()
    local_multi_tensor_scale(0, None, [[source], [expected]], factor)
    clip_grads.multi_tensor_scale_impl(0, None, [[in_place, source], [in_place, rounded]], factor)
    assert torch.equal(in_place, expected) and torch.equal(rounded, expected.to(torch.bfloat16))


@pytest.fixture(params=["RuntimeError('empty meta package')", "OSError('libcudart.so.12: no such file')"])
def unloadable_engine(request, tmp_path, monkeypatch):
    """An installed Transformer Engine whose import ends with an error that is no ImportError."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "common.py").write_text("")
    (tmp_path / "transformer_engine" / "__init__.py").write_text(
        f"import transformer_engine.common\nraise {request.param}"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    yield request.param
    for name in ("transformer_engine", "transformer_engine.common"):
        sys.modules.pop(name, None)


def test_without_a_gpu_an_engine_that_cannot_be_loaded_is_as_none_at_all(unloadable_engine):
    cpu_patches.hide_unloadable_transformer_engine()
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.common"):
        with pytest.raises(ImportError):
            importlib.import_module(name)
    assert not device.has_transformer_engine()
    cpu_patches.hide_unloadable_transformer_engine()


def test_on_a_gpu_an_engine_that_cannot_be_loaded_is_a_configuration_error(unloadable_engine, gpu):
    kind = unloadable_engine.split("(")[0]
    with pytest.raises(ConfigError, match=rf"^transformer_engine: .*\({kind}: .*pip install 'simpo-megatron\[te\]'"):
        cpu_patches.hide_unloadable_transformer_engine()
    assert "transformer_engine" not in sys.modules
