"""The extra `te` without a GPU: what we and megatron-core ask of Transformer Engine stands in its wheels.

`make test-extras` fetches the oldest and the newest wheel that the extra allows into the folder that SIMPO_TE_WHEELS
names, and beside them the versions of its compiled cores. Sources are read as text; nothing of it can be imported here.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import requires
from pathlib import Path

import megatron.core
import pytest
from dataclass_sources import Sources
from packaging.requirements import Requirement
from packaging.version import Version
from ranks import REPOSITORY

from simpo_megatron.mcore import userbuffers

FOLDER = Path(os.environ.get("SIMPO_TE_WHEELS") or "none")
WHEELS = {path.name.split("-")[1]: path for path in sorted(FOLDER.glob("transformer_engine-*.whl"))}
MEGATRON = Path(megatron.core.__file__).parent
EXTENSION = MEGATRON / "extensions" / "transformer_engine.py"
# megatron's classes of which layer specs of ours consist, each a subclass of Transformer Engine's.
LAYERS = {
    *("TELinear", "TELayerNormColumnParallelLinear", "TEDotProductAttention", "TEGroupedLinear"),
}
RECIPES = {"Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"}
TORCH = "transformer_engine.pytorch"
pytestmark = pytest.mark.skipif(not WHEELS, reason="SIMPO_TE_WHEELS names no folder of Transformer Engine's wheels")


@pytest.fixture(params=WHEELS, scope="module")
def sources(request):
    return Sources([WHEELS[request.param]])


def signature(arguments: ast.arguments) -> inspect.Signature:
    """The signature that a `def` with these arguments has, its defaults all None."""
    names = ast.unparse(
        ast.arguments(**{**vars(arguments), "defaults": [ast.Constant(None)] * len(arguments.defaults)})
    )
    scope: dict[str, object] = {}
    exec(f"from __future__ import annotations\ndef function({names}): ...", {}, scope)  # no source but argument names
    return inspect.signature(scope["function"])  # type: ignore[arg-type]


def keywords(call: ast.Call) -> set[str]:
    return {key.arg for key in call.keywords if key.arg is not None}


def test_the_extra_resolves_to_a_wheel_with_a_core_for_each_cuda():
    ours = [Requirement(text) for text in requires("simpo-megatron") or ()]
    asked = {
        extra: one
        for one in ours
        for extra in ("te", "te-cu13")
        if one.marker and one.marker.evaluate({"extra": extra})
    }
    oldest, newest = sorted(WHEELS, key=Version)
    for requirement in asked.values():
        assert requirement.name == "transformer-engine" and all(map(requirement.specifier.contains, WHEELS))
        assert not requirement.specifier.contains(f"{Version(oldest).major}.{Version(oldest).minor - 1}")
    for version, wheel in WHEELS.items():
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            metadata = Parser().parsestr(archive.read(name).decode())
        needed = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
        for extra, requirement in asked.items():
            # 2.9.0 writes core_cu12 where newer ones write core-cu12.
            parts = [{one, one.replace("_", "-")} for one in requirement.extras]
            found = [
                one for one in needed if any(one.marker.evaluate({"extra": name}) for part in parts for name in part)
            ]
            assert {str(one.specifier) for one in found} == {f"=={version}"}, (extra, needed)
            cuda = "cu13" if extra.endswith("13") else "cu12"
            assert {one.name.replace("_", "-") for one in found} == {
                f"transformer-engine-{part}" for part in (cuda, "torch")
            }
            for one in found:
                offered = (FOLDER / f"{one.name.replace('_', '-')}.txt").read_text()
                assert version in offered.replace(",", " ").split(), (one.name, offered)
    assert Version(oldest) < Version(newest)


def test_the_userbuffers_have_our_names_and_arguments(sources):
    tree = ast.parse(inspect.getsource(userbuffers))
    used = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "engine"
    }
    assert used == {"initialize_ub", "destroy_ub", "UserBufferQuantizationMode"}
    definitions = {name: sources.definition(userbuffers._MODULE, name) for name in used}
    assert None not in definitions.values()
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "engine.initialize_ub"
    ]
    signature(definitions["initialize_ub"].args).bind(**dict.fromkeys(keywords(call)))
    modes = ast.unparse(definitions["UserBufferQuantizationMode"])
    assert "NONE = " in modes and "FP8 = " in modes


def test_there_is_a_buffer_for_every_layer_of_an_moe_that_asks_for_one(sources):
    """Experts ask for none: their layers are told so by megatron, and a grouped one refuses to be told otherwise."""
    named = {
        node.value
        for node in ast.walk(sources.definition(userbuffers._MODULE, "initialize_ub"))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    kinds = {"attention.py": {"qkv", "proj"}, "mlp.py": {"fc1", "fc2"}, "multi_latent_attention.py": {"proj"}}
    for file, expected in kinds.items():
        tree = ast.parse((MEGATRON / "transformer" / file).read_text())
        given = {
            key.value.value
            for call in ast.walk(tree)
            if isinstance(call, ast.Call)
            for key in call.keywords
            if key.arg == "tp_comm_buffer_name" and isinstance(key.value, ast.Constant)
        }
        known = {name for name in given if {f"{name}_fprop", f"{name}_dgrad"} <= named}
        assert known == expected and (given > known) == file.startswith("multi_latent")
    layers = {node.name: node for node in ast.walk(ast.parse(EXTENSION.read_text())) if isinstance(node, ast.ClassDef)}
    without = [
        ast.unparse(line)
        for branch in ast.walk(layers["TELinear"])
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "is_expert"
        for line in branch.body
    ]
    assert {f"extra_kwargs['ub_overlap_{kind}'] = False" for kind in ("ag", "rs")} <= set(without)
    assert "GroupedLinear doesn't support Userbuffer overlap" in ast.unparse(sources.definition(TORCH, "GroupedLinear"))


def test_attention_has_the_arguments_of_a_pack(sources):
    attention = sources.definition(TORCH, "DotProductAttention")
    methods = {node.name: node.args for node in attention.body if isinstance(node, ast.FunctionDef)}
    tree = ast.parse((REPOSITORY / "simpo_megatron" / "mcore" / "attention" / "te_attention.py").read_text())
    calls = {ast.unparse(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    pack = calls["super(TEDotProductAttention, self).forward"]
    bound = signature(methods["forward"]).bind("self", *pack.args, **dict.fromkeys(keywords(pack)))
    assert {"qkv_format", "cu_seqlens_q", "max_seqlen_kv", "attn_mask_type"} <= bound.arguments.keys()
    signature(methods["set_context_parallel_group"]).bind("self", *calls["self.set_context_parallel_group"].args)
    assert "padding_causal_bottom_right" in ast.unparse(attention)


def test_every_argument_that_megatrons_layers_give_exists(sources):
    seen = set()
    for node in ast.walk(ast.parse(EXTENSION.read_text())):
        if isinstance(node, ast.ClassDef) and node.name in LAYERS:
            calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
            (call,) = [call for call in calls if ast.unparse(call.func) == "super().__init__"]
            known = sources.constructor_arguments(TORCH, ast.unparse(node.bases[0]).rpartition(".")[2])
            assert keywords(call) <= known, f"{node.name}: {keywords(call) - known}"
            seen.add(node.name)
    assert seen == LAYERS


@pytest.mark.parametrize("version", WHEELS)
def test_every_recipe_is_made_by_the_arguments_that_megatron_gives(version, tmp_path, monkeypatch):
    """Recipes are plain classes in a module of their own, which needs neither CUDA nor the rest."""
    pytest.importorskip("pydantic", reason="Transformer Engine's recipes are classes of pydantic, which is not here")
    with zipfile.ZipFile(WHEELS[version]) as archive:
        path = archive.extract("transformer_engine/common/recipe/__init__.py", tmp_path)
    spec = importlib.util.spec_from_file_location("recipes_of_a_wheel", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    given = {
        ast.unparse(call.func).rpartition(".")[2]: keywords(call)
        for call in ast.walk(ast.parse((MEGATRON / "fp8_utils.py").read_text()))
        if isinstance(call, ast.Call)
    }
    values = {"fp8_format": module.Format.HYBRID, "fp8_dpa": False}
    for name in RECIPES:
        made = getattr(module, name)(**{key: values[key] for key in given[name]})
        assert made.fp8_format is module.Format.HYBRID
    # megatron derives a class from this one, and passes an argument that it no longer has and ignores.
    delayed = {"margin": 1, "fp8_format": module.Format.HYBRID, "amax_history_len": 7, "amax_compute_algo": "max"}
    made = module.DelayedScaling(
        **delayed, override_linear_precision=(False, False, False), fp8_dpa=False, fp8_mha=False
    )
    assert {key: getattr(made, key) for key in delayed} == delayed


@pytest.mark.processes
def test_a_run_without_a_gpu_uses_torchs_layers_beside_an_engine_that_cannot_be_loaded(tmp_path):
    """The wheel alone is installed, which PyPI calls empty: its import ends with an error that is no ImportError."""
    with zipfile.ZipFile(WHEELS[max(WHEELS, key=Version)]) as archive:
        archive.extractall(tmp_path / "engine")
    path = os.pathsep.join(map(str, (REPOSITORY, tmp_path / "engine")))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}

    def ended(*command: str) -> subprocess.CompletedProcess[str]:
        whole = (sys.executable, *command)
        return subprocess.run(whole, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    imported = ended("-c", "import transformer_engine")
    assert imported.returncode == 1 and "ModuleNotFoundError" not in imported.stderr
    options = ("--preset", "demo", "--train-iters", "1", "--save", "run", "--export-hf", "hf", "--resume", "none")
    done = ended("-m", "simpo_megatron", "train", *options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "layers: torch" in done.stdout and "result    On 96 validation pairs" in done.stdout
