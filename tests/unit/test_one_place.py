"""Work that one module of the package does, and no other: agreement, locks, questions about CUDA, patches."""

import ast
import re
from collections import Counter

from package_modules import MODULES, PACKAGE, imported, parsed, room


def test_only_parallel_reads_megatrons_global_state():
    readers = {path.name for path in MODULES if "parallel_state" in path.read_text()}
    assert readers <= {"parallel.py"}


OBJECT_COLLECTIVE = re.compile(r"(all_gather|gather|broadcast|scatter|send|recv)_object(_list)?")


def object_collectives(path, tree=None):
    """`file: function` of every function that hands objects from rank to rank."""
    for node in ast.walk(tree or parsed(path)):
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
        node.name for path in MODULES for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in (stems + classes).items() if count > 1] == []


def attributes(path):
    """Dotted names read in a module, such as torch.cuda.is_available."""
    return {ast.unparse(node) for node in ast.walk(parsed(path)) if isinstance(node, ast.Attribute)}


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
    tree = tree or parsed(path)
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
    for node in run_on_import(tree or parsed(path)):
        if isinstance(node.func, ast.Attribute) and node.func.attr in _ON_IMPORT:
            yield f"{path.name}:{node.lineno} {ast.unparse(node)}"


def test_only_cpu_patches_changes_what_others_wrote():
    others = [path for path in MODULES if path != PACKAGE / "mcore/cpu_patches.py"]
    assert [change for path in others for change in patches(path)] == []


def test_importing_a_module_sets_no_filter():
    assert [change for path in MODULES for change in set_on_import(path)] == []


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
