"""The syntax tree of a YAML file, after limits on its size, its depth and its growth by aliases."""

from __future__ import annotations

from pathlib import Path

import yaml

from simpo_megatron.errors import ConfigError

PLAIN_TAG = "tag:yaml.org,2002:"
_MAX_BYTES = 256 << 10
_MAX_DEPTH = 32
_MAX_NODES = 50_000


def read_yaml_tree(path: Path) -> tuple[str, yaml.Node | None]:
    """(the text of a YAML file, the root of its tree); None for a file without content.

    Tags have no effect, and nothing is constructed.

    Raises: ConfigError naming file and line: unreadable, too large for a configuration, not YAML, or a bomb.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}), expected a YAML file") from None
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{path}: found more than {_MAX_BYTES} bytes, expected a short YAML file")
    try:
        text = content.decode("utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        depth, num_nodes = _extent(root, {}) if root is not None else (0, 0)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "not UTF-8 text, or nested too deep"
        raise ConfigError(
            f"{path}:{mark.line + 1 if mark else 1}: found invalid YAML ({problem}), expected lines such as 'lr: 5e-7'"
        ) from None
    if depth > _MAX_DEPTH or num_nodes > _MAX_NODES:
        raise ConfigError(
            f"{path}: found {num_nodes:.3g} values, {depth} deep, once its aliases are followed, expected at most "
            f"{_MAX_NODES}, {_MAX_DEPTH} deep"
        )
    return text, root


def _extent(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(depth, number of nodes) below and with `node`, an aliased one counted wherever it stands."""
    if id(node) in known:
        return known[id(node)]
    # An alias to one of its own parents is infinitely deep.
    known[id(node)] = _MAX_DEPTH + 1, 1
    children = []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    extents = [_extent(child, known) for child in children]
    depth = 1 + max((depth for depth, _ in extents), default=0)
    known[id(node)] = depth, 1 + sum(num_nodes for _, num_nodes in extents)
    return known[id(node)]
