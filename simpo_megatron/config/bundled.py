"""The configurations that come with the package, by name: `--config llama3_70b_64xh100`."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from simpo_megatron.errors import ConfigError

_PACKAGE = Path(__file__).parents[1]
# A wheel has them inside the package; a checkout or an editable install has them beside it.
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def bundled_configs() -> dict[str, Path]:
    """The files of the configurations that come with the package, by name."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config_file(name: str) -> Path:
    """The YAML file `name`: a path, or the name of a configuration that comes with the package.

    An existing path wins; a name that looks like a path is always taken as one.

    Raises: ConfigError: no configuration has this name.
    """
    path = Path(name)
    if os.path.exists(name) or path.suffix or path.parent != Path():
        return path
    bundled = bundled_configs()
    if name in bundled:
        return bundled[name]
    nearest = "".join(f"; did you mean {near}?" for near in get_close_matches(name, bundled, n=1, cutoff=0.5))
    raise ConfigError(f"config: found {name[:60]!r}, expected a YAML file or one of {', '.join(bundled)}{nearest}")
