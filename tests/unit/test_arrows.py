"""The rooms of the package depend on each other in one direction, and each keeps out of what is not its own."""

import ast
import subprocess
import sys

import pytest
from package_modules import MODULES, PACKAGE, imported, room

# What each room may import of the package, itself apart.
MAY_IMPORT = {
    "lazy": set(),
    "collector": set(),
    "errors": set(),
    "atomic": set(),
    "option_field": set(),
    "limits": set(),
    "logs": {"errors"},
    "stop_signals": {"errors"},
    "faults": {"errors"},
    "launched": {"errors"},
    "parallel_sizes": set(),
    "ranks": {"errors"},
    "loss": {"errors", "option_field", "lazy"},
    "data": {"errors", "atomic", "limits", "option_field", "lazy"},
    "parallel": {"errors", "launched", "parallel_sizes"},
    "demo": {"errors", "atomic", "data"},
    "config": {"errors", "option_field", "loss", "data", "parallel_sizes"},
    "mcore": {"errors", "limits", "faults", "loss", "data", "parallel", "ranks", "config"},
    "convert": {"errors", "lazy", "atomic", "limits", "data", "parallel", "ranks", "config", "mcore"},
    "checkpoint": {"errors", "atomic", "limits", "parallel", "ranks", "config", "mcore", "convert"},
    "nemo": {"errors", "limits", "data", "config"},
    "megatron_lm": {"errors", "loss", "data", "parallel", "ranks", "config", "mcore"},
    "planning": {"errors", "parallel_sizes", "loss", "data", "config", "mcore"},
    "reporting": {"errors", "atomic", "limits", "data", "parallel", "config", "mcore"},
    "recipes": {"errors", "config", "training"},
    "training": {
        "errors",
        "collector",
        "limits",
        "logs",
        "atomic",
        "launched",
        "faults",
        "stop_signals",
        "loss",
        "data",
        "parallel",
        "ranks",
        "demo",
        "config",
        "mcore",
        "convert",
        "checkpoint",
        "reporting",
        "nemo",
        "planning",
    },
    "sweep": {
        "errors",
        "limits",
        "atomic",
        "loss",
        "data",
        "ranks",
        "config",
        "mcore",
        "checkpoint",
        "planning",
        "reporting",
        "training",
    },
    "generation": {"errors", "atomic", "limits", "data", "mcore", "checkpoint"},
    "evaluation": {"errors", "atomic", "generation", "reporting"},
    "offline": {
        "errors",
        "collector",
        "logs",
        "data",
        "parallel",
        "config",
        "mcore",
        "convert",
        "checkpoint",
        "reporting",
    },
    "gpu_check": {
        "errors",
        "atomic",
        "faults",
        "loss",
        "data",
        "parallel",
        "parallel_sizes",
        "demo",
        "config",
        "mcore",
        "planning",
    },
    "commands": {
        "errors",
        "logs",
        "loss",
        "data",
        "parallel",
        "config",
        "mcore",
        "convert",
        "reporting",
        "planning",
        "training",
        "sweep",
        "generation",
        "evaluation",
        "offline",
        "gpu_check",
    },
    "cli": {"errors", "logs", "stop_signals"},
    "__main__": {"cli"},
}
# What each inner room of a large room may import of that room, itself apart.
INNER_ROOMS = {
    "data": {
        "pair_options": set(),
        "batch_options": set(),
        "tokenizer_files": set(),
        "bounded_dict": set(),
        "ngrams": set(),
        "records": {"pair_options"},
        "sources": {"pair_options", "records"},
        "rendering": {"pair_options", "tokenizer_files", "bounded_dict", "records"},
        "tokenization": {"pair_options", "tokenizer_files", "bounded_dict", "records", "rendering"},
        "store": {"pair_options", "records", "sources", "rendering", "tokenization"},
        "dataset": {"pair_options", "sources", "store", "tokenization"},
        "batching": {"batch_options", "tokenization", "dataset"},
        "inspection": {"records", "rendering", "tokenization", "store", "dataset"},
    },
    "mcore": {
        "expert_choice": set(),
        "fp32_weights": set(),
        "fp8_weights": set(),
        "hf": set(),
        "latent_sizes": set(),
        "lora": set(),
        "microbatch": set(),
        "patch_table": set(),
        "precision": set(),
        "userbuffers": set(),
        "varlen_kernels": set(),
        "architecture": {"expert_choice", "latent_sizes"},
        "device": {"varlen_kernels"},
        "family": {"hf"},
        "forward_step": {"microbatch"},
        "attention": {"hf", "microbatch", "varlen_kernels", "architecture", "device"},
        "optimizer": {"fp32_weights", "fp8_weights", "precision", "device"},
        "cpu_patches": {"patch_table", "device", "attention"},
        "families": {"expert_choice", "hf", "latent_sizes", "family", "attention"},
        "layers": {"expert_choice", "microbatch", "architecture", "families"},
        "specs": {"architecture", "device", "attention", "layers"},
        "model": {
            "lora",
            "microbatch",
            "precision",
            "architecture",
            "device",
            "attention",
            "families",
            "layers",
            "specs",
        },
        "meta_model": {"families", "layers", "specs", "model"},
    },
    "training": {
        "profiling": set(),
        "result": set(),
        "step": set(),
        "repetition": {"step"},
        "start": {"step"},
        "finish": {"start"},
        "log_window": {"step", "start"},
        "peers": {"start"},
        "reference": {"step", "start", "peers"},
        "fp8_noise": {"start", "reference"},
        "saving": {"start", "peers"},
        "memory_check": {"step", "start", "saving"},
        "monitors": {"repetition", "start", "saving"},
        "session": {"step", "start", "peers", "saving"},
        "loop": {
            "profiling",
            "step",
            "start",
            "finish",
            "log_window",
            "peers",
            "reference",
            "saving",
            "memory_check",
            "monitors",
            "session",
        },
        "run": {"result", "start", "session", "loop"},
        "launch": {"start", "peers", "run"},
    },
}
# Outside packages that a room must do without, at import and in its functions alike.
FORBIDDEN = {
    "errors": {"torch", "megatron", "transformers", "yaml", "numpy"},
    "loss": {"megatron", "transformers", "datasets", "yaml", "rich"},
    "data": {"megatron"},
    "config": {"torch", "numpy", "megatron", "transformers", "datasets"},
    "convert": {"transformers"},
    "nemo": {"torch", "megatron", "transformers", "nemo", "hydra"},
    "cli": {"torch", "megatron", "transformers", "yaml", "numpy", "rich"},
}
ROOMS = {room(path) for path in MODULES}
DOOR = PACKAGE / "__init__.py"


def arrows(path, tree=None):
    """(line, room) of every import from within the package."""
    for line, name in imported(path, tree):
        package, _, inside = name.partition(".")
        if package == PACKAGE.name and inside.split(".")[0] in ROOMS:
            yield line, inside.split(".")[0]


def backward(path, tree=None):
    own = room(path)
    return [
        f"{path.relative_to(PACKAGE)}:{line} {own} imports {other}"
        for line, other in arrows(path, tree)
        if other != own and other not in MAY_IMPORT[own]
    ]


def test_no_arrow_points_back():
    assert [arrow for path in MODULES if path != DOOR for arrow in backward(path)] == []


def test_every_room_has_its_arrows_stated():
    rooms = {room(path) for path in MODULES if path != DOOR}
    assert rooms <= set(MAY_IMPORT)
    assert {"loss", "data", "config", "mcore", "training"} <= rooms


@pytest.mark.parametrize("allowed", [MAY_IMPORT, *INNER_ROOMS.values()], ids=["package", *INNER_ROOMS])
def test_the_arrows_allowed_have_no_circle(allowed):
    open_rooms, order = dict(allowed), []
    while open_rooms:
        free = [name for name, others in open_rooms.items() if others <= set(order)]
        assert free, f"a circle among {sorted(open_rooms)}"
        order += free
        open_rooms = {name: others for name, others in open_rooms.items() if name not in free}


def inner_room(path):
    """(room, inner room) of a file in a large room; None of other files, and of a large room's own door."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:2] if parts[0] in INNER_ROOMS and parts[1] != "__init__" else None


def inner_arrows(path, tree=None):
    """(line, inner room) of every import from within the same large room."""
    large = inner_room(path)[0]
    for line, name in imported(path, tree):
        parts = name.split(".")
        if parts[:2] == [PACKAGE.name, large] and len(parts) > 2:
            yield line, parts[2]


def inner_backward(path, tree=None):
    large, own = inner_room(path)
    return [
        f"{path.relative_to(PACKAGE)}:{line} {own} imports {other}"
        for line, other in inner_arrows(path, tree)
        if other != own and other not in INNER_ROOMS[large][own]
    ]


def past_doors(path, tree=None):
    """Imports of modules inside an inner room from outside it, where its `__init__` is a door: it has an `__all__`."""
    for line, name in imported(path, tree):
        _, *inside = name.split(".")
        if len(inside) > 2 and inside[0] in INNER_ROOMS and tuple(inside[:2]) != inner_room(path):
            door = PACKAGE.joinpath(*inside[:2], "__init__.py")
            if door.with_name(f"{inside[2]}.py").exists() and "__all__" in door.read_text():
                yield f"{path.relative_to(PACKAGE)}:{line} {name}"


@pytest.mark.parametrize("large", INNER_ROOMS)
def test_inner_rooms_import_in_one_direction(large):
    paths = [path for path in MODULES if room(path) == large and inner_room(path)]
    assert {inner_room(path)[1] for path in paths} == set(INNER_ROOMS[large])
    assert [arrow for path in paths for arrow in inner_backward(path)] == []


def test_inner_rooms_are_entered_by_their_doors():
    assert [arrow for path in MODULES for arrow in past_doors(path)] == []


def test_the_walk_sees_arrows_between_inner_rooms():
    tree = ast.parse("from simpo_megatron.data import store\nfrom simpo_megatron.data.store.chunks import encode_chunk")
    records = PACKAGE / "data/records/parsing.py"
    assert len(inner_backward(records, tree)) == 2
    assert len(list(past_doors(records, tree))) == len(list(past_doors(PACKAGE / "cli.py", tree))) == 1
    assert inner_backward(PACKAGE / "data/store/chunks.py", tree) == []
    assert list(past_doors(PACKAGE / "data/store/chunks.py", tree)) == []


def test_no_room_imports_a_package_it_does_without():
    found = [
        f"{path.relative_to(PACKAGE)}:{line} {name}"
        for path in MODULES
        for line, name in imported(path)
        if name.split(".")[0] in FORBIDDEN.get(room(path), ())
    ]
    assert found == []


def test_the_walk_sees_an_arrow_that_points_back():
    tree = ast.parse("def f():\n    from simpo_megatron.training import loop\n    import simpo_megatron.mcore.model")
    assert len(backward(PACKAGE / "loss/simpo.py", tree)) == 2
    relative = ast.parse("from ..data import records")
    assert len(backward(PACKAGE / "loss/simpo.py", relative)) == 1


@pytest.mark.processes
@pytest.mark.parametrize(
    ("module", "unloaded"),
    [
        ("simpo_megatron", ("torch", "megatron", "transformers", "yaml", "numpy")),
        ("simpo_megatron.cli", ("torch", "megatron", "transformers", "yaml", "numpy", "rich")),
        ("simpo_megatron.loss", ("megatron", "transformers", "datasets", "yaml", "rich")),
        ("simpo_megatron.data", ("megatron", "transformers", "datasets", "pyarrow")),
        ("simpo_megatron.config", ("torch", "numpy", "megatron", "transformers", "datasets", "matplotlib")),
    ],
)
def test_importing_a_door_loads_nothing_it_does_without(module, unloaded):
    script = f"import sys, {module}; print([name for name in {unloaded!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=PACKAGE.parent
    )
    assert done.stdout.strip() == "[]", done.stderr
