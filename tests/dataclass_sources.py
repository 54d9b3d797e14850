"""Fields and arguments by their source alone, read from wheels that are not installed and could not be imported."""

from __future__ import annotations

import ast
import functools
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path


class Sources:
    """The modules in `wheels`."""

    def __init__(self, wheels: Iterable[Path]) -> None:
        self._texts: dict[str, bytes] = {}
        self._packages: set[str] = set()
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith(".py"):
                        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                        self._texts[module] = archive.read(name)
                        if name.endswith("/__init__.py"):
                            self._packages.add(module)

    def annotations(self, module: str, name: str) -> dict[str, list[str]]:
        """The fields of a dataclass, those of its bases included, and the names in the type of each."""
        found = self._find(module, name)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return {}
        module, node = found
        fields: dict[str, list[str]] = {}
        for base in node.bases:
            named = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(named, ast.Name):
                fields |= self.annotations(module, named.id)
        for entry in node.body:
            if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
                names = [part.id for part in ast.walk(entry.annotation) if isinstance(part, ast.Name)]
                if "ClassVar" not in names:
                    fields[entry.target.id] = names
        return fields

    def definition(self, module: str, name: str) -> ast.FunctionDef | ast.ClassDef:
        """The definition of a function or class that `module` defines or imports."""
        found = self._find(module, name)
        assert found is not None, f"{module}: no {name}"
        return found[1]

    def constructor_arguments(self, module: str, name: str) -> set[str]:
        """The names that the constructor of a class takes, which for a dataclass are its fields."""
        node = self.definition(module, name)
        init = next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
        if init is None:
            return set(self.annotations(module, name))
        return {one.arg for one in (*init.args.posonlyargs, *init.args.args, *init.args.kwonlyargs)}

    @functools.cache  # noqa: B019 (one object a test session)
    def _find(self, module: str, name: str) -> tuple[str, ast.FunctionDef | ast.ClassDef] | None:
        """The module that defines what `module` defines or imports, and its definition."""
        tree = self._tree(module)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
                return module, node
        package = module if module in self._packages else module.rpartition(".")[0]
        for source, imported in _imports(tree, name, package):
            if source in self._texts and (found := self._find(source, imported)) is not None:
                return found
        return None

    @functools.cache  # noqa: B019
    def _tree(self, module: str) -> ast.Module:
        return ast.parse(self._texts.get(module, b""))


def _imports(tree: ast.Module, name: str, package: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            for alias in node.names:
                if alias.name == "*" or (alias.asname or alias.name) == name:
                    yield ".".join([*above, *filter(None, [node.module])]), name if alias.name == "*" else alias.name
