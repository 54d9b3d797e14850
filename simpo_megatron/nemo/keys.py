"""A NeMo configuration as one flat mapping of dotted keys, read with OmegaConf; nothing in it is instantiated."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpo_megatron.config.yaml_tree import read_yaml_tree
from simpo_megatron.errors import ConfigError, StoppedBySignal, listed
from simpo_megatron.limits import LimitError, limited

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Resolvers that NeMo 1 (multiply, sum, int_div) and NeMo-RL (the others) register for their files.
_RESOLVERS = {
    "multiply": lambda a, b: a * b,
    "sum": lambda *terms: sum(terms),
    "int_div": lambda a, b: a // b,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "max": lambda a, b: max(a, b),
}
# Environment variables that a file may use; any other may be a secret, which would reach terminal and model card.
_ENVIRONMENT = (
    *("HOME", "USER", "LOGNAME", "HOSTNAME", "PWD", "TMPDIR", "SCRATCH", "WORK", "NEMO_HOME", "HF_HOME"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_ARRAY_JOB_ID"),
    *("SLURM_ARRAY_TASK_ID", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_GPUS_PER_NODE"),
)
_LARGEST = 2**63
_MAX_PARENTS = 32
_CPU_SECONDS = 10.0
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Unset:
    """Stands for a value that the file leaves open; `why` gives the reason."""

    why: str


def read_flat(source: str | Path | DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """The leaves of a configuration by dotted key, a file's parents below it and `overrides` (key=value) above it.

    `defaults` names parents as NeMo-RL and hydra do: files, relative to the one that names them, later ones over
    earlier ones, a section with `_override_: true` in place of the parents' instead of over it. Interpolations
    are resolved; one that cannot be, and a value still to be given (`???`), becomes Unset. A list is one value.

    Raises: ConfigError when omegaconf is not installed, a file is not such YAML, an override not key=value, or
        interpolations grow without end.
    """
    omegaconf, place = _omegaconf(), place_of(source)
    try:
        with _resolvers(omegaconf), limited(cpu_seconds=_CPU_SECONDS, num_bytes=_MAX_BYTES):
            if isinstance(source, str | Path):
                config = _read_with_parents(omegaconf, Path(source), ())
            else:  # in a copy, for hydra's own takes no new keys
                config = omegaconf.OmegaConf.create(omegaconf.OmegaConf.to_container(source))
            config = omegaconf.OmegaConf.merge(config, _read_overrides(omegaconf, overrides))
            return dict(_leaves(omegaconf, config, ""))
    except omegaconf.errors.OmegaConfBaseException as error:
        raise ConfigError(
            f"{place}: found what OmegaConf cannot read ({_first_line(error)}), expected a configuration"
        ) from None
    except (RecursionError, LimitError, MemoryError):
        raise ConfigError(
            f"{place}: found interpolations that lead back to themselves or grow without end, expected ones that end"
        ) from None


def place_of(source: str | Path | DictConfig) -> str:
    """The name of `source` in messages: the file, or a word for what was read elsewhere."""
    return str(source) if isinstance(source, str | Path) else "configuration"


def _omegaconf() -> Any:
    try:
        return importlib.import_module("omegaconf")
    except ImportError:
        raise ConfigError(
            "nemo_config: found no omegaconf, expected it to read the file; pip install 'simpo-megatron[nemo]'"
        ) from None


@contextmanager
def _resolvers(omegaconf: Any) -> Iterator[None]:
    """Registers the resolvers above and one for the environment while a file is read; then restores earlier ones."""
    owner = importlib.import_module("omegaconf.basecontainer").BaseContainer
    before = dict(owner._resolvers)
    try:
        for name, function in _RESOLVERS.items():
            omegaconf.OmegaConf.register_new_resolver(name, _of_numbers(function), replace=True)
        omegaconf.OmegaConf.register_new_resolver("oc.env", _of_the_environment, replace=True)
        yield
    finally:
        owner._resolvers = before


def _of_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    def resolve(*terms: Any) -> Any:
        result = function(*terms) if all(isinstance(term, int | float) for term in terms) else None
        if result is None or abs(result) > _LARGEST:
            raise ValueError("found other terms, expected numbers, and a result that a machine's number can hold")
        return result

    return resolve


def _of_the_environment(name: str, *default: Any) -> Any:
    if name not in _ENVIRONMENT:
        raise ValueError(
            f"found a variable of the environment that may be a secret, expected one of {listed(_ENVIRONMENT, 6)}; "
            "write its value out"
        )
    found = [os.environ[name]] if name in os.environ else list(default[:1])
    if not found:
        raise ValueError("found no such variable of the environment, expected it to be set")
    return found[0]


def _read_with_parents(omegaconf: Any, path: Path, children: tuple[Path, ...]) -> Any:
    if path.resolve() in children or len(children) > _MAX_PARENTS:
        raise ConfigError(f"{path}: found itself among the parents it names in defaults, expected a file without it")
    own = _load(omegaconf, path)
    defaults = own.pop("defaults", [])
    if omegaconf.OmegaConf.is_config(defaults):
        defaults = omegaconf.OmegaConf.to_container(defaults)
    merged, own_is_merged = omegaconf.OmegaConf.create({}), False
    for parent in _parents(defaults, path):
        if parent is None:
            merged, own_is_merged = _merge(omegaconf, merged, own), True
        else:
            above = _read_with_parents(omegaconf, parent, (*children, path.resolve()))
            merged = _merge(omegaconf, merged, above)
    return merged if own_is_merged else _merge(omegaconf, merged, own)


def _load(omegaconf: Any, path: Path) -> Any:
    text, _ = read_yaml_tree(path)
    try:
        config = omegaconf.OmegaConf.load(io.StringIO(text))
    except omegaconf.errors.OmegaConfBaseException:
        raise
    except StoppedBySignal:
        raise
    except Exception as error:  # yaml's own errors, and what its constructors raise on malformed scalars
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        problem = getattr(error, "problem", None) or _first_line(error)
        raise ConfigError(f"{path}:{line}: found invalid YAML ({problem}), expected a configuration of NeMo") from None
    if not isinstance(config, omegaconf.DictConfig):
        raise ConfigError(f"{path}: found a list, expected a mapping with sections such as model and trainer")
    return config


def _parents(defaults: Any, path: Path) -> Iterator[Path | None]:
    """The files that `defaults` names, in order; None where it names the file itself (`_self_`)."""
    for entry in defaults if isinstance(defaults, list) else [defaults]:
        if isinstance(entry, str):
            name = entry if Path(entry).suffix in (".yaml", ".yml") else f"{entry}.yaml"
            yield None if entry == "_self_" else path.parent / name
        elif not isinstance(entry, dict) or not all(str(group).startswith("optional ") for group in entry):
            raise ConfigError(
                f"{path}: defaults: found {str(entry)[:60]}, expected file names; write a config group's settings out"
            )


def _merge(omegaconf: Any, lower: Any, upper: Any) -> Any:
    """`upper` over `lower`; a section marked `_override_: true` takes the place of the one below it."""
    for key in list(upper):
        if omegaconf.OmegaConf.is_dict(upper._get_node(key)) and upper._get_node(key).pop("_override_", False):
            lower.pop(key, None)
    return omegaconf.OmegaConf.merge(lower, upper)


def _read_overrides(omegaconf: Any, overrides: Sequence[str]) -> Any:
    """`overrides` as a configuration; hydra's `+` and `++`, which say that a key may be new, change nothing here."""
    for override in overrides:
        key = override.split("=")[0].lstrip("+")
        if "=" not in override or not key or key.startswith(("~", "-")):
            raise ConfigError(f"command line: found {override[:60]!r}, expected key=value after --nemo-config FILE")
    try:
        return omegaconf.OmegaConf.from_dotlist([override.lstrip("+") for override in overrides])
    except StoppedBySignal:
        raise
    except Exception as error:  # yaml's, for a value such as [a,
        raise ConfigError(
            f"command line: found an override that is not YAML ({_first_line(error)}), expected key=value"
        ) from None


def _leaves(omegaconf: Any, config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for key in config:
        name = f"{prefix}{key}"
        if omegaconf.OmegaConf.is_missing(config, key):
            yield name, Unset("???")
            continue
        try:
            value = config[key]
            if isinstance(value, omegaconf.ListConfig):
                value = omegaconf.OmegaConf.to_container(value, resolve=True)
        except omegaconf.errors.OmegaConfBaseException as error:
            yield name, Unset(f"{config._get_node(key)._value()} ({_first_line(error)})")
            continue
        if isinstance(value, omegaconf.DictConfig):
            yield from _leaves(omegaconf, value, f"{name}.")
        else:
            yield name, value


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
