"""Fields of dataclasses by their source alone, read from wheels that are not installed and could not be imported."""

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
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith(".py"):
                        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                        self._texts[module] = archive.read(name)

    def annotations(self, module: str, name: str) -> dict[str, list[str]]:
        """The fields of a dataclass, those of its bases included, and the names in the type of each."""
        found = self._find(module, name)
        if found is None:
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

    @functools.cache  # noqa: B019 (one object a test session)
    def _find(self, module: str, name: str) -> tuple[str, ast.ClassDef] | None:
        """The module that defines a class which `module` defines or imports, and its definition."""
        tree = self._tree(module)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return module, node
        for source, imported in _imports(tree, name):
            if source in self._texts and (found := self._find(source, imported)) is not None:
                return found
        return None

    @functools.cache  # noqa: B019
    def _tree(self, module: str) -> ast.Module:
        return ast.parse(self._texts.get(module, b""))


def _imports(tree: ast.Module, name: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                if alias.name == "*" or (alias.asname or alias.name) == name:
                    yield node.module, name if alias.name == "*" else alias.name
