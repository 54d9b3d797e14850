"""The rooms of the package depend on each other in one direction, and each keeps out of what is not its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "simpo_megatron"

# What each room may import of the package, itself apart.
MAY_IMPORT = {
    "errors": set(),
    "option_field": set(),
    "logs": {"errors"},
    "faults": {"errors"},
    "loss": {"errors", "option_field"},
    "data": {"errors", "option_field"},
    "parallel": {"errors"},
    "demo": {"errors", "data"},
    "config": {"errors", "option_field", "loss", "data", "parallel"},
    "mcore": {"errors", "faults", "loss", "data", "parallel", "config"},
    "convert": {"errors", "parallel", "config", "mcore"},
    "nemo": {"errors", "data", "config"},
    "megatron_lm": {"errors", "loss", "data", "parallel", "config", "mcore"},
    "planning": {"errors", "parallel", "loss", "config", "mcore"},
    "recipes": {"errors", "config", "training"},
    "training": {"errors", "logs", "faults", "loss", "data", "parallel", "demo", "config", "mcore", "convert", "nemo"},
    "offline": {"errors", "logs", "data", "parallel", "config", "mcore", "convert", "training"},
}
# Outside packages that a room must do without, at import and in its functions alike.
FORBIDDEN = {
    "errors": {"torch", "megatron", "transformers", "yaml", "numpy"},
    "loss": {"megatron", "transformers", "datasets", "yaml", "rich"},
    "data": {"megatron"},
    "config": {"megatron", "transformers", "datasets"},
    "convert": {"transformers"},
    "nemo": {"torch", "megatron", "transformers", "nemo", "hydra"},
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


def test_the_arrows_allowed_have_no_circle():
    open_rooms, order = dict(MAY_IMPORT), []
    while open_rooms:
        free = [name for name, others in open_rooms.items() if others <= set(order)]
        assert free, f"a circle among {sorted(open_rooms)}"
        order += free
        open_rooms = {name: others for name, others in open_rooms.items() if name not in free}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_room_imports_a_package_it_does_without(path):
    forbidden = FORBIDDEN.get(room(path), set())
    assert [(line, name) for line, name in imported(path) if name.split(".")[0] in forbidden] == []


def test_only_parallel_reads_megatrons_global_state():
    readers = {path.name for path in MODULES if "parallel_state" in path.read_text()}
    assert readers <= {"parallel.py"}


def attributes(path):
    """Dotted names read in a module, such as torch.cuda.is_available."""
    return {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


def test_only_device_asks_whether_cuda_is_there():
    asking = {path.name for path in MODULES if "torch.cuda.is_available" in attributes(path)}
    assert asking == {"device.py"}


def assigned_to_foreign_modules(path):
    """Assignments to an attribute of a module that the file imported: a patch of somebody else's code."""
    tree = ast.parse(path.read_text())
    names = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    for node in ast.walk(tree):
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            root = target
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(target, ast.Attribute) and isinstance(root, ast.Name) and root.id in names:
                yield f"{path.name}:{target.lineno} {ast.unparse(target)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_device_patches_what_others_wrote(path):
    if path != PACKAGE / "mcore/device.py":
        assert list(assigned_to_foreign_modules(path)) == []


def test_the_walk_sees_an_arrow_that_points_back():
    tree = ast.parse("def f():\n    from simpo_megatron.training import loop\n    import simpo_megatron.mcore.model")
    assert len(backward(PACKAGE / "loss/simpo.py", tree)) == 2
    relative = ast.parse("from ..data import records")
    assert len(backward(PACKAGE / "loss/simpo.py", relative)) == 1
    assert list(assigned_to_foreign_modules(PACKAGE / "mcore/device.py")), "the patches there are seen"


@pytest.mark.parametrize(
    ("module", "unloaded"),
    [
        ("simpo_megatron.loss", ("megatron", "transformers", "datasets", "yaml", "rich")),
        ("simpo_megatron.data", ("megatron", "transformers", "datasets", "pyarrow")),
        ("simpo_megatron.config", ("megatron", "transformers", "datasets", "matplotlib")),
    ],
)
def test_importing_a_door_loads_nothing_it_does_without(module, unloaded):
    script = f"import sys, {module}; print([name for name in {unloaded!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=PACKAGE.parent
    )
    assert done.stdout.strip() == "[]", done.stderr
