"""The packages of one extra alone, out of an environment that has many: a folder of links to put on the path."""

from __future__ import annotations

import os
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ranks import REPOSITORY

PROJECT = "simpo-megatron"


def installed_alone(folder: Path, extra: str = "") -> list[str]:
    """Returns the command and arguments of a Python that finds this package, what it requires, and one extra of it.

    Skips the test where a package of the extra is not installed.
    """
    folder.mkdir()
    for found in _closure(extra).values():
        for entry in {path.parts[0] for path in found.files or ()} - {"..", "__pycache__"}:
            link, target = folder / entry, Path(str(found.locate_file(entry)))
            if not link.exists() and target.exists():
                link.symlink_to(target)
    path = os.pathsep.join(map(str, (REPOSITORY, folder)))
    # -S: without the environment's own folder.
    return ["env", f"PYTHONPATH={path}", sys.executable, "-S"]


def _closure(extra: str) -> dict[str, Distribution]:
    found: dict[str, Distribution] = {}
    seen, left = set(), [(PROJECT, extra)]
    while left:
        name, wanted = left.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            pytest.skip(f"{name}, of the extra {extra}, is not installed")
        for text in found[name].requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": wanted}):
                needed = canonicalize_name(requirement.name)
                left += [(needed, more) for more in ("", *requirement.extras)]
    del found[PROJECT]
    return found
