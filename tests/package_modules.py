"""The modules of the package: their source, the room that each stands in, and what it imports."""

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "simpo_megatron"
MODULES = sorted(PACKAGE.rglob("*.py"))


@cache
def parsed(path):
    return ast.parse(path.read_text())


def room(path):
    """The room a file stands in: its folder below the package, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path, tree=None):
    """(line, dotted name) of everything a module imports, wherever in it; `from a import b` gives a.b."""
    for node in ast.walk(tree or parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            anchor = path.relative_to(PACKAGE.parent).parts[: -node.level] if node.level else ()
            module = ".".join([*anchor, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
