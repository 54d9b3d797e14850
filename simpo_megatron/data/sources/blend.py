"""Preference files of a run, with their weights and names."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo_megatron.data.sources.shards import check_readable, is_on_hub
from simpo_megatron.errors import ConfigError

METRIC_GROUPS = frozenset({"rewards", "logps", "response_length"})
"""First parts of the names of metrics, as in `eval/rewards/chosen`; no validation set can have such a name."""

_NAMED = re.compile(r"([\w.-]+)=(.+)")


@dataclass(frozen=True)
class Source:
    """A file, a folder, a pattern or a name on the hub, and its share of an epoch (None: all of it)."""

    path: str
    weight: float | None = None


def parse_sources(data: Sequence[str | float | Mapping[str, Any]]) -> tuple[Source, ...]:
    """Returns the files of `data`: paths, weights and paths in turn (Megatron's blend), or mappings.

    Raises: ConfigError when weights are given to some files and not to others, or are not positive.
    """
    sources, weight = [], None
    for item in data:
        if isinstance(item, Mapping):
            if set(item) - {"path", "weight"} or "path" not in item:
                raise ConfigError(f"data: found {item!r}, expected the keys path and weight")
            sources.append(Source(str(item["path"]), item.get("weight")))
        elif (number := _number(item)) is not None and weight is None:
            weight = number
        else:
            sources.append(Source(str(item), weight))
            weight = None
    if weight is not None:
        raise ConfigError(f"data: found the weight {weight:g} at the end, expected a file after it")
    if not sources:
        raise ConfigError("data: found no file, expected at least one")
    weights = [source.weight for source in sources]
    if any(w is None for w in weights) and any(w is not None for w in weights):
        raise ConfigError("data: found files with a weight and files without, expected all or none")
    if any(w is not None and not w > 0 for w in weights):
        raise ConfigError(f"data: found the weights {weights}, expected numbers above 0")
    return tuple(sources)


def parse_named_sources(data: Sequence[str]) -> dict[str, list[str]]:
    """Returns the paths of each named set, in the order in which the names first appear.

    `NAME=PATH` belongs to the set NAME, a path beside such ones to a set named after its file. Where nothing has
    a name, all of `data` is one set, called "". A name holds no slash: `./a=b.jsonl` is a path.

    Raises: ConfigError when two sets have one name and no `NAME=` tells them apart, or a name is one of METRIC_GROUPS:
    metrics of a set are called `eval/NAME/...`, metrics of the first or only one `eval/...`.
    """
    matches = [_NAMED.fullmatch(item) for item in data]
    if not any(matches):
        return {"": list(data)} if data else {}
    named: dict[str, list[str]] = {}
    explicit = set()
    for item, match in zip(data, matches, strict=True):
        name, path = match.groups() if match else (Path(item).name.split(".")[0], item)
        if name in named and not (match and name in explicit):
            raise ConfigError(f"valid_data: found two sets called {name!r}, expected different names; write NAME=PATH")
        if name in METRIC_GROUPS:
            raise ConfigError(
                f"valid_data: found a set called {name}, the name of a group of metrics (eval/{name}/...), expected "
                "another name; write NAME=PATH"
            )
        if match:
            explicit.add(name)
        named.setdefault(name, []).append(path)
    return named


def source_identity(path: str) -> dict:
    """Returns the identity of a source, by which a change is noticed: its path, and its files' sizes and times.

    Raises: DataError: the path cannot be read as a preference file.
    """
    if is_on_hub(path):
        return {"path": path}
    check_readable(path)
    root = Path(path)
    files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    stats = [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return {"path": str(root.resolve()), "files": stats}


def _number(item: object) -> float | None:
    if isinstance(item, (int, float)):
        return float(item)
    try:
        return float(str(item))
    except ValueError:
        return None
