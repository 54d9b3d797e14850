"""The rooms of the package depend on each other in one direction, and each keeps out of what is not its own."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "simpo_megatron"

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
        "inspection": {"records", "rendering", "store", "dataset"},
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
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    """The room a file stands in: its folder below the package, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_package_itself(path):
    return path == PACKAGE / "__init__.py"


def imported(path, tree=None):
    """(line, dotted name) of everything a module imports, wherever in it; `from a import b` gives a.b."""
    for node in ast.walk(tree or ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            anchor = path.relative_to(PACKAGE.parent).parts[: -node.level] if node.level else ()
            module = ".".join([*anchor, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def arrows(path, tree=None):
    """(line, room) of every import from within the package."""
    rooms = {room(module) for module in MODULES}
    for line, name in imported(path, tree):
        package, _, inside = name.partition(".")
        if package == PACKAGE.name and inside.split(".")[0] in rooms:
            yield line, inside.split(".")[0]


def backward(path, tree=None):
    own = room(path)
    return [
        f"{path.name}:{line} {own} imports {other}"
        for line, other in arrows(path, tree)
        if other != own and other not in MAY_IMPORT[own]
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_arrow_points_back(path):
    if not is_package_itself(path):
        assert backward(path) == []


def test_every_room_has_its_arrows_stated():
    rooms = {room(path) for path in MODULES if not is_package_itself(path)}
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
        f"{path.name}:{line} {own} imports {other}"
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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_room_imports_a_package_it_does_without(path):
    forbidden = FORBIDDEN.get(room(path), set())
    assert [(line, name) for line, name in imported(path) if name.split(".")[0] in forbidden] == []


def test_only_parallel_reads_megatrons_global_state():
    readers = {path.name for path in MODULES if "parallel_state" in path.read_text()}
    assert readers <= {"parallel.py"}


OBJECT_COLLECTIVE = re.compile(r"(all_gather|gather|broadcast|scatter|send|recv)_object(_list)?")


def object_collectives(path, tree=None):
    """`file: function` of every function that hands objects from rank to rank."""
    for node in ast.walk(tree or ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            for inner in ast.walk(node):
                if OBJECT_COLLECTIVE.fullmatch(getattr(inner, "attr", getattr(inner, "id", ""))):
                    yield f"{path.relative_to(PACKAGE)}: {node.name}"


def test_ranks_agree_in_one_place():
    found = [place for path in MODULES for place in object_collectives(path)]
    assert {place.split(":")[0] for place in found} == {"ranks.py"}
    tree = ast.parse("def f():\n    dist.broadcast_object_list([1])\ndef g():\n    all_gather_object(x, y)")
    assert len(list(object_collectives(PACKAGE / "loss/simpo.py", tree))) == 2, "the walk sees others"


def test_folders_appear_and_locks_are_taken_in_one_place():
    names = {"os.rename", "os.replace", "fcntl.flock", "fcntl.lockf", "FileLock"}
    users = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if names & (attributes(path) | {name.split(".")[-1] for _, name in imported(path)})
    }
    assert users == {"atomic.py"}


def test_no_module_and_no_class_has_the_name_of_another():
    # A command has the name of what it starts.
    trades = [path for path in MODULES if room(path) != "commands"]
    stems = Counter(path.stem for path in trades if path.stem not in ("__init__", "__main__"))
    classes = Counter(
        node.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in (stems + classes).items() if count > 1] == []


def attributes(path):
    """Dotted names read in a module, such as torch.cuda.is_available."""
    return {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


def test_only_device_asks_whether_cuda_is_there():
    asking = {path.name for path in MODULES if "torch.cuda.is_available" in attributes(path)}
    assert asking == {"device.py"}


_LOGGER_CHANGES = {"addFilter", "removeFilter", "addHandler", "removeHandler", "setLevel"}
_ON_IMPORT = _LOGGER_CHANGES | {"basicConfig", "filterwarnings", "simplefilter", "captureWarnings", "disable"}


def foreign_names(tree):
    """The names under which a file imports modules, classes and functions that it did not write."""
    return {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }


def root_of(node):
    """The name that a chain of attributes, calls and items begins with; None where it begins with no name."""
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def patches(path, tree=None):
    """Changes of somebody else's code: attributes of what the file imported assigned, set or deleted, and its loggers.

    Of loggers their own are those that `logging.getLogger` gives for `__name__` or a name of the package.
    """
    tree = tree or ast.parse(path.read_text())
    foreign = foreign_names(tree)
    for node in ast.walk(tree):
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Attribute) and root_of(target) in foreign:
                yield f"{path.name}:{target.lineno} {ast.unparse(target)}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in ("setattr", "delattr") and root_of(node.args[0]) in foreign:
            yield f"{path.name}:{node.lineno} {ast.unparse(node)}"
        if called.rpartition(".")[2] in _LOGGER_CHANGES and is_foreign_logger(node.func.value, foreign):
            yield f"{path.name}:{node.lineno} {ast.unparse(node)}"


def is_foreign_logger(logger, foreign):
    if not isinstance(logger, ast.Call):
        return root_of(logger) in foreign
    if not ast.unparse(logger.func).endswith("getLogger"):
        return root_of(logger) in foreign
    name = ast.unparse(logger.args[0]) if logger.args else ""
    return name != "__name__" and not name.strip("'\"").startswith(PACKAGE.name)


def run_on_import(tree):
    """The calls that importing a module makes: those outside functions."""
    open_nodes = list(tree.body)
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Call):
            yield node
        open_nodes += ast.iter_child_nodes(node)


def set_on_import(path, tree=None):
    """Filters and handlers of logging or warnings that importing a module sets."""
    for node in run_on_import(tree or ast.parse(path.read_text())):
        if isinstance(node.func, ast.Attribute) and node.func.attr in _ON_IMPORT:
            yield f"{path.name}:{node.lineno} {ast.unparse(node)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_cpu_patches_changes_what_others_wrote(path):
    if path != PACKAGE / "mcore/cpu_patches.py":
        assert list(patches(path)) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_importing_a_module_sets_no_filter(path):
    assert list(set_on_import(path)) == []


def test_the_walk_sees_every_kind_of_patch():
    source = """
import logging, warnings
import torch
from megatron.core import utils
torch.cuda.synchronize = None
torch.cuda.calls += 1
setattr(torch.Tensor, "type", None)
delattr(utils, "log_single_rank")
logging.getLogger("megatron.core").addFilter(print)
utils.logger.setLevel(40)
logging.getLogger(utils.__name__).addFilter(print)
def f():
    setattr(utils, "a", 1)
    logging.getLogger("transformers").setLevel(40)
warnings.simplefilter("ignore")
"""
    path = PACKAGE / "training/loop.py"
    assert len(list(patches(path, ast.parse(source)))) == 9
    assert len(list(set_on_import(path, ast.parse(source)))) == 4
    own = "import logging\nlogger = logging.getLogger(__name__)\ndef f(own):\n    logger.setLevel(20)\n    own.x = 1\n"
    own += "    setattr(own, 'x', 2)\n    logging.getLogger('simpo_megatron').addHandler(own)\n"
    assert list(patches(path, ast.parse(own))) == list(set_on_import(path, ast.parse(own))) == []
    assert list(patches(PACKAGE / "mcore/cpu_patches.py")), "the patches there are seen"


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
